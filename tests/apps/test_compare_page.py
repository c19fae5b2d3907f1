"""The page of ``ptl compare`` in a real headless Chromium: sorting, curves, filter, phone width, hostile words."""

import json

import pytest

from tests.apps.compare_parts import ptl, write_lines, write_run
from tests.apps.rank_browser import chromium, need_browser

EVIL = "<img src=x onerror=\"document.title='owned'\"></script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    need_browser()
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Ten groups, one of two seeds, of which one failed, one has another metric and one is named as an attack."""
    top = tmp_path_factory.mktemp("page")
    for i in range(10):
        name = EVIL if i == 3 else f"set {i}"
        write_run(top / f"in/run-{i}", lr=10.0 ** -(9 - i), losses=[2.0, 1.0 + i / 10], config={"data": {"name": name}})
    write_run(top / "in/run-0-again", lr=1e-9, seed=1, losses=[2.0, 1.2], config={"data": {"name": "set 0"}})
    write_run(
        top / "in/run-bad",
        lr=1.0,
        losses=[2.0, "nan"],
        status="failed",
        error=EVIL,
        config={"data": {"name": "set 10"}},
    )
    rows = [{"step": i, "val/loss": 3.0 - i, "train/reward": float(i)} for i in range(2)]
    write_lines(top / "in/run-9/metrics.jsonl", rows)
    done = ptl("compare", top / "in", "--out", top / "out", "--metric", "val/loss")
    assert done.returncode == 0, done.stderr
    return (top / "out/compare.html").as_uri()


@pytest.fixture
def view(driver, page):
    driver.get_log("browser")
    driver.get_log("performance")
    driver.set_window_size(1360, 900)
    driver.get(page)
    yield View(driver)
    assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in urls)


class View:
    """What a person sees and clicks."""

    def __init__(self, driver):
        self.driver = driver

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def column(self, table, title):
        titles = [found.text for found in self.all(f"#{table} thead th")]
        return [found.text for found in self.all(f"#{table} tbody td:nth-child({titles.index(title) + 1})")]

    def click(self, table, title):
        next(found for found in self.all(f"#{table} thead button") if found.text == title).click()

    def sort(self, table):
        return [found.get_attribute("aria-sort") for found in self.all(f"#{table} thead th[aria-sort]")]

    def lines(self):
        return [found.get_attribute("data-tag") for found in self.all("#chart path.line")]


def test_a_heading_sorts_both_ways_and_unknown_values_stay_last(view):
    assert view.column("groups", "group")[:3] == ["A", "B", "C"]  # best first
    view.click("groups", "lr")
    rates = [float(text) for text in view.column("groups", "lr")]
    assert rates == sorted(rates) and view.sort("groups") == ["ascending"]
    view.click("groups", "lr")
    assert [float(text) for text in view.column("groups", "lr")] == rates[::-1] and view.sort("groups") == [
        "descending"
    ]
    for order in ("ascending", "descending"):
        view.click("runs", "val/loss final")
        values = view.column("runs", "val/loss final")
        assert view.sort("runs") == [order] and values[-1] == "nan"
        numbers = [float(value) for value in values[:-1]]
        assert numbers == sorted(numbers, reverse=order == "descending")


def test_the_chosen_metric_is_drawn_and_gets_a_column(view):
    assert view.lines() == list("HGFEDCBA")
    view.driver.execute_script(
        "const s = document.getElementById('metric'); s.value = 'train/reward'; s.dispatchEvent(new Event('change'))"
    )
    tag = next(
        t for t, text in zip(view.column("groups", "group"), view.column("groups", "train/reward final")) if text != "–"
    )
    if tag not in "ABCDEFGH":
        view.all(f"#groups tbody tr:nth-child({ord(tag) - 64}) input")[0].click()
    assert view.lines() == [tag]
    assert "not logged" in view.all("#legend")[0].text


def test_a_tick_draws_a_curve_and_a_band_shows_the_deviation(view):
    view.all("#groups tbody tr:nth-child(9) input")[0].click()
    assert view.lines() == list("IHGFEDCBA")
    assert view.all("#chart path[data-tag=I]")[0].get_attribute("stroke-dasharray")
    assert len(view.all("#chart path.band")) == 1 and any(
        "±" in text for text in view.column("groups", "val/loss final")
    )
    for box in view.all("#groups tbody input")[:9]:
        box.click()
    assert view.lines() == [] and "tick a group" in view.all("#chart text")[0].text


def test_values_under_the_pointer_are_told(view):
    from selenium.webdriver import ActionChains

    assert not view.all(".tip")[0].is_displayed()
    ActionChains(view.driver).move_to_element(view.all("#chart svg")[0]).perform()
    assert view.all(".tip")[0].is_displayed() and len(view.all(".tip div")) == 9


def test_a_log_scale_and_a_filter_change_what_is_seen(view):
    before = [found.text for found in view.all("#chart text")]
    view.all("#log")[0].click()
    assert [found.text for found in view.all("#chart text")] != before and len(view.lines()) == 8
    view.all("#filter")[0].send_keys("failed")
    assert view.column("runs", "run") == ["run-bad"] and len(view.column("groups", "group")) == 1
    assert view.all("#runs td .bad")[0].text == "failed"


def test_words_of_a_run_stay_words(view):
    assert EVIL in view.column("groups", "name")
    assert view.driver.title == "Comparison of 12 runs in 11 groups"
    assert not view.all("img") and "1 of the runs failed" in view.all("#lead")[0].text


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_window_scrolls_tables_only(view, width):
    # Chromium's own window is never narrower than 500: the device is emulated.
    view.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        view.driver.refresh()
        wide, seen = view.driver.execute_script(
            "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= seen == width and len(view.lines()) == 8
        last = view.driver.execute_script("return document.querySelector('#chart svg').getBoundingClientRect().right")
        assert last <= width
    finally:
        view.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
