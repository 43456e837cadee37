"""`ghibli app`, as people use it: in a browser, two at once, with files that are not photos."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browsers import click, fill, one, open_tab, said, shown, wait, words
from helpers.page_requests import RUN
from PIL import Image

from ghibli.images.grid import to_image
from ghibli.inference.generate import Count, generate_images
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ImageRequest

pytest.importorskip("gradio")
from ghibli.app import drawing
from ghibli.app.answers import Stopped

STEPS = 2


def expected(loaded: LoadedModel, seed: int, scale: float) -> np.ndarray:
    side = loaded.config.model.resolution
    prompt = loaded.config.sample.prompts[0]
    request = ImageRequest([prompt], "ddim", loaded.guidance, STEPS, seed, (side, side), scale=scale)
    return np.asarray(to_image(generate_images(loaded, request)[0]), float)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of what was stopped half-way, with the page's labels, filled while it generates."""
    stopped_half_way: list[str] = []

    def recorded(loaded: LoadedModel, request: ImageRequest, label: str, count: Count) -> Any:
        try:
            return generate_images(loaded, request, label, count)
        except Stopped:
            stopped_half_way.append(f"{label}, seed {request.seed}")
            raise

    monkeypatch.setattr(drawing, "generate_images", recorded)
    return stopped_half_way


@pytest.fixture
def tab(browser: Any, address: str) -> Any:
    """The page, freshly opened, with few steps set."""
    return opened(browser, address)


def opened(browser: Any, address: str) -> Any:
    browser.get(address)
    wait(lambda: RUN in browser.page_source and one(browser, "#draw"))
    fill(browser, "#steps input[type=number]", STEPS)
    return browser


def test_base_and_adapter_side_by_side(tab: Any) -> None:
    """The same images as from `ghibli generate`; no request to other hosts, no error in the console."""
    fill(tab, "#seed input", 3)
    click(tab, "#draw")
    assert re.search(r"\d\.\d s$", words(tab, "drawn"))
    loaded = load_model([RUN], [])
    for name, scale in (("base", 0.0), ("trained", 1.0)):
        assert np.abs(shown(tab, name) - expected(loaded, 3, scale)).max() <= 1
    assert np.abs(shown(tab, "base") - shown(tab, "trained")).max() > 20
    sources = tab.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    host = tab.current_url.split("/")[2]
    assert [url for url in sources if url.startswith("http") and url.split("/")[2] != host] == []
    bad = [line for line in tab.get_log("browser") if line["level"] == "SEVERE"]
    assert bad == []


