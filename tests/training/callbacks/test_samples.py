"""When an image grid is drawn."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ghibli.config.schema import Config
from ghibli.prepare import memory
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.samples import SampleGrid


@pytest.mark.parametrize(
    ("every", "epochs", "drawn"),
    [(5, 12, [1, 5, 10]), (5, 3, [1]), (1, 3, [1, 2]), (2, 1, []), (5, 1, []), (5, 5, [1])],
)
def test_the_first_grid_comes_after_the_first_epoch(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    every: int, epochs: int, drawn: list[int],
) -> None:  # fmt: skip
    """That of the last epoch is drawn from the best weights, at the end; the disk is estimated for all."""
    names: list[str] = []
    monkeypatch.setattr(SampleGrid, "save", lambda self, trainer, module, name, label: names.append(name))
    config = make_config(f"sample.every_n_epochs={every}", f"trainer.max_epochs={epochs}")
    grid = SampleGrid(config, RunDir(tmp_path))
    grid.base_images = torch.zeros(1)
    for epoch in range(epochs):
        grid.on_train_epoch_end(SimpleNamespace(current_epoch=epoch, max_epochs=epochs), None)
    assert names == [f"epoch_{epoch:03d}" for epoch in drawn]
    one = memory.estimate_disk(make_config("sample.every_n_epochs=1"), [], epochs=0, cells=1).grids
    assert memory.estimate_disk(config, [], epochs=epochs, cells=1).grids >= (len(drawn) + 1) * one


def test_without_grids_nothing_is_due(make_config: Callable[..., Config], tmp_path: Path) -> None:
    grid = SampleGrid(make_config("sample.every_n_epochs=0"), RunDir(tmp_path))
    for epoch in range(3):
        grid.on_train_epoch_end(SimpleNamespace(current_epoch=epoch, max_epochs=4), None)
    assert list(tmp_path.iterdir()) == []
