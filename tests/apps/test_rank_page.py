"""The ranking page in a real headless Chromium: keyboard, mouse, languages, hostile answers, a server that dies."""

import json
import re
import time

import pytest

from tests.apps.rank_browser import KEYS, chromium, need_browser
from tests.apps.rank_parts import SHOWS, ranks, read_rows, row, served, until, write_rows

HOSTILE = [
    '<script>document.title = "owned"</script> <img src=x onerror=\'document.title = "owned"\'>',
    "[link](javascript:document.title='owned') ![image](http://203.0.113.9/pixel.png)",
    '```html\n<script>document.title = "owned"</script>\n```\n<iframe srcdoc="<script>top.document.title=1</script>">',
    SHOWS,
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    need_browser()
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def server(tmp_path):
    rows = [row(i) for i in range(4)]
    for answer, text in zip(rows[2]["completions"], HOSTILE):
        answer["messages"][0]["content"] = text
    with served(write_rows(tmp_path / "c.jsonl", rows), "--out", tmp_path / "out.jsonl") as server:
        server.out = tmp_path / "out.jsonl"
        yield server


class Person:
    """What a person does at the page."""

    def __init__(self, driver, url, name="Ada"):
        self.driver = driver
        driver.get_log("browser")
        driver.get(url)
        driver.execute_script("localStorage.clear()")
        driver.get(url)
        if name:
            until(lambda: self.sees("#name-dialog[open]"))
            self.type(name, "Enter")
            self.at(1)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def sees(self, selector):
        return any(found.is_displayed() for found in self.driver.find_elements("css selector", selector))

    def text(self, selector):
        return self.find(selector).text

    def type(self, *keys):
        """Real key presses, at whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*(KEYS.get(key, key) for key in keys)).perform()

    def at(self, number):
        until(lambda: re.match(rf"\D+{number}\b", self.text("#place")) and self.driver.execute_script(READY))

    def order(self):
        """The tiers on the board, as the numbers a person sees."""
        return self.driver.execute_script(ORDER)

    def drag(self, start, end, *, above=0):
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.driver, duration=40)
        chain.click_and_hold(self.find(start)).move_to_element_with_offset(self.find(end), 0, above)
        chain.release().perform()

    def complaints(self):
        """What the browser's console holds against the page: violations of its policy, errors, failed requests."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


READY = "return document.activeElement?.id === 'place'"
ORDER = (
    "return [...document.querySelectorAll('#tiers .tier')].map("
    "(tier) => [...tier.querySelectorAll('.chip')].map((chip) => Number(chip.textContent)))"
)


def chip(number):
    return f"[data-chip='{number - 1}']"


def shown_ranks(line):
    """Ranks in the order in which the answers were shown."""
    return [ranks(line)[at] for at in line["order"]]


def test_a_ranking_by_keyboard_alone_reaches_the_file(driver, server):
    person = Person(driver, server.url)
    person.type("3", "1", "4", "2")
    assert person.order() == [[3], [1], [4], [2]]
    person.type("Up", "Up")  # the one that was pressed last
    assert person.order() == [[3], [2], [1], [4]]
    person.type("t")
    assert person.order() == [[2, 3], [1], [4]]
    person.type("t", "4", "t", "Down")
    assert person.order() == [[3], [2], [1], [4]]
    person.type("1", "t", "4", "u")
    assert person.order() == [[3], [1, 2]] and "3 of 4" in person.text("#submit")
    assert person.text("[data-answer='0'] .rank") == "2nd"
    person.type("Enter")
    person.at(2)
    (line,) = read_rows(server.out)
    assert shown_ranks(line) == [2, 2, 1, None]
    assert (line["annotator"], line["id"], line["status"], line["revision"]) == ("Ada", "q0", "ranked", 1)
    assert 0 < line["seconds"] < 60 and len(line["key"]) == 32
    assert person.complaints() == []


def test_skip_flag_and_back_by_keyboard(driver, server):
    person = Person(driver, server.url)
    person.type("Enter")  # nothing is ranked yet
    until(lambda: "at least two" in person.text("#trouble"))
    assert read_rows(server.out) == []
    person.type("s")
    person.at(2)
    person.type("2", "f")
    until(lambda: person.sees("#flag-dialog[open]"))
    person.type("Down", "Down", "Tab", "cut", "Enter")
    person.at(3)
    person.type("b")
    person.at(2)
    assert person.order() == [[2]] and "broken: cut" in person.text("#notice")
    person.type("Backspace")
    person.at(1)
    assert "skipped" in person.text("#notice")
    person.type("1", "2", "3", "4", "Enter")
    person.at(3)  # where it was left
    said = [(line["id"], line["status"], line["flag"], line["revision"]) for line in read_rows(server.out)]
    assert said == [("q0", "skipped", None, 1), ("q1", "flagged", "broken: cut", 1), ("q0", "ranked", None, 2)]
    person.type("b")
    person.at(2)
    person.type("n")
    person.at(3)
    assert len(read_rows(server.out)) == 3


def test_the_digits_of_a_french_keyboard_need_no_shift(driver, server):
    person = Person(driver, server.url)
    for key, code in (("\u00e9", "Digit2"), ("&", "Digit1"), ("3", "Numpad3")):
        for kind in ("keyDown", "keyUp"):
            driver.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": code})
    assert person.order() == [[2], [1], [3]]


def test_a_ranking_by_mouse_alone_reaches_the_file(driver, server):
    person = Person(driver, server.url)
    person.drag("[data-answer='1'] .handle", ".board")  # a card onto the empty board
    assert person.order() == [[2]]
    person.drag(chip(4), ".gap[data-at='0']")
    assert person.order() == [[4], [2]]
    person.drag(chip(1), ".tier[data-at='1']")  # onto another: a tie
    assert person.order() == [[4], [1, 2]]
    person.drag(chip(2), ".gap[data-at='1']")  # out of the tie
    assert person.order() == [[4], [2], [1]]
    person.drag(chip(4), ".gap[data-at='3']")
    assert person.order() == [[2], [1], [4]]
    person.drag(chip(1), "#tray")
    assert person.order() == [[2], [4]]
    person.drag(chip(4), "#place")  # dropped where nothing takes it
    assert person.order() == [[2], [4]]
    person.find("[data-answer='2'] .handle").click()
    assert person.order() == [[2], [4], [3]]
    person.find("#tie").click()
    assert person.order() == [[2], [3, 4]]
    person.find("#submit").click()
    person.at(2)
    assert shown_ranks(read_rows(server.out)[0]) == [None, 1, 2, 2]
    person.find("#skip").click()
    person.at(3)
    assert person.complaints() == []


def test_chips_are_reached_and_named_without_a_mouse(driver, server):
    person = Person(driver, server.url)
    person.type("1", "2", "t")
    assert person.find(chip(2)).get_attribute("aria-label") == "Answer 2: 1st, ties with 1"
    assert person.find(chip(2)).get_attribute("aria-pressed") == "true"
    until(lambda: "Answer 2: 1st" in driver.execute_script("return document.getElementById('live').textContent"))
    person.type("Tab")  # from the heading to the first control behind it
    seen = set()
    for _ in range(20):
        active = driver.switch_to.active_element
        seen.add(active.get_attribute("id") or active.get_attribute("data-chip"))
        assert driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
        if active.get_attribute("id") == "flag":
            break
        person.type("Tab")
    assert {"0", "1", "2", "3", "submit", "tie", "remove", "skip", "flag"} <= seen
    nameless = driver.execute_script(
        "return [...document.querySelectorAll('button, input, select')]"
        ".filter((e) => e.offsetParent && !e.textContent.trim() && !e.ariaLabel && !e.labels?.length).map((e) => e.id)"
    )
    assert nameless == []


def test_what_an_answer_holds_is_shown_and_never_run(driver, server, tmp_path):
    for place in (0, 1):
        said = {"annotator": "Ada", "id": f"q{place}", "key": f"key-1234{place}", "action": "skip", "seconds": 1}
        assert server.call("POST", "/api/rankings", said)[0] == 200
    person = Person(driver, server.url, name=None)
    driver.get_log("performance")
    until(lambda: person.sees("#name-dialog[open]"))
    person.type("Ada", "Enter")
    person.at(3)
    text = person.text("#answers")
    for part in ('<script>document.title = "owned"</script>', "<img src=x", "javascript:document.title", "<iframe"):
        assert part in text
    assert person.find(".answer table").is_displayed() and person.sees(".answer .tok-k")
    inside = "#task script, #task img, #task iframe, #task [onerror], #task [style], #task a:not([href^=http])"
    assert driver.execute_script(f"return document.querySelectorAll('{inside}').length") == 0
    time.sleep(0.3)  # what would run, would have run by now
    assert driver.title == "Rank the answers"
    # Nothing left this machine: every request went to the server.
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith(server.url) for url in urls), urls
    assert person.complaints() == []
    # And had it been inserted unescaped, the page's policy would still have refused to run it.
    driver.execute_script("document.getElementById('prompt').innerHTML = '<img src=x onerror=\"document.title=1\">'")
    refused = until(person.complaints)
    assert any("Content Security Policy" in told for told in refused) and driver.title == "Rank the answers"


