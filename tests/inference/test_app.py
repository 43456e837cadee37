"""`ghibli app`, as people use it: in a browser, two at once, with files that are not photos."""

import math
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browsers import new_browser
from helpers.page_requests import call, index_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

import train
from ghibli.cli.main import app as command_line
from ghibli.images.grid import to_image
from ghibli.inference.generate import Count, generate_images
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ImageRequest
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

gradio = pytest.importorskip("gradio")
from gradio import processing_utils  # noqa: E402

from ghibli.inference.app import page, session  # noqa: E402  (needs gradio)
from ghibli.inference.app.page import serve  # noqa: E402
from ghibli.inference.app.session import AppSession  # noqa: E402

QUICK = ("model.resolution=128", "trainer.max_epochs=1", "optimizer.lr=5e-3", "lora.rank=4")
RUN = "outputs/train/run"
STEPS = 2
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def outside(make_config: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the page is served, with a finished run below outputs/."""
    folder = tmp_path_factory.mktemp("app")
    train.run(make_config(*QUICK), RunDir(folder / RUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def app_session(outside: Path) -> AppSession:
    return AppSession(["model=demo", "data=demo"])


@pytest.fixture(scope="module")
def address(outside: Path) -> Iterator[str]:
    """The address of the page, while it is served."""
    page, address = serve(["model=demo", "data=demo"], "127.0.0.1", None)
    yield address
    page.close()


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
        except session.Stopped:
            stopped_half_way.append(f"{label}, seed {request.seed}")
            raise

    monkeypatch.setattr(session, "generate_images", recorded)
    return stopped_half_way


# Behind the page


@pytest.mark.slow
def test_only_what_was_trained_is_offered(app_session: AppSession, outside: Path) -> None:
    other = RunDir(outside / "outputs/train/other")
    other.adapter.mkdir(parents=True)
    other.status.update(state="failed", gain=0.1)
    assert list(app_session.runs()) == [RUN]
    other.adapter.rmdir()
    other.status.update(state="finished")  # finetune=none: it only measured the base
    assert list(app_session.runs()) == [RUN]
    other.status.path.unlink()
    ((label, value),) = app_session.run_choices()
    assert value == RUN and re.fullmatch(r"run, [\d.]+ % (better|worse) than the base", label)
    for strange in ("/etc", "../run", f"{RUN}/"):
        with pytest.raises(UserError, match="is no longer a finished run: reload the page"):
            app_session.model_of([strange])


@pytest.mark.slow
def test_a_stop_ends_what_is_drawn_and_nothing_else(app_session: AppSession) -> None:
    request = gradio.Request(session_hash="somebody")
    app_session.stop(request)  # nothing is drawn yet

    def in_turn() -> None:
        with app_session.turn("somebody", lambda *a, **k: None) as count, count("drawing") as on_progress:
            on_progress(1, 3)
            app_session.leave(gradio.Request(session_hash="somebody else"))
            on_progress(2, 3)
            app_session.leave(request)
            on_progress(3, 3)

    with pytest.raises(session.Stopped):
        in_turn()
    assert not app_session._lock.locked() and not app_session._stops


@pytest.mark.parametrize(
    ("name", "gain", "label"),
    [
        ("2026-11-28_21-40-07", 0.281, "2026-11-28 21:40, 28.1 % better than the base"),
        ("run", -1.28, "run, 128.0 % worse than the base"),
        ("run", None, "run"),
        ("run", math.nan, "run"),
        ("lora.rank=16,optimizer.lr=0.001,loss.guidance=7.5,seed=3", 0.0,
         "lora.rank=16,optimiz ... .guidance=7.5,seed=3, 0.0 % better than the base"),
    ],
)  # fmt: skip
def test_a_run_has_a_short_name_and_its_gain_in_words(name: str, gain: Any, label: str) -> None:
    assert session.run_label(RunDir(Path("outputs/train") / name), gain) == label
    assert session.with_numbers(["a", "b", "a"]) == ["a", "b", "a (2)"]


def test_what_the_visitor_chose_stays_when_the_run_changes(app_session: AppSession) -> None:
    """The guidance that suits the new run replaces the one that suited the old, and no other."""
    usual = load_model([RUN], []).guidance
    first = app_session.on_runs_changed([RUN], 7.5, 7.5)
    assert first[0]["value"] == first[1] == usual
    assert "value" not in app_session.on_runs_changed([], 3.0, usual)[0]
    assert app_session.on_runs_changed([], usual, usual)[0]["value"] == 7.5


def test_settings_come_back_from_a_png(app_session: AppSession, tmp_path: Path) -> None:
    """From the page's own image and from generate's; what is no such file is named."""
    page_now = [[], "x", "", "ddim", 7.5, 30, 0, 1, False]
    values = [[RUN], "a (lake:1.2)", "fog", "euler_a", 3.0, STEPS, 9, 0.5, False]
    request = gradio.Request(session_hash="somebody")
    _, trained, _, command = app_session.draw(request, lambda *a, **k: None, *values)
    file = tmp_path / "page.png"
    file.write_bytes(processing_utils.encode_pil_to_bytes(trained))
    assert app_session.settings_of(str(file), *page_now) == values
    assert app_session.settings_of(None, *page_now) == page_now
    words = shlex.split(command)
    assert words[:3] == ["ghibli", "generate", RUN]
    result = CliRunner().invoke(command_line, [*words[1:], "--to", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "out/000.png") as opened:
        assert np.abs(np.asarray(opened, float) - np.asarray(trained, float)).max() <= 1
    assert app_session.settings_of(str(tmp_path / "out/000.png"), *page_now) == values
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    for stored in ('{"prompts": [5]}', '{"sampler": 5}', '{"steps": "many"}', "[]", "{"):
        info = PngInfo()
        info.add_text("ghibli", stored)
        Image.new("RGB", (8, 8)).save(tmp_path / "forged.png", pnginfo=info)
        with pytest.raises(gradio.Error):
            app_session.settings_of(str(tmp_path / "forged.png"), *page_now)
    with pytest.raises(gradio.Error, match="that file holds no settings"):
        app_session.settings_of(str(tmp_path / "other.png"), *page_now)


def test_a_port_that_is_taken(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    result = CliRunner().invoke(command_line, ["app", "model=demo", "data=demo", "--port", port])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"--port {port} on 127.0.0.1 cannot be used")


# Over the wire


def test_no_file_of_this_machine_is_shown(address: str, outside: Path) -> None:
    secret = outside / RUN / "config.yaml"
    for path in (secret, "/etc/hostname"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}gradio_api/file={path}")
        assert refused.value.code in (403, 404)
    grid = next((outside / RUN / "samples").glob("*.png"))
    photo = {"path": str(grid), "meta": {"_type": "gradio.FileData"}}
    settings = ["a lake", "", "ddim", 1, 2, 0, 1, False, 0.5, "img2img"]
    event = call(address, index_of(address, "restyle"), [[], photo, *settings])
    assert not event["success"] and "data" not in event["output"]


def test_a_run_that_is_not_offered_is_refused(address: str) -> None:
    settings = ["a lake", "", "ddim", 1, 2, 0, 1, False]
    event = call(address, index_of(address, "draw"), [["/etc"], *settings])
    assert not event["success"]
    event = call(address, index_of(address, "draw"), [[RUN], *settings])
    assert event["success"]


def test_a_photo_that_is_too_large_is_refused(address: str) -> None:
    limit = int(page.UPLOAD_LIMIT.removesuffix("mb")) * 10**6
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
    body = head + bytes(limit + 2 * 10**6) + b"\r\n--x--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{address}gradio_api/upload", body, form))
    assert refused.value.code == 413


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = new_browser(width=1280, height=1000)
    yield driver
    driver.quit()


@pytest.fixture
def tab(browser: Any, address: str) -> Any:
    """The page, freshly opened, with few steps set."""
    return opened(browser, address)


def opened(browser: Any, address: str) -> Any:
    browser.get(address)
    wait(lambda: RUN in browser.page_source and one(browser, "#draw"))
    fill(browser, "#steps input[type=number]", STEPS)
    return browser


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
    found = next(b for b in browser.find_elements("css selector", "button[role=tab]") if b.text == label)
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
    wide = load_model([RUN], []).config.model.resolution / 2**0.5
    base, trained = shown(tab, "restyled-base"), shown(tab, "restyled-trained")
    assert base.shape == trained.shape == (round(wide / 8) * 8, round(2 * wide / 8) * 8, 3)
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
