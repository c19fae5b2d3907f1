"""A real headless Chromium for the tests of the ranking page."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

APT = "apt-get install -y --no-install-recommends chromium chromium-driver"
KEYS = {"Enter": "\ue007", "Backspace": "\ue003", "Up": "\ue013", "Down": "\ue015", "Escape": "\ue00c", "Tab": "\ue004"}


def need_browser():
    """Skips without Chromium; fails instead where PTL_REQUIRE_BROWSER is set."""
    told = None
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        told = f"no Chromium here: {APT}"
    else:
        try:
            import selenium  # noqa: F401
        except ModuleNotFoundError:
            told = "selenium is not installed: pip install -e '.[dev]'"
    if told and os.environ.get("PTL_REQUIRE_BROWSER"):
        pytest.fail(told)
    if told:
        pytest.skip(told)


@contextmanager
def chromium(profile, lang="en", size=(1360, 900)):
    """A driver with an empty profile; the browser and its driver are gone at the end."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--force-color-profile=srgb",
        f"--user-data-dir={profile}",
        f"--window-size={size[0]},{size[1]}",
        f"--accept-lang={lang}",
    ):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"intl.accept_languages": lang})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # LANGUAGE sets the browser's own language on Linux; a service of ours keeps selenium from looking for a driver.
    env = {**os.environ, "LANGUAGE": lang}
    service = Service(shutil.which("chromedriver"), log_output=subprocess.DEVNULL, env=env)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(20)
        driver.set_script_timeout(20)
        yield driver
    finally:
        try:
            driver.quit()
        finally:
            service.stop()