def test_an_order_survives_a_reload_and_a_dead_server_and_is_saved_once(driver, server, tmp_path):
    person = Person(driver, server.url)
    person.type("4", "3", "2")
    driver.refresh()
    person.at(1)
    assert person.order() == [[4], [3], [2]]
    server.kill()
    person.type("Enter")
    until(lambda: "Not saved yet" in person.text("#trouble"))
    person.type("1", "s")  # nothing else happens meanwhile
    with served(tmp_path / "c.jsonl", "--out", server.out, port=server.port):
        person.at(2)
        assert not person.sees("#trouble")
        (line,) = read_rows(server.out)
        assert shown_ranks(line) == [None, 3, 2, 1]
        person.type("b")
        person.at(1)
        assert person.order() == [[4], [3], [2]]
        driver.refresh()  # goes on where the person stopped
        person.at(2)


def test_agreement_help_names_and_the_end(driver, server):
    said = {"id": "q0", "action": "rank", "seconds": 40}
    for name in ("Bo", "Cy"):
        server.call("POST", "/api/rankings", {**said, "annotator": name, "key": f"key-of-{name}", "tiers": [[0], [1]]})
    person = Person(driver, server.url)
    person.type("?")
    until(lambda: person.sees("#help-dialog[open]"))
    person.type("s")  # a dialog takes the keys
    person.find("#shortcuts").click()
    person.type("Escape")
    person.type("1")
    assert person.order() == []  # single keys are off
    person.find("#help").click()
    person.find("#shortcuts").click()
    person.type("Escape")
    for number in (1, 2, 3):
        person.type("1", "2", "Enter")  # the help button has the focus at first; Enter submits all the same
        person.at(number + 1)
    person.type("s")
    until(lambda: person.sees("#end"))
    assert person.text("#count") == "4 of 4 done"
    person.find("#agreement").click()
    until(lambda: person.sees("#agreement-dialog[open]"))
    assert re.fullmatch(r"[-−]?\d\.\d\d|–", person.text("#tau"))
    assert [cell.text for cell in driver.find_elements("css selector", "#people tbody th")] == ["Ada", "Bo", "Cy"]
    person.type("Escape")
    person.find("#who").click()
    until(lambda: person.sees("#name-dialog[open]"))
    person.type("Dan", "Enter")  # over the name that was there, which is selected
    person.at(1)
    assert person.text("#who") == "Dan" and person.text("#count") == "0 of 4 done"


