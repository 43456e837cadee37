"""The model that all visitors of the page share, and what they drew."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.page_requests import RUN
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ghibli.inference.load import load_model
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError

gradio = pytest.importorskip("gradio")
from ghibli.app.answers import Stopped  # noqa: E402  (needs gradio)
from ghibli.app.history import MOST, History  # noqa: E402


@pytest.mark.slow
def test_only_what_was_trained_is_offered(app_session: Any, outside: Path) -> None:
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


def test_a_run_that_was_trained_on_is_loaded_anew(app_session: Any, outside: Path) -> None:
    """Under the same name its weights are others; without a change they are not loaded twice."""
    before = app_session.model_of([RUN])
    assert app_session.model_of([RUN]) is before
    file = RunDir(outside / RUN).adapter / "pytorch_lora_weights.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, adapter_metadata(file))
    found = app_session.model_of([RUN])
    ours, theirs, old = (model.at(1).unet.state_dict() for model in (found, load_model([RUN], []), before))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not all(torch.equal(ours[name], old[name]) for name in old)
    assert app_session.model_of([RUN]) is found


def adapter_metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


@pytest.mark.slow
def test_a_stop_ends_what_is_drawn_and_nothing_else(app_session: Any) -> None:
    request = gradio.Request(session_hash="somebody")
    app_session.stop(request)  # nothing is drawn yet

    def in_turn() -> None:
        with app_session.turn("somebody", lambda *a, **k: None) as count, count("drawing") as on_progress:
            on_progress(1, 3)
            app_session.leave(gradio.Request(session_hash="somebody else"))
            on_progress(2, 3)
            app_session.leave(request)
            on_progress(3, 3)

    with pytest.raises(Stopped):
        in_turn()
    assert not app_session.lock.locked() and not app_session._stops


@pytest.mark.parametrize("shared", [False, True])
def test_whose_history_it_is(shared: bool) -> None:
    """Of a page that others can reach each visitor has one, until the tab is closed."""
    history, image = History(shared), Image.new("RGB", (8, 8))
    history.add("a", [(image, "base", "ghibli generate 1"), (image, "trained", "ghibli generate 2")])
    history.add("b", [(image, "base", "ghibli generate 3")])
    mine = [one.command[-1] for one in history.of("a")]
    assert mine == (["3", "2", "1"] if shared else ["2", "1"])  # the newest first
    history.forget("a")
    assert len(history.of("a")) == (3 if shared else 0)
    history.add("b", [(image, "base", "ghibli generate 4")] * MOST)
    assert len(history.of("b")) == MOST and {one.command[-1] for one in history.of("b")} == {"4"}
