"""One batch of four or four of one: the same examples with the same noise, and the same adapter."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.runtime.files import read_rows
from ghibli.training.module import GhibliModule

pytestmark = pytest.mark.slow

Seen = dict[int, tuple[torch.Tensor, ...]]
# At 64 px the middle block attends over one place: its queries learn nothing but rounding.
WORDS = ("model.resolution=128", "lora.dropout=0", "trainer.max_epochs=1")


def trained(
    config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict, Seen, list[list[int]]]:
    """(trained weights, what each example was made of, the examples of each optimiser step)."""
    original, seen, steps = GhibliModule.training_step, {}, {}

    def step(module: GhibliModule, batch: dict, batch_idx: int) -> dict:
        for row, example in enumerate(batch["example"]):
            keys = ("latents", "noise", "timesteps", "input_ids")
            seen[example] = tuple(batch[key][row].clone() for key in keys)
        steps.setdefault(module.trainer.global_step, []).extend(batch["example"])
        return original(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(GhibliModule, "training_step", step)
        train.run(config, RunDir(folder))
    weights = torch.load(RunDir(folder).last_checkpoint, weights_only=True)["state_dict"]
    return weights, seen, list(steps.values())


def test_batch_4_and_accumulation_4_are_one_training(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make_config(*WORDS, "data.batch_size=4", "data.accumulate=1")
    other = make_config(*WORDS, "data.batch_size=1", "data.accumulate=4")
    adapter, seen, steps = trained(one, tmp_path / "one", monkeypatch)
    other_adapter, other_seen, other_steps = trained(other, tmp_path / "other", monkeypatch)
    assert steps == other_steps
    assert seen.keys() == other_seen.keys()
    for example, parts in seen.items():
        assert all(map(torch.equal, parts, other_seen[example]))
    losses = [
        [float(row["train/loss"]) for row in read_rows(tmp_path / name / "metrics.csv")]
        for name in ("one", "other")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert adapter.keys() == other_adapter.keys()
    for name, weight in adapter.items():
        torch.testing.assert_close(weight, other_adapter[name], atol=2e-4, rtol=0)
        if "lora_B" in name:  # starts at 0: what it is, it has learned
            learned, apart = weight.abs().mean(), (weight - other_adapter[name]).abs()
            assert apart.mean() < 1e-3 * learned, name
            assert apart.max() < 0.05 * learned, name  # AdamW's sign of a gradient that is almost 0