def test_the_page_speaks_french_and_switches(tmp_path, server):
    need_browser()
    with chromium(tmp_path / "profile", lang="fr-FR") as driver:
        person = Person(driver, server.url, name=None)
        until(lambda: person.sees("#name-dialog[open]"))
        assert person.text("#name-title") == "Qui classe ?"
        person.type("Zoé", "Enter")
        person.at(1)
        assert driver.execute_script("return document.documentElement.lang") == "fr"
        person.type("1", "2")
        assert person.text("#place") == "Question 1 sur 4" and "Valider 2 sur 4" in person.text("#submit")
        assert [e.text for e in driver.find_elements("css selector", ".place")] == ["1re", "2e"]
        driver.find_element("css selector", "#lang option[value=en]").click()
        assert person.text("#place") == "Prompt 1 of 4" and person.order() == [[1], [2]]
        driver.refresh()
        person.at(1)
        assert person.text("#place") == "Prompt 1 of 4"
        person.type("Enter")
        person.at(2)
        assert read_rows(server.out)[0]["annotator"] == "Zoé"


def test_a_link_with_a_token_lets_a_browser_in_and_leaves_the_address(driver, tmp_path):
    file = write_rows(tmp_path / "c.jsonl", [row(i) for i in range(2)])
    with served(file, "--host", "0.0.0.0") as server:
        query = server.url.partition("?")[2]
        driver.get(f"http://127.0.0.1:{server.port}/")
        assert "token" in driver.find_element("css selector", "body").text
        person = Person(driver, f"http://127.0.0.1:{server.port}/?{query}")
        assert driver.current_url == f"http://127.0.0.1:{server.port}/"
        driver.refresh()
        person.at(1)
        person.type("1", "2", "Enter")
        person.at(2)
        assert len(read_rows(tmp_path / "c.rankings.jsonl")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_has_the_page_in_both_schemes(scheme, driver, server, tmp_path):
    from io import BytesIO

    from PIL import Image

    person = Person(driver, server.url)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    try:
        person.type("3", "1", "2", "t")
        time.sleep(0.3)  # transitions of colours
        shot = driver.get_screenshot_as_png()
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    (tmp_path / f"{scheme}.png").write_bytes(shot)
    image = Image.open(BytesIO(shot)).convert("L")
    bright = sum(value > 128 for value in image.getdata()) / (image.width * image.height)
    assert (bright > 0.8) if scheme == "light" else (bright < 0.2)
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert driver.execute_script(wide)
