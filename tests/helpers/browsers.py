"""A headless Chromium for tests of pages, which are skipped without selenium or the browser."""

import shutil
import time
import urllib.request
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds


def new_browser(width: int = 800, height: int = 600) -> Any:
    """Create a selenium driver whose browser log can be read."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    size = f"--window-size={width},{height}"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", size):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))


def wait(true: Callable[[], Any]) -> Any:
    """Wait until `true` returns something truthy; return that."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if found := true():
                return found
        except (WebDriverException, AttributeError):
            pass  # the page is being redrawn, and the element is not there yet
        time.sleep(0.1)
    raise AssertionError("the page did not get there")


def one(browser: Any, selector: str) -> Any:
    return next(iter(browser.find_elements("css selector", selector)), None)


def fill(browser: Any, selector: str, value: object) -> None:
    from selenium.webdriver.common.keys import Keys

    field = wait(lambda: one(browser, selector))
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def click(browser: Any, selector: str) -> None:
    browser.execute_script("arguments[0].click()", wait(lambda: one(browser, selector)))


def open_tab(browser: Any, label: str) -> None:
    tabs = browser.find_elements("css selector", "button[role=tab]")
    found = next(tab for tab in tabs if tab.get_attribute("textContent").strip() == label)
    browser.execute_script("arguments[0].click()", found)


def shown(browser: Any, name: str) -> np.ndarray:
    """Return the image in a frame, as the server sends it."""
    source = wait(lambda: one(browser, f"#{name} img").get_attribute("src"))
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(BytesIO(answer.read())).convert("RGB"), float)


def words(browser: Any, name: str) -> str:
    """Return the status line below the images, once they are there."""
    return wait(lambda: one(browser, f"#{name}").text)


def said(browser: Any) -> str:
    """Return the message that pops up."""
    return wait(lambda: one(browser, ".toast-body").text)
