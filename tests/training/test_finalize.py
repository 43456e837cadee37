"""The end of a run: its adapter in both layouts, and last lines with commands of its name."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import torch
from scipy.stats import sem

import train
from ghibli.adapters import lora
from ghibli.adapters.files import read_adapter
from ghibli.adapters.names import named_layers
from ghibli.config.schema import Config
from ghibli.evaluation.gain import Gain
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.training.finalize import Result, base_loss_line, closing_lines, gain_of, save_weights


@pytest.mark.parametrize(
    ("words", "gain", "said", "unsaid"),
    [
        ((), 0.12, "ghibli generate 'a run' --prompt 'a red train, Studio Ghibli style'", "below 0"),
        ((), -0.02, "lower optimizer.lr", "ghibli generate"),
        (("loss.guidance=7.5",), -0.904, "it started at -4300 %, not at 0", "lower optimizer.lr"),
        (("loss.guidance_target=4",), -0.1, "at guidance 0.25, where it started at -4300", "lower opt"),
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


@pytest.mark.parametrize("variant", ["lora", "loha", "lokr"])
def test_both_files_hold_the_same_updates(
    variant: str, make_config: Callable[..., Config], base: BaseModel, tmp_path: Path
) -> None:
    """Of convolutions too: LoKr's core is multiplied out in kohya's layout."""
    config = make_config(f"lora.variant={variant}", "lora.rank=4", "lora.targets=[conv1,to_k]")
    lora.add_lora(base, config.lora, 0)
    generator = torch.Generator().manual_seed(5)
    for parameter in lora.trainable(base).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    run = RunDir(tmp_path / "run")
    lines = save_weights(SimpleNamespace(config=config, run=run, module=SimpleNamespace(base=base)), {})
    assert lines[1].endswith("adapter/kohya.safetensors for ComfyUI and A1111")
    plain = load("demo")
    one, other = (
        read_adapter(run.adapter / name, plain, "it").layers
        for name in ("pytorch_lora_weights.safetensors", "kohya.safetensors")
    )
    assert one.keys() == other.keys() and any(name.endswith("conv1") for name in one)
    for name, layer in named_layers(plain).items():
        if name in one:
            weight = layer.weight.detach().double()
            wanted = one[name].delta(weight)
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(other[name].delta(weight), wanted, rtol=0, atol=1e-6)


def test_the_gain_has_the_interval_of_its_held_out_images() -> None:
    """Student's of images - 1 degrees of freedom, by scipy; the normal one for rows without their number."""
    row = {"probe/val_gain": 0.2, "probe/val_gain_se": 0.05, "probe/val_images": 4}
    low, high = scipy.stats.t.interval(0.95, 3, loc=0.2, scale=0.05)
    assert (gain_of(row).low, gain_of(row).high) == pytest.approx((low, high), rel=1e-12)
    del row["probe/val_images"]
    low, high = scipy.stats.norm.interval(0.95, loc=0.2, scale=0.05)
    assert (gain_of(row).low, gain_of(row).high) == pytest.approx((low, high), rel=1e-12)


def test_a_baseline_prints_the_loss_of_the_base(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The mean over held-out images, as probe.csv has it."""
    run = RunDir(tmp_path)
    train.run(make_config("finetune=none"), run)
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
