"""Restyling on the page: the same images as from the command it shows, with a mask and a ControlNet too."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.page_requests import NO_STRUCTURE, RUN
from PIL import Image
from typer.testing import CliRunner

from ghibli.cli.main import app as command_line
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.runtime.errors import UserError

gradio = pytest.importorskip("gradio")
from gradio import processing_utils  # noqa: E402

from ghibli.app import session  # noqa: E402  (needs gradio)
from ghibli.app.restyling import OWN_IMAGE, Restyling  # noqa: E402
from ghibli.app.session import AppSession  # noqa: E402

REQUEST = gradio.Request(session_hash="somebody")
SETTINGS = ["a lake", "", "ddim", 3.0, 4, 1, 1.0, False]


@pytest.fixture
def photo(outside: Path) -> Path:
    """A photo, with a mask of its size and an image of its shape beside it."""
    draw(compose(EVALUATION_SEEDS.start), "photo", 96).save(outside / "photo.png")
    half = Image.new("L", (96, 96))
    half.paste(255, (0, 0, 48, 96))
    half.save(outside / "half.png")
    draw(compose(EVALUATION_SEEDS.start + 1), "photo", 64).save(outside / "other.png")
    return outside / "photo.png"


def restyled(session: AppSession, photo: Path, strength: float, way: str, *structure: Any) -> list[Any]:
    silent: Any = lambda *a, **k: None  # noqa: E731
    values = [[RUN], str(photo), *SETTINGS, strength, way, *structure]
    return Restyling(session).restyle(REQUEST, silent, *values)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.parametrize(
    ("way", "mask", "control", "image"),
    [
        ("inversion", False, "", None),
        ("img2img", True, "canny", None),
        ("inversion", True, OWN_IMAGE, "other.png"),
    ],
)
def test_the_command_makes_the_same(
    app_session: AppSession, photo: Path, tmp_path: Path, way: str, mask: bool, control: str, image: str
) -> None:
    weights = "demo/control" if control else None
    seen = None if image is None else str(photo.with_name(image))
    given = [str(photo.with_name("half.png")) if mask else None, control, weights, 0.8, seen]
    before, base, trained, status, *commands = restyled(app_session, photo, 0.5, way, *given)
    assert before.size == (96, 96) and status.endswith(" s"), status
    for name, command, drawn in zip(("base", "trained"), commands, (base, trained), strict=True):
        words = shlex.split(command)
        assert ("--mask" in words, "--control" in words) == (mask, bool(control))
        result = CliRunner().invoke(command_line, [*words[1:], "--to", str(tmp_path / name)])
        assert result.exit_code == 0, (command, result.output, result.exception)
        with Image.open(tmp_path / name / "photo.png") as opened:
            assert np.abs(pixels(opened) - pixels(drawn)).max() <= 1
            theirs = opened.info["ghibli"]
        assert drawn.info["ghibli"] == theirs or mask or image  # which the file names besides
    assert np.abs(pixels(base) - pixels(trained)).max() > 2
    if mask:
        kept = pixels(Image.open(photo).resize(trained.size, Image.Resampling.LANCZOS))
        right = slice(trained.width * 3 // 4, None)
        assert np.abs(kept - pixels(trained))[:, right].max() <= 1
    newest = app_session.history.of("somebody")[:2]
    assert [one.command for one in newest] == commands[::-1]


def test_settings_come_back_from_a_restyled_image(
    app_session: AppSession, photo: Path, tmp_path: Path
) -> None:
    from ghibli.app.drawing import Drawing

    *_, trained, _, _, _ = restyled(app_session, photo, 0.5, "img2img", *NO_STRUCTURE)
    (tmp_path / "page.png").write_bytes(processing_utils.encode_pil_to_bytes(trained))
    now = [[], "x", "", "unipc", 7.5, 30, 0, 0.5, False, 1.5]
    found = Drawing(app_session).settings_of(str(tmp_path / "page.png"), *now)
    assert found == [[RUN], f"a lake{app_session.model_of([RUN]).config.data.style}", *SETTINGS[1:], 1.5]


@pytest.mark.parametrize("way", ["img2img", "inversion"])
def test_the_bar_counts_every_step(app_session: AppSession, photo: Path, way: str) -> None:
    seen: list[tuple[int, int]] = []
    values = [[RUN], str(photo), *SETTINGS, 0.5, way, *NO_STRUCTURE]
    Restyling(app_session).restyle(REQUEST, lambda done, **_: seen.append(done), *values)
    total = {"img2img": 2, "inversion": 4}[way]
    assert seen == [(step, total) for step in range(1, total + 1)] * 2


@pytest.mark.parametrize(
    ("structure", "words"),
    [
        (["other.png", "", None, 1, None],
         "the mask has 64x64 px and the photo 96x96: a mask has its photo's size"),
        (["gone.png", "", None, 1, None], "the mask was removed after an hour: choose it again"),
        ([None, "canny", None, 1, None], "--control canny needs --control-model"),
        ([None, OWN_IMAGE, "demo/control", 1, None], "give the image that the ControlNet is to see"),
        ([None, "canny", "no/such/folder", 1, None], "--control-model no/such/folder: no such folder"),
        ([None, "canny", "demo/control", float("nan"), None], "the ControlNet's scale must be a number"),
        ([None, "sketch", "demo/control", 1, None], "sketch is unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_and_the_frames_stay(
    outside: Path, photo: Path, structure: list[Any], words: str
) -> None:
    session = AppSession(["model=demo", "data=demo"], is_private=True)
    given = [str(photo.with_name(one)) if str(one).endswith(".png") else one for one in structure]
    answer = restyled(session, photo, 0.5, "img2img", *given)
    assert words in answer[3], answer[3]
    assert len(answer) == 6 and all(one == gradio.skip() for one in (*answer[:3], *answer[4:]))


def test_a_photo_that_the_page_has_removed_is_named(app_session: AppSession, outside: Path) -> None:
    """It deletes uploads after an hour, while the visitor's tab still shows them."""
    gone, told = outside / "gone.png", "the photo was removed after an hour: choose it again"
    assert restyled(app_session, gone, 0.5, "img2img", *NO_STRUCTURE)[3] == f"**{told}**"
    with pytest.raises(gradio.Error, match=told):
        Restyling(app_session).preview(str(gone))


def test_a_control_image_is_read_as_its_photo_is(
    app_session: AppSession, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reduced, so that the page's limit of memory holds: a JPEG at full size takes many times as much."""
    Image.new("RGB", (4800, 2400), "teal").save(outside / "large.jpg")
    seen: list[Any] = []

    def load_control(*_: Any) -> Any:
        def see(own: Any) -> None:
            seen.append(own)
            raise UserError("that will do")

        return see

    monkeypatch.setattr(session, "load_control", load_control)
    large = outside / "large.jpg"
    answer = restyled(app_session, large, 0.5, "img2img", None, OWN_IMAGE, "demo/control", 1, str(large))
    assert answer[3] == "**that will do**"
    assert [one.size for one in seen] == [(1200, 600)]


def test_visitors_from_elsewhere_name_no_weights(app_session: AppSession, photo: Path) -> None:
    """They could have this machine download or read anything."""
    assert not app_session.is_private
    answer = restyled(app_session, photo, 0.5, "img2img", None, "canny", "somebody/else", 1, None)
    assert "on a page that others can reach, the ControlNet is one of demo/control" in answer[3]
