"""The average of the trained weights, against torch's AveragedModel and in a run."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import train
from ghibli.config.schema import Config
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.average import WeightAverage


def test_it_is_torchs_average_over_the_same_steps() -> None:
    model = nn.Linear(5, 3)
    weights, own = dict(model.named_parameters()), WeightAverage(0.8)
    authority = AveragedModel(model, avg_fn=get_ema_avg_fn(0.8))
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        for weight in weights.values():
            weight.data += torch.randn(weight.shape, generator=generator)
        authority.update_parameters(model)
        own.update(weights)
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    holder = SimpleNamespace(trainable=weights)
    for _ in range(2):  # the second does nothing
        own.show(holder, wanted=True)
    for name, weight in authority.module.named_parameters():
        torch.testing.assert_close(weights[name], weight)
        assert not torch.allclose(weights[name], kept[name])
    again = WeightAverage(0.8)
    again.load_state_dict(own.state_dict())
    again.show(holder, wanted=False)
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())


@pytest.mark.slow
def test_a_run_judges_and_keeps_the_average(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """The checkpoint of the last epoch and the adapter hold the average; what trains is as without one."""
    words = ("trainer.max_epochs=1", "lora.rank=4", "lora.text_encoder=false")
    config = make_config(*words, "optimizer.ema_decay=0.7")
    averaged, plain = RunDir(tmp_path / "averaged"), RunDir(tmp_path / "plain")
    train.run(config, averaged)
    train.run(make_config(*words), plain)
    kept, alone = (torch.load(run.last_checkpoint, weights_only=True) for run in (averaged, plain))
    state = kept["callbacks"]["WeightAverage"]
    assert state["shown"]
    assert state["other"].keys() == kept["state_dict"].keys()
    assert all(torch.equal(state["other"][name], weight) for name, weight in alone["state_dict"].items())
    assert not torch.equal(kept["probe"][1]["val"], alone["probe"][1]["val"])
    written = load_file(averaged.adapter / "pytorch_lora_weights.safetensors").values()
    for name in kept["state_dict"]:
        if ".lora_A." in name:
            found = [sum(torch.equal(one["state_dict"][name], w) for w in written) for one in (kept, alone)]
            assert found == [1, 0], name