def test_a_photo_is_restyled(tab: Any, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    blocks = np.random.default_rng(0).integers(0, 255, (3, 6, 3), np.uint8)
    Image.fromarray(blocks).resize((120, 60)).save(photo)
    fill(tab, "#steps input[type=number]", 8)
    open_tab(tab, "Restyle a photo")
    one(tab, "#upload input[type=file]").send_keys(str(photo))
    assert shown(tab, "photo").shape == (60, 120, 3)
    click(tab, "#restyle")
    assert "describe what is on the photo" in words(tab, "restyled")
    assert "Error" not in tab.find_element("css selector", "body").text  # the frames stay as they are
    fill(tab, "#what textarea", "a lake")
    click(tab, "#restyle")
    wait(lambda: re.search(r"\d\.\d s$", words(tab, "restyled")))
    base, trained = shown(tab, "restyled-base"), shown(tab, "restyled-trained")
    assert base.shape == trained.shape == (64, 128, 3)  # no side is below 64
    assert np.abs(base - trained).max() > 2


@pytest.mark.slow
def test_files_that_are_no_photos(tab: Any, tmp_path: Path) -> None:
    """A text file is refused; an image of 100 megapixels is reduced."""
    text, large = tmp_path / "text.jpg", tmp_path / "large.png"
    text.write_text("no image")
    Image.new("L", (10_000, 10_000), 200).save(large)
    open_tab(tab, "Restyle a photo")
    one(tab, "#upload input[type=file]").send_keys(str(text))
    assert "it is not an image, despite its name" in said(tab)
    opened(tab, tab.current_url)
    open_tab(tab, "Restyle a photo")
    one(tab, "#upload input[type=file]").send_keys(str(large))
    assert shown(tab, "photo").shape == (1200, 1200, 3)
    fill(tab, "#what textarea", "a lake")
    click(tab, "#restyle")
    words(tab, "restyled")
    side = load_model([RUN], []).config.model.resolution
    assert shown(tab, "restyled-trained").shape == (side, side, 3)


@pytest.mark.slow
def test_two_people_at_once_and_a_closed_tab(browser: Any, address: str, stopped: list[str]) -> None:
    """Each gets their own image; the request of a visitor who left is stopped."""
    first = opened(browser, address).current_window_handle
    fill(browser, "#steps input[type=number]", 100)
    click(browser, "#draw")
    wait(lambda: "base" in (one(browser, "#base .wrap") or one(browser, "#base")).text)
    browser.switch_to.new_window("tab")
    for seed in (5, 6):
        if seed == 6:
            browser.switch_to.new_window("tab")
        opened(browser, address)
        fill(browser, "#seed input", seed)
        click(browser, "#draw")
    handles = [handle for handle in browser.window_handles if handle != first]
    browser.switch_to.window(first)
    browser.close()
    loaded = load_model([RUN], [])
    seeds = []
    for handle in handles:
        browser.switch_to.window(handle)
        words(browser, "drawn")
        found = shown(browser, "trained")
        seeds += [seed for seed in (5, 6) if np.abs(found - expected(loaded, seed, 1.0)).max() <= 1]
    assert sorted(seeds) == [5, 6]
    assert stopped == ["base, seed 0"]
    for handle in handles[1:]:
        browser.switch_to.window(handle)
        browser.close()
    browser.switch_to.window(handles[0])


def test_cancel(tab: Any, stopped: list[str]) -> None:
    fill(tab, "#steps input[type=number]", 100)
    click(tab, "#draw")
    wait(lambda: re.search(r"\d+/100", one(tab, "#base").text))
    click(tab, "#cancel")
    wait(lambda: stopped and not re.search(r"\d+/100", one(tab, "#base").text))
    assert stopped == ["base, seed 0"]
    fill(tab, "#steps input[type=number]", STEPS)
    click(tab, "#draw")
    words(tab, "drawn")
    assert shown(tab, "trained").shape[2] == 3


def test_a_grid_over_two_settings(tab: Any) -> None:
    open_tab(tab, "X/Y grid")
    fill(tab, "#x-values textarea, #x-values input", "1, 3")
    fill(tab, "#y-values textarea, #y-values input", "1, 2")
    click(tab, "#draw-grid")
    wait(lambda: re.search(r"\d\.\d s$", words(tab, "grid-drawn")))
    side = load_model([RUN], []).config.model.resolution
    height, width = shown(tab, "grid").shape[:2]
    assert min(height, width) > 2 * side
    command = wait(lambda: one(tab, "#grid-command textarea").get_attribute("value"))
    assert command.endswith("--grid 'guidance=1, 3' --grid 'steps=1, 2'")


def test_a_prompt_that_cannot_be_read_is_told_below_the_images(tab: Any) -> None:
    """The message stays, and a second try works."""
    fill(tab, "#prompt textarea", "a (lake")
    click(tab, "#draw")
    assert "has a ( without its partner" in words(tab, "drawn")
    fill(tab, "#prompt textarea", "a (lake:1.2)")
    click(tab, "#draw")
    wait(lambda: re.search(r"\d\.\d s$", words(tab, "drawn")))
    assert "--prompt 'a (lake:1.2)'" in wait(
        lambda: one(tab, "#draw-command textarea").get_attribute("value")
    )


@pytest.mark.slow
def test_it_fits_a_phone(tab: Any) -> None:
    size = {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    tab.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened(tab, tab.current_url)
    wide, room = tab.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    height = "return document.querySelector(arguments[0]).getBoundingClientRect().top"
    draw, runs = (tab.execute_script(height, name) for name in ("#draw", "#runs"))
    tab.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= room and draw < min(runs, 600)  # the button is on the first screen


def test_the_history_gives_command_and_settings_back(tab: Any) -> None:
    """A reload forgets nothing, and what was drawn stands first."""
    fill(tab, "#seed input", 77)
    fill(tab, "#prompt textarea", "a (lake:1.2)")
    click(tab, "#draw")
    wait(lambda: re.search(r"\d\.\d s$", words(tab, "drawn")))
    command = one(tab, "#draw-command textarea").get_attribute("value")
    opened(tab, tab.current_url)
    open_tab(tab, "History")
    wait(lambda: one(tab, "#history img"))
    tab.execute_script("arguments[0].click()", one(tab, "#history button.thumbnail-item"))
    wait(lambda: one(tab, "#history-command textarea").get_attribute("value") == command)
    click(tab, "#history-settings")
    wait(lambda: one(tab, "#seed input").get_attribute("value") == "77")
    open_tab(tab, "Draw")
    assert one(tab, "#prompt textarea").get_attribute("value") == "a (lake:1.2)"
    assert one(tab, "#steps input[type=number]").get_attribute("value") == str(STEPS)


def test_a_mask_of_another_size_is_told_on_the_page(tab: Any, tmp_path: Path) -> None:
    for name, size in (("photo.png", (96, 96)), ("mask.png", (64, 64))):
        Image.new("RGB", size, "teal").save(tmp_path / name)
    open_tab(tab, "Restyle a photo")
    one(tab, "#upload input[type=file]").send_keys(str(tmp_path / "photo.png"))
    assert shown(tab, "photo").shape == (96, 96, 3)
    fill(tab, "#what textarea", "a lake")
    click(tab, "#structure button")
    wait(lambda: one(tab, "#mask input[type=file]")).send_keys(str(tmp_path / "mask.png"))
    wait(lambda: "mask.png" in one(tab, "#mask").text.replace("\n", ""))  # gradio cuts long names in two
    click(tab, "#restyle")
    told = "the mask has 64x64 px and the photo 96x96: a mask has its photo's size"
    wait(lambda: told in words(tab, "restyled"))
