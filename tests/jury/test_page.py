"""The ballot's page in a browser, on a phone and on a desk: vote, go back, reload in the middle, save."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.browsers import new_browser

from ghibli.jury import ballot, count


@pytest.fixture
def page(tmp_path: Path) -> Path:
    pairs, draws = ballot.plan(2, 2, 6, 6), torch.Generator().manual_seed(0)
    drawn = [torch.rand(6, 3, 64, 64, generator=draws) for _ in range(2)]
    prompts = ballot.items_of(["a cat on a very long train, Studio Ghibli style", "b"], 6)
    return ballot.write(tmp_path, ["one", "two"], prompts, pairs, drawn)


@pytest.fixture(scope="module", params=[390, 1280])
def driver(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser of a phone's width, then one of a desk's."""
    driver = new_browser(request.param, 800)
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": request.param, "height": 800, "deviceScaleFactor": 1, "mobile": request.param < 500},
    )
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver: Any, page: Path, tmp_path: Path) -> Any:
    """That browser at the page, without the votes of another test."""
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    driver.get(page.as_uri())
    driver.execute_script("localStorage.clear()")
    driver.refresh()
    return driver


def click(browser: Any, name: str) -> None:
    browser.find_element("id", name).click()


def place(browser: Any) -> str:
    return browser.find_element("id", "place").text


def test_people_vote_reload_and_save(browser: Any, page: Path, tmp_path: Path) -> None:
    assert place(browser) == "pair 1 of 6"
    for name in ("left-image", "right-image", "same", "save"):
        box = browser.find_element("id", name).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= browser.execute_script("return innerWidth")
    for name in ("left", "right", "same"):
        click(browser, name)
    click(browser, "back")
    assert place(browser) == "pair 3 of 6"
    order = browser.execute_script("return state.order")
    time.sleep(1)  # Chromium hands what a page stores to its other processes in its own time
    browser.refresh()
    assert place(browser) == "pair 3 of 6" and browser.execute_script("return state.order") == order
    body = browser.find_element("tag name", "body")
    body.send_keys("\ue012")  # arrow left
    for _ in range(3):
        click(browser, "right")
    assert not browser.find_element("id", "vote").is_displayed()
    assert browser.find_element("id", "done").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    content = json.loads(browser.execute_script("return votes()"))
    assert [vote["choice"] for vote in content["votes"]] == ["left", "right", "left", *["right"] * 3]
    assert sorted(vote["pair"] for vote in content["votes"]) == list(range(6))
    click(browser, "save")
    file = saved(browser, tmp_path)
    assert json.loads(file.read_text()) == content
    key = count.read_key(page.with_suffix(".key.json"))
    assert len(count.read_votes([file], key).votes) == 6


def test_keys_that_are_not_the_pages_own(browser: Any) -> None:
    """The browser goes back by alt and arrow; space presses the button that has the focus."""
    from selenium.webdriver import ActionChains

    def choices() -> list[str]:
        return browser.execute_script("return state.choices")

    event = (
        "const event = new KeyboardEvent('keydown', {key: arguments[0], [arguments[1]]: true, bubbles: true, "
        "cancelable: true}); document.body.dispatchEvent(event); return event.defaultPrevented"
    )
    for key in ("ArrowLeft", "Backspace", " "):
        assert not any(browser.execute_script(event, key, held) for held in ("altKey", "ctrlKey", "metaKey"))
    assert choices() == [] and browser.execute_script(event, "ArrowLeft", "shiftKey")
    browser.execute_script("find('right').focus()")
    ActionChains(browser).send_keys(" ").perform()
    assert choices() == ["left", "right"]
    click(browser, "left")
    ActionChains(browser).send_keys(" ").perform()
    assert choices() == ["left", "right", "left", "same"]


def saved(browser: Any, folder: Path) -> Path:
    """Wait for the file that the browser saves."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20).until(lambda _: next(iter(folder.glob("votes-*.json")), None))
