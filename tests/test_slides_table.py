"""The slides' table of a study: every model once, in its cells, with what it cost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ghibli import slides_table
from ghibli.run_dir import RunDir
from ghibli.study import Trial

BASE = [
    {"sampler": "ddpm", "guidance": 1.0, "kernel": [8.0, 1.0]},
    {"sampler": "ddim", "guidance": 7.5, "kernel": [4.0, 0.5]},
]


def made(folder: Path, finetune: str, guidance: float, rows: list[dict] | None) -> Trial:
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, run.adapter / "x.safetensors")
    run.metrics.write_text("step,time/images_per_second\n5,10\n10,30\n15,20\n")
    models = {"base": BASE} | ({"run": rows} if rows else {})
    run.evaluation.write_text(json.dumps({"models": models}))
    settings = {
        "finetune": finetune, "loss.guidance": guidance, "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 4,
    }  # fmt: skip
    return Trial(run, settings, {"epoch": 3, "step": 15, "peak_memory": 2**30, "devices": 1}, None)


@pytest.fixture
def trials(tmp_path: Path) -> list[Trial]:
    one = [BASE[0] | {"kernel": [2.0, 0.4]}, BASE[1] | {"kernel": [0.5, 0.2]}]
    guided = [*one, {"sampler": "ddim", "guidance": 15.0, "kernel": [0.9, 0.3]}]
    return [
        made(tmp_path / "a", "none", 1, None),
        made(tmp_path / "b", "lora", 1.0, one),
        made(tmp_path / "c", "lora", 7.5, guided),
    ]


def test_every_model_stands_once_in_its_cells(trials: list[Trial]) -> None:
    cells, rows = slides_table.cell_rows(trials)
    assert [(c.sampler, c.guidance) for c in cells] == [("ddpm", 1), ("ddim", 7.5), ("ddim", 15)]
    names = ["untouched base", "LoRA, trained at guidance 1", "LoRA, trained at guidance 7.5"]
    assert [name for name, _ in rows] == names
    assert [row and row["kernel"][0] for row in rows[0][1]] == [8.0, 4.0, None]
    assert [row and row["kernel"][0] for row in rows[2][1]] == [2.0, 0.5, 0.9]


def test_costs_are_the_files_own(trials: list[Trial]) -> None:
    """15 steps of 8 examples in 3 epochs at a median of 20 a second: 2 seconds an epoch; 17 numbers."""
    (name, costs), _ = slides_table.cost_rows(trials)
    assert name == "LoRA, trained at guidance 1"
    assert costs == ("17", "0.0 MB", "2.0", "1.00 GiB")


def test_the_markdown_holds_both_tables(trials: list[Trial], tmp_path: Path) -> None:
    lines = slides_table.write_cells(tmp_path, trials).read_text().splitlines()
    assert lines[0] == "| model | DDPM 1 | DDIM 7.5 | DDIM 15 |"
    assert lines[2] == "| untouched base | 8.00 +- 1.00 | 4.00 +- 0.50 |  |"
    assert "| LoRA, trained at guidance 7.5 | 17 | 0.0 MB | 2.0 | 1.00 GiB |" in lines


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"models": {"base": [{"kernel": 1}]}}'])
def test_an_odd_evaluation_is_left_out(trials: list[Trial], content: str) -> None:
    trials[1].run.evaluation.write_text(content)
    assert [trial for trial, _ in slides_table.evaluated(trials)] == [trials[0], trials[2]]


def test_a_study_that_was_not_evaluated_has_no_table(trials: list[Trial], tmp_path: Path) -> None:
    for trial in trials:
        trial.run.evaluation.unlink()
    assert slides_table.cell_table(trials) is slides_table.cost_table(trials) is None
    assert slides_table.write_cells(tmp_path, trials) is None
