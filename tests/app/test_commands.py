"""The page's commands, pasted into bash, ask for what the page has drawn."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("gradio")

from ghibli.app.commands import draw_command, restyle_command
from ghibli.app.session import AppSession
from ghibli.app.settings import Settings
from ghibli.cli import images
from ghibli.cli.main import app
from ghibli.inference import photos, restyle
from ghibli.inference.photos import Photo
from ghibli.inference.request import WAYS, ControlOptions, RestyleOptions

SIDE = 128
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0()[]\\"), min_size=1, max_size=20)
NUMBERS = st.floats(0, 30, allow_nan=False)
CONTROLS = [
    None, ControlOptions("canny", "demo/control"), ControlOptions("depth", "somebody/it's", 0.7),
]  # fmt: skip
ODD = ["-x", "--help", "a (1) $HOME", "~/it", "naïve ジブリ", "'", '"', "a=b", "x:0.5"]


@st.composite
def on_the_page(draw: st.DrawFn) -> Settings:
    """What a visitor may have typed and chosen."""
    runs = draw(st.sampled_from([[], ["outputs/train/a (1)"], ["outputs/it's", "outputs/ジ=2,x"]]))
    return Settings(
        runs, "a " + draw(TEXTS | st.sampled_from(ODD)), draw(TEXTS | st.sampled_from(["", *ODD])),
        draw(st.sampled_from(["ddim", "euler_a"])), draw(NUMBERS), draw(st.integers(5, 40)),
        draw(st.integers(0, 2**32 - 2)), draw(st.just(1.0) | NUMBERS) if runs else 1.0, False,
        draw(st.sampled_from([1.0, 1.5, 2.0])),
    )  # fmt: skip


def pasted(command: str) -> list[str]:
    """The arguments that a program gets when the command is pasted into bash."""
    stub = "ghibli() { printf '%s\\0' \"$@\"; }\n"
    done = subprocess.run(["bash", "-c", stub + command], capture_output=True, check=True)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


@pytest.fixture(scope="module")
def asked() -> Any:
    """What the commands ask for, instead of an image: sources, and the request or the options."""
    found = SimpleNamespace(sources=[], request=None, options=None, photos=[])
    config = SimpleNamespace(
        model=SimpleNamespace(resolution=SIDE, path="demo"), data=SimpleNamespace(style="")
    )

    def load(sources: list[str]) -> SimpleNamespace:
        found.sources = sources
        return SimpleNamespace(
            config=config, guidance=3.0, names=sources, weights=[1.0], at=lambda scale: None
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        patch.setattr(images, "named_sources", lambda sources: sources)
        patch.setattr(images, "load", load)
        patch.setattr(
            images, "write_generated", lambda model, request, *_, **__: vars(found).update(request=request)
        )
        patch.setattr(photos, "find_photos", lambda paths, prompt, style: [Photo(p, prompt) for p in paths])

        def restyle_all(model: Any, found_photos: list[Photo], options: RestyleOptions, folder: Path) -> None:
            vars(found).update(photos=found_photos, options=options)
            raise KeyboardInterrupt  # before anything is written

        patch.setattr(restyle, "restyle_all", restyle_all)
        yield found


def sources_of(page: Settings) -> list[str]:
    """By the page, which was opened on a base that conf/ names."""
    model = SimpleNamespace(config=SimpleNamespace(model=SimpleNamespace(path="a base/it's")))
    return AppSession([]).sources(page, model)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(page=on_the_page())
def test_a_drawn_image(page: Settings, asked: Any) -> None:
    words = pasted(draw_command(page, sources_of(page)))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (words, done.output, done.exception)
    assert asked.request == replace(page.request(SIDE), batch=4)
    assert asked.sources == (page.runs or ["model.path=a base/it's"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    page=on_the_page(), name=st.sampled_from(ODD),
    structure=st.tuples(st.floats(0.3, 1), st.sampled_from(WAYS), st.sampled_from(CONTROLS)),
)  # fmt: skip
def test_a_restyled_photo(page: Settings, name: str, structure: tuple[Any, ...], asked: Any) -> None:
    page = replace(page, sampler="ddim")  # with which the command by itself takes the other way
    wanted = page.restyle_options(structure[0], SIDE, *structure[1:])
    CliRunner().invoke(app, pasted(restyle_command(page, Path(f"{name}.jpg"), wanted, sources_of(page))))
    assert asked.options == wanted and asked.sources == (page.runs or ["model.path=a base/it's"])
    assert asked.photos == [Photo(Path(f"{name}.jpg"), page.prompt)]
