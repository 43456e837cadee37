"""When an image grid is drawn, and at which scales; the line that says where a run starts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ghibli.config.schema import Config
from ghibli.diffusion.samplers import Cell
from ghibli.evaluation.gain import Probe
from ghibli.prepare import memory
from ghibli.runs.folder import RunDir
from ghibli.training.callbacks.image_distance import DistanceCurve
from ghibli.training.callbacks.progress import ProgressLine
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


def test_grids_and_the_distance_show_a_run_at_its_own_scale(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """7.5 x the guidance at which a target is learned, 1 / s, also where the grid has that scale already."""
    for words, scales, own in (
        ((), [1, 7.5], 7.5),
        (("loss.guidance=7.5",), [1, 7.5, 15], 15),
        (("loss.guidance_target=3",), [1, 7.5, 2.5], 2.5),
        (("loss.guidance_target=7.5",), [1, 7.5], 1),
    ):
        config = make_config("sample.samplers=[ddim]", *words)
        assert [cell.guidance for cell in SampleGrid(config, RunDir(tmp_path)).cells] == scales
        curve = DistanceCurve(config, RunDir(tmp_path))
        assert (curve.cell, curve.base_cell) == (Cell("ddim", own), Cell("ddim", 7.5))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), ""),
        (("loss.guidance=7.5",), "at guidance 7.5 the untouched base scores 3.00, at 1 0.50: guided, it"),
        (("loss.guidance_target=3",), "at guidance 0.333 the untouched base scores 3.00, at 1 0.50: a gui"),
    ],
)
def test_a_run_says_where_it_starts(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture, words: tuple[str, ...], said: str
) -> None:
    val, base = torch.full((6, 4), 3.0), torch.full((6, 4), 0.5)
    probe = SimpleNamespace(history=[Probe(val=val, val_g1=base, train=val, base_val=base, base_train=base)])
    ProgressLine(SimpleNamespace(rows=[])).say_start(SimpleNamespace(config=make_config(*words), probe=probe))
    out = " ".join(capsys.readouterr().out.split())
    assert said in out and bool(out) == bool(said)
    assert not said or out.endswith("the gain starts at -500 %")


def test_without_grids_nothing_is_due(make_config: Callable[..., Config], tmp_path: Path) -> None:
    grid = SampleGrid(make_config("sample.every_n_epochs=0"), RunDir(tmp_path))
    for epoch in range(3):
        grid.on_train_epoch_end(SimpleNamespace(current_epoch=epoch, max_epochs=4), None)
    assert list(tmp_path.iterdir()) == []
