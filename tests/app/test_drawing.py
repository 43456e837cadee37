"""Drawing on the page: what a visitor chose stays, and settings and commands make the same image again."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.page_requests import RUN
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from ghibli.cli.main import app as command_line
from ghibli.inference.load import LoadedModel, load_model
from ghibli.inference.request import ImageRequest

gradio = pytest.importorskip("gradio")
from gradio import processing_utils  # noqa: E402

from ghibli.app.drawing import Drawing  # noqa: E402  (needs gradio)
from ghibli.app.page import page  # noqa: E402
from ghibli.app.settings import text_of  # noqa: E402

STEPS = 2


def test_what_the_visitor_chose_stays_when_the_run_changes(app_session: Any) -> None:
    """The guidance that suits the new run replaces the one that suited the old, and no other."""
    drawing = Drawing(app_session)
    usual = load_model([RUN], []).guidance
    handlers = page(app_session, None).fns.values()
    inputs = next(one.inputs for one in handlers if one.name == "on_runs_changed")
    first = drawing.on_runs_changed(*(one.value for one in inputs))  # as the page opens
    assert inputs[0].value == [RUN]
    assert first[0]["value"] == first[1] == usual
    assert "value" not in drawing.on_runs_changed([], 3.0, usual)[0]
    assert drawing.on_runs_changed([], usual, usual)[0]["value"] == 7.5


def test_the_slider_reaches_the_guidance_of_a_run(app_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan may find 56, and a training at 30 suits 41: gradio refuses to draw beyond a slider's end."""
    handler = next(one for one in page(app_session, None).fns.values() if one.name == "on_runs_changed")
    slider, drawing = handler.outputs[0], Drawing(app_session)

    def after(update: dict[str, Any]) -> Any:
        """The slider as gradio makes it anew from an update."""
        changed = {key: value for key, value in update.items() if key != "__type__"}
        return type(slider)(**(slider.constructor_args | changed | {"render": False}))

    for usual, highest in ((55.6, 56), (12.0, 30)):
        monkeypatch.setattr(LoadedModel, "guidance", usual)
        assert after(drawing.on_runs_changed([RUN], 7.5, 7.5)[0]).preprocess(usual) == usual
        kept = drawing.on_runs_changed([RUN], 44.5, 7.5)[0]
        assert "value" not in kept and after(kept).preprocess(44.5) == 44.5
        assert after(drawing.on_runs_changed([RUN], 3.0, 7.5)[0]).maximum == highest


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The messages that pop up on the page."""
    messages: list[str] = []
    for name in ("Info", "Warning"):
        monkeypatch.setattr(gradio, name, messages.append)
    return messages


def test_what_cannot_be_taken_from_an_image_is_named(
    app_session: Any, told: list[str], tmp_path: Path
) -> None:
    """The image is of the base here, of other weights, of another size: the same settings draw another."""
    drawing, page_now = Drawing(app_session), [[RUN], "x", "", "ddim", 7.5, 30, 0, 1, False, 1]
    model, asked = (
        load_model([], ["model=demo", "data=demo"]),
        ImageRequest(["a"], "ddim", 3.0, 5, 7, (128, 64)),
    )
    side = model.config.model.resolution
    text = replace(asked, size=(side, side)), replace(asked, scale=2.0), replace(asked, guidance=40.0)
    own = [json.loads(text_of(one, model)["ghibli"]) for one in text]
    gone = {"adapters": [RUN, "outputs/<b>"], "weights": [0.5, 1.0]}
    taken = []
    for stored in (
        own[0],
        own[1],
        own[2] | gone | {"base": "other/base"},
        own[0] | {"weights": 3, "size": 3},
    ):
        info = PngInfo()
        info.add_text("ghibli", json.dumps(stored))
        Image.new("RGB", (8, 8)).save(tmp_path / "image.png", pnginfo=info)
        taken.append(drawing.settings_of(str(tmp_path / "image.png"), *page_now))
    assert [one[0] for one in taken] == [[], [], [RUN], []]
    assert [(one[4], one[7]) for one in taken] == [(3.0, 1.0), (3.0, 1), (7.5, 1.0), (3.0, 1.0)]
    size, of_run = (f"its size: the page draws {each}x{each} px" for each in (side, 64))
    assert told == [
        "settings taken from the image",
        f"taken from the image, except for {size}; scale 2, which is not from 0 to 1.5",
        "taken from the image, except for outputs/&lt;b&gt;, which is no finished run here; "
        f"the weight 0.5 of {RUN}; its base other/base; {of_run}; guidance 40, which is not from 1 to 30",
        f"taken from the image, except for {size}",
    ]


def test_settings_come_back_from_a_png(app_session: Any, told: list[str], tmp_path: Path) -> None:
    """From the page's own image and from generate's; what is no such file is named."""
    drawing = Drawing(app_session)
    page_now = [[], "x", "", "ddim", 7.5, 30, 0, 1, False, 1]
    values = [[RUN], "a (lake:1.2)", "fog", "euler_a", 3.0, STEPS, 9, 0.5, False, 1.25]
    request = gradio.Request(session_hash="somebody")
    base, trained, _, base_command, command = drawing.draw(request, lambda *a, **k: None, *values)
    file = tmp_path / "page.png"
    file.write_bytes(processing_utils.encode_pil_to_bytes(trained))
    assert drawing.settings_of(str(file), *page_now) == values
    assert told == ["settings taken from the image"]
    assert drawing.settings_of(None, *page_now) == page_now
    for line in (command, base_command):
        words = shlex.split(line)
        assert words[:3] == ["ghibli", "generate", RUN]
        result = CliRunner().invoke(command_line, [*words[1:], "--to", str(tmp_path / "out")])
        assert result.exit_code == 0, result.output
    for name, image in (("000", trained), ("001", base)):
        with Image.open(tmp_path / f"out/{name}.png") as opened:
            assert np.abs(np.asarray(opened, float) - np.asarray(image, float)).max() <= 1
    drawn = app_session.history.of("somebody")
    assert [(one.image, one.command) for one in drawn] == [(trained, command), (base, base_command)]
    assert drawing.settings_of(str(tmp_path / "out/000.png"), *page_now) == values
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    for stored in ('{"prompts": [5]}', '{"sampler": 5}', '{"steps": "many"}', "[]", "{"):
        info = PngInfo()
        info.add_text("ghibli", stored)
        Image.new("RGB", (8, 8)).save(tmp_path / "forged.png", pnginfo=info)
        with pytest.raises(gradio.Error):
            drawing.settings_of(str(tmp_path / "forged.png"), *page_now)
    with pytest.raises(gradio.Error, match="that file holds no settings"):
        drawing.settings_of(str(tmp_path / "other.png"), *page_now)


@pytest.mark.parametrize("runs", [[1], ["/etc"], 5])
def test_an_image_chooses_runs_by_its_adapters_alone(
    app_session: Any, told: list[str], tmp_path: Path, runs: Any
) -> None:
    """An entry `runs`, which no image of ours has, is not looked at: it could name any path."""
    info = PngInfo()
    info.add_text("ghibli", json.dumps({"runs": runs, "steps": 3}))
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", pnginfo=info)
    page_now = [[RUN], "x", "", "ddim", 7.5, 30, 0, 1, False, 1]
    taken = Drawing(app_session).settings_of(str(tmp_path / "image.png"), *page_now)
    assert taken == [[RUN], "x", "", "ddim", 7.5, 3, 0, 1, False, 1]
    assert told == ["settings taken from the image"]
