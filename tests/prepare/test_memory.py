"""The estimates of memory and disk: what each optimiser adds, and the private parts of torch they rest on."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from helpers.commands import GRIDS

from ghibli.config.registry import OPTIMIZERS
from ghibli.config.schema import Config
from ghibli.models import cost
from ghibli.models.base import BaseModel
from ghibli.models.load import load
from ghibli.prepare import memory
from ghibli.training.module import GhibliModule

TESTED_TORCH = ("2.14.",)  # whose TorchDispatchMode was looked at


def test_the_private_dispatch_mode_is_that_of_a_known_torch() -> None:
    """A newer torch may have moved it: look at cost.Live, then add the version."""
    assert version("torch").startswith(TESTED_TORCH)
    with cost.Live() as live:
        kept = torch.zeros(10) + 1
    assert (live.now, kept.nbytes) == (40, 40)


def test_nested_results_are_searched_for_tensors() -> None:
    one, two, three = torch.zeros(3, 1)
    found = cost.tensors_in((one, [two, None, 4], {"a": (three,), "b": "text"}))
    assert [id(tensor) for tensor in found] == [id(one), id(two), id(three)]


def test_every_optimiser_has_its_own_need(
    make_config: Callable[..., Config], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "step_costs", lambda module: dict.fromkeys(
        ("encode", "decode", "score", "train"), memory.Cost(0.0, 0.0)
    ))  # fmt: skip
    module = GhibliModule(make_config("lora.rank=8"), base)
    shapes = [tuple(p.shape) for p in module.trainable.values()]
    weights, kept, checkpoints = sum(p.numel() for p in module.trainable.values()), {}, {}
    for name in OPTIMIZERS:
        module.config = make_config("lora.rank=8", f"optimizer.name={name}", "optimizer.schedule=constant")
        latents = memory.latents_size(module.config.model.resolution, 10)
        kept[name] = (memory.estimate_memory(module, 10, "32-true").kept - latents) / weights
        disk = memory.estimate_disk(module.config, shapes, epochs=1, cells=1)
        checkpoints[name] = disk.checkpoints / weights / memory.CHECKPOINTS
        assert disk.adapters == 3 * 4 * weights
    assert kept == pytest.approx(checkpoints)
    assert (kept["adamw"], kept["adamw_schedulefree"], kept["prodigy"]) == (12, 12, 20)
    assert 4 < kept["adafactor"] < 6
    assert 4 + 2 < kept["adamw8bit"] <= 12


def test_costs_are_measured_once_for_each_base_and_adapter(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, memory.Cost]] = []
    measure = memory.measure_steps

    def noted(module: GhibliModule) -> dict[str, memory.Cost]:
        measured.append(measure(module))
        return measured[-1]

    monkeypatch.setattr(memory, "measure_steps", noted)

    def costs(*words: str, cache: Path = tmp_path) -> dict[str, memory.Cost]:
        config = make_config("lora.text_encoder=false", f"cache_dir={cache}", *words)
        return memory.step_costs(GhibliModule(config, load("demo"), base_hash="tested"))

    first = costs("lora.rank=4")
    assert costs("lora.rank=4") == first == measured[0] and len(measured) == 1
    assert costs("lora.rank=64")["train"].example > first["train"].example
    assert costs("lora.rank=4", "lora.dropout=0")["train"].pixel < first["train"].pixel
    assert costs("lora.rank=4", *GRIDS).keys() - first.keys() == {"decode"}
    assert costs("lora.rank=4", cache=Path("/dev/null")) == first and len(measured) == 5
