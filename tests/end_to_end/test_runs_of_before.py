"""Two runs of commit 73ce106, half done and finished: every command that takes a run takes them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from faults.compare import checkpoint, different_parts, image
from helpers.commands import run_python
from safetensors.torch import load_file
from typer.testing import CliRunner

import train
from ghibli.adapters.files import read_adapter
from ghibli.adapters.names import named_layers
from ghibli.cli.main import app
from ghibli.config.files import from_yaml
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.runtime.provenance import processor_name

KEPT = Path(__file__).parent / "runs_of_73ce106"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a copy of both runs below outputs/."""
    shutil.copytree(KEPT, tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs"


CHANGED_SINCE = [  # columns, Student's intervals; alpha / rank is in B; two steps start at the top
    "probe.csv",
    "adapter/pytorch_lora_weights.safetensors", "adapter_last/pytorch_lora_weights.safetensors",
    "samples/adapter.png",
]  # fmt: skip
SCORES = ("last.probe.", "best.probe.", "status.json gain")  # to rounding, as in probe.csv


def ghibli(*words: str) -> str:
    """Run `ghibli WORDS` in this process and return what it printed."""
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_half_done_run_resumes_to_the_same_end(runs: Path, capsys: pytest.CaptureFixture) -> None:
    """Equal to the bit on the kind of processor that made them; else to rounding."""
    half = RunDir(runs / "half")
    train.run(from_yaml(half.config), half, resumes=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "settings of version 1" in said and "the code has changed since this run was started" in said
    same_processor = processor_name() == json.loads((KEPT / "half" / "status.json").read_text())["processor"]
    if same_processor:
        parts = different_parts(runs / "finished", runs / "half")
        assert [part for part in parts if not part.startswith(SCORES)] == CHANGED_SINCE
        rows = zip(*(read_rows(runs / run / "probe.csv") for run in ("finished", "half")), strict=True)
        for before, now in rows:
            kept = [key for key in before if not key.endswith(("_low", "_high"))]
            for key in kept:  # several images share a pass now, so the last digits are others
                assert now[key] == before[key] or float(now[key]) == pytest.approx(
                    float(before[key]), rel=1e-4, abs=1e-5
                ), key
            assert now["probe/val_images"] == "3"
    base = load("demo")
    layers = named_layers(base)
    ours, theirs = (read_adapter(runs / run, base, run).layers for run in ("half", "finished"))
    assert ours.keys() == theirs.keys()
    for name, layer in theirs.items():
        weight = layers[name].weight.double()
        torch.testing.assert_close(ours[name].delta(weight), layer.delta(weight), rtol=1e-3, atol=1e-6)


def test_a_finished_run_is_listed_reported_and_compared(runs: Path) -> None:
    (listed,) = [line for line in ghibli("list").splitlines() if "outputs/finished" in line]
    gain = json.loads((KEPT / "finished" / "status.json").read_text())["gain"]
    assert "finished" in listed and f"{100 * gain:.1f} %" in listed
    assert "report.html" in ghibli("report", "outputs/finished")
    page = (runs / "finished" / "report.html").read_text(encoding="utf-8")
    assert "73ce106" in page and page.count("<svg") > 0
    told = ghibli("compare", "outputs/finished", "outputs/half")
    assert "state" in told and "interrupted" not in told


def test_a_finished_run_is_drawn_with_and_exported(runs: Path) -> None:
    words = ("--prompt", "a panda", "--steps", "2", "--to", "drawn", "--base")
    ghibli("generate", "outputs/finished", *words)
    assert image(Path("drawn/000.png")).std() > 5
    ghibli("export", "outputs/finished", "--to", "out")
    ours, theirs = (
        load_file(place / "pytorch_lora_weights.safetensors")
        for place in (Path("out"), KEPT / "finished" / "adapter")
    )
    assert all(torch.equal(ours[name], weights) for name, weights in theirs.items())


@pytest.mark.slow
def test_a_finished_run_is_evaluated_and_trained_further(runs: Path) -> None:
    words = ("evaluate.samples=3", "evaluate.scan_samples=3", "evaluate.scales=[]", "evaluate.batch_size=3")
    ghibli("evaluate", "outputs/finished", *words)
    result = json.loads((runs / "finished" / "evaluation.json").read_text())
    assert result["samples"] == 3 and len(result["models"]["run"]) == len(result["models"]["base"]) > 0
    done = run_python(
        str(Path(train.__file__)), "resume=outputs/finished", "trainer.max_epochs=3", cwd=runs.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((runs / "finished" / "status.json").read_text())["epoch"] == 3
    before, after = checkpoint(KEPT / "finished", "last"), checkpoint(runs / "finished", "last")
    for old, new in zip(before["probe"], after["probe"], strict=False):
        assert all(torch.equal(old[name], new[name]) for name in old)
