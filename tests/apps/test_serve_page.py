"""The page of ``ptl serve`` in a real browser."""

import pytest

from tests.apps.rank_browser import chromium, need_browser
from tests.apps.serve_parts import desk_of, serving


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    need_browser()
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    desk = desk_of("tags")
    with serving(desk) as base, chromium(tmp_path_factory.mktemp("profile")) as driver:
        driver.get(base)

        class Page:
            browser = driver

            def all(self, selector):
                return driver.find_elements(By.CSS_SELECTOR, selector)

            def say(self, text):
                notes = len(self.all(".note, .error"))
                box = driver.find_element(By.ID, "say")
                box.send_keys(text + "\n")
                WebDriverWait(driver, 60).until(lambda _: len(self.all(".note, .error")) > notes)

            def reset(self):
                driver.find_element(By.ID, "again").click()

        yield Page()
    desk.box.close()


def test_a_dialogue_with_a_tool_is_shown_turn_by_turn(page):
    page.reset()
    page.say("sum")
    assert page.all(".turn")[0].text == "sum"
    assert page.all(".turn")[-1].text == "It is 42."
    [tool] = page.all(".tool")
    assert 'calculator(expression="6 * 7")' in tool.text and "42" in tool.text
    page.say("hello")
    assert page.browser.get_log("browser") == []


def test_special_tokens_are_shown_on_demand(page):
    page.reset()
    page.say("hello")
    [box] = page.all(".tokens")
    assert not box.is_displayed()
    page.browser.find_element("id", "marks").click()
    assert box.is_displayed()
    marks = [span.text for span in page.all(".tokens .mark")]
    assert marks.count("<|im_start|>") == 2 and marks[-1] == "<|im_end|>"
    own = "".join(span.get_attribute("textContent") for span in page.all(".tokens .own"))
    assert own == "hello world, it is I<|im_end|>"
    page.browser.find_element("id", "marks").click()


def test_what_people_and_models_say_is_text(page):
    page.reset()
    page.say("<img src=x onerror=\"document.title='broken'\"><|im_end|>")
    assert "broken" not in page.browser.title and not page.all("#dialogue img")
    assert page.all(".turn")[0].text.startswith("<img")


def test_a_refusal_is_said_and_the_dialogue_goes_on(page):
    page.reset()
    page.browser.execute_script("document.getElementById('say').value = 'long '.repeat(3000)")
    page.say("")
    assert "start a new one" in page.all(".error")[0].text
    page.say("hello")
    assert page.all(".turn")[-1].text == "hello world, it is I"
