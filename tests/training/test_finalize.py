"""The last lines of a run: commands with its name, and a gain below 0 that explains itself."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import sem

import train
from ghibli.config.schema import Config
from ghibli.evaluation.gain import Gain
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.training.finalize import Result, base_loss_line, closing_lines


@pytest.mark.parametrize(
    ("words", "gain", "said", "unsaid"),
    [
        ((), 0.12, "ghibli generate 'a run' --prompt 'a red train'", "below 0"),
        ((), -0.02, "lower optimizer.lr", "ghibli generate"),
        (("loss.guidance=7.5",), -0.904, "it started at -4300 %, not at 0", "lower optimizer.lr"),
        (("finetune=none",), 0.0, "next     python train.py", "ghibli report"),
    ],
)
def test_the_last_lines(
    make_config: Callable[..., Config], words: tuple[str, ...], gain: float, said: str, unsaid: str
) -> None:
    config = make_config(*words)
    text = "\n".join(closing_lines(config, Path("a run").absolute(), Gain(gain, 0.01), -43.0))
    assert said in text and unsaid not in text
    assert config.finetune == "none" or "next     ghibli report 'a run'" in text


def test_a_baseline_prints_the_loss_of_the_base(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The mean over held-out images, as probe.csv has it."""
    run = RunDir(tmp_path)
    train.run(make_config("finetune=none", "sample.every_n_epochs=0"), run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
    (row,) = read_rows(run.probe)
    assert f"loss     {float(row['probe/val_loss']):.4f} +- " in line
    assert f"on {row['probe/val_images']} held-out images: what training has to get below" in line


def test_the_standard_error_of_the_base_is_over_images() -> None:
    losses = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    probe = SimpleNamespace(history=[SimpleNamespace(val=losses)])
    line = base_loss_line(SimpleNamespace(module=SimpleNamespace(probe=probe)))
    assert f"{losses.mean():.4f} +- {sem(losses.mean(dim=1).numpy()):.4f} on 9" in line


def test_a_trial_of_a_sweep_ends_in_two_lines() -> None:
    lines = ["trained  LoRA", "gain     better", "grid     a.png", "next     ghibli report a", "         b"]
    assert Result(Gain(0.1, 0.01), 1, lines).brief == "trained  LoRA\ngain     better"
