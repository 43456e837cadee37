"""The comparison table of a study: every model once, in its cells, with what it cost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.report_material import make_run
from rich.console import Console
from safetensors.torch import save_file

import sweep
from ghibli.config.paths import ADAPTER_FILE
from ghibli.config.schema import Config
from ghibli.evaluation.distances import kernel_difference
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_with_checksum
from ghibli.sweeps import comparison, costs, evaluations
from ghibli.sweeps.costs import cost_rows
from ghibli.sweeps.trials import Trial

BASE = [
    {"sampler": "ddpm", "guidance": 1.0, "kernel": [8.0, 1.0]},
    {"sampler": "ddim", "guidance": 7.5, "kernel": [4.0, 0.5]},
]


def make_evaluated_trial(folder: Path, finetune: str, guidance: float, rows: list[dict] | None) -> Trial:
    run = RunDir(folder)
    run.adapter.mkdir(parents=True)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, run.adapter / ADAPTER_FILE)
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, run.adapter / "kohya.safetensors")  # the same
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
        make_evaluated_trial(tmp_path / "a", "none", 1, None),
        make_evaluated_trial(tmp_path / "b", "lora", 1.0, one),
        make_evaluated_trial(tmp_path / "c", "lora", 7.5, guided),
    ]


def test_every_model_is_listed_once_with_its_cells(trials: list[Trial]) -> None:
    cells, rows = comparison.cell_rows(trials)
    assert [(c.sampler, c.guidance) for c in cells] == [("ddpm", 1), ("ddim", 7.5), ("ddim", 15)]
    names = ["untouched base", "LoRA, trained at guidance 1", "LoRA, trained at guidance 7.5"]
    assert [name for name, _ in rows] == names
    assert [row and row["kernel"][0] for row in rows[0][1]] == [8.0, 4.0, None]
    assert [row and row["kernel"][0] for row in rows[2][1]] == [2.0, 0.5, 0.9]


def test_the_tables_are_not_cut_in_a_pipe(trials: list[Trial]) -> None:
    """A pipe has 80 columns; the models' names were cut first."""
    pipe = Console(width=80)
    with pipe.capture() as captured:
        for table in (comparison.cell_table(trials), costs.cost_table(trials)):
            pipe.print(table, soft_wrap=True)
    lines = captured.get().splitlines()
    (row,) = (line for line in lines if "guidance 7.5" in line and "+-" in line)
    assert all(number in row for number in ("2.00 +- 0.40", "0.50 +- 0.20", "0.90 +- 0.30"))
    assert sum("LoRA, trained at guidance 7.5" in line for line in lines) == 2


def test_models_of_one_name_are_distinguished_by_what_varies(trials: list[Trial], tmp_path: Path) -> None:
    ranks = [make_evaluated_trial(tmp_path / f"rank {rank}", "lora", 1.0, BASE) for rank in (4, 8)]
    for rank, trial in zip((4, 8), ranks, strict=True):
        trial.settings["lora.rank"] = rank
    names = ["LoRA, trained at guidance 1, rank 4", "LoRA, trained at guidance 1, rank 8"]
    assert evaluations.unique_names([*ranks, trials[2]]) == [*names, "LoRA, trained at guidance 7.5"]
    assert [name for name, _ in comparison.cell_rows(ranks)[1]] == ["untouched base", *names]
    assert [name for name, _ in costs.cost_rows(ranks)] == names
    ranks[1].settings["lora.rank"] = 4
    wanted = [f"LoRA, trained at guidance 1 (rank {rank})" for rank in (4, 8)]
    assert evaluations.unique_names(ranks) == wanted


def test_a_guided_target_is_no_training_at_guidance_1(
    trials: list[Trial], make_config: Callable[..., Config]
) -> None:
    """In names and in the columns of models.png, which have the own scale of each: 15, 7.5 / 3 = 2.5."""
    trials[2].settings.update({"loss.guidance": 1.0, "loss.guidance_target": 3.0})
    names = ["LoRA, trained at guidance 1", "LoRA, trained at guidance target 3"]
    assert evaluations.unique_names(trials[1:]) == names
    short = evaluations.unique_names(trials[1:], evaluations.short_model_name)
    assert short == ["LoRA 1", "LoRA target 3"]
    words = ("sample.samplers=[ddim]", "sample.guidance=[1,7.5]")
    plain, target, guided = (
        make_config(*words, *more) for more in ((), ("loss.guidance_target=3",), ("loss.guidance=7.5",))
    )
    for configs, wanted in (
        ([plain], [1, 7.5]), ([plain, guided], [1, 7.5, 15]), ([plain, target, guided], [1, 7.5, 2.5, 15]),
    ):  # fmt: skip
        cells = comparison.cells_for(configs[-1].sample, configs)
        assert [cell.guidance for cell in cells] == wanted


def test_two_bases_have_a_line_each(trials: list[Trial], tmp_path: Path) -> None:
    other = make_evaluated_trial(tmp_path / "d", "lora", 3.0, BASE)
    content = json.loads(other.run.evaluation.read_text())
    content["models"]["base"] = [BASE[0] | {"kernel": [3.0, 1.0]}]
    other.run.evaluation.write_text(json.dumps(content))
    _, rows = comparison.cell_rows([trials[1], other])
    names = ["base of: LoRA, trained at guidance 1", "base of: LoRA, trained at guidance 3"]
    assert [name for name, _ in rows[:2]] == names
    assert [row["kernel"][0] for row in rows[1][1] if row] == [3.0]


def test_the_nearest_models_are_compared_in_pairs(trials: list[Trial], tmp_path: Path) -> None:
    """From the features that the evaluations left in the cache, each model in its best cell."""
    draws = torch.Generator().manual_seed(0)
    sets = {
        name: 0.5 * shift + torch.randn(40, 6, generator=draws, dtype=torch.float64)
        for name, shift in (("real", 0), ("units", 3), ("base", 4), ("one", 1), ("guided", 2))
    }
    for name, features in sets.items():
        file = tmp_path / "evaluation" / f"{name}.pt"
        write_with_checksum(
            file, lambda opened, features=features: torch.save({"features": features}, opened)
        )
    for trial, name in zip(trials[1:], ("one", "guided"), strict=True):
        content = json.loads(trial.run.evaluation.read_text())
        content |= {"cache_dir": str(tmp_path), "reference_file": "real.pt", "features": "inception"}
        for model, file in (("base", "base.pt"), ("run", f"{name}.pt")):
            content["models"][model] = [row | {"file": file} for row in content["models"][model]]
        trial.run.evaluation.write_text(json.dumps(content))
    lines = comparison.paired_comparisons(trials[1:])
    wanted = kernel_difference(sets["guided"], sets["one"], sets["real"], torch.arange(40))
    behind = f"{wanted.value:.2f} +- {wanted.standard_error:.2f}"
    names = [f"LoRA, trained at guidance {scale} (DDIM 7.5)" for scale in (1, 7.5)]
    assert lines[0] == f"{names[1]} is farther from real images than {names[0]} by {behind}, in pairs."
    assert len(lines) == 3 and "untouched base (DDIM 7.5) is farther" in lines[1]

    for trial in trials[1:]:  # style features are compared in the units of the training images
        content = json.loads(trial.run.evaluation.read_text())
        trial.run.evaluation.write_text(json.dumps(content | {"units_file": "units.pt", "features": "style"}))
    units = sets["units"]
    scaled = [(sets[name] - units.mean(0)) / units.std(0) for name in ("guided", "one", "real")]
    wanted = kernel_difference(*scaled, torch.arange(40))
    behind = f"{wanted.value:.2f} +- {wanted.standard_error:.2f}"
    assert comparison.paired_comparisons(trials[1:])[0].endswith(f"by {behind}, in pairs.")
    (tmp_path / "evaluation" / "one.pt").unlink()
    assert comparison.paired_comparisons(trials[1:]) == []


def test_the_notes_below_the_table(trials: list[Trial], tmp_path: Path) -> None:
    content = json.loads(trials[2].run.evaluation.read_text())
    content |= {"floor_images": 41, "real": {"kernel": [0.05, 0.1]}, "findings": []}
    content["findings"] = [{"name": "few images", "text": "12 are few"}]
    trials[2].run.evaluation.write_text(json.dumps(content))
    text = comparison.write_cells(tmp_path, trials).read_text()
    assert "\nFloor, 41 real images: 0.05 +- 0.10.\n" in text and "\nfew images: 12 are few.\n" in text
    assert "A model trained at guidance 7.5 is not made to be sampled at 1" in text
    assert comparison.unguided_cell_notes(trials[:2]) == []


def test_costs_of_all_weights_are_the_unets(trials: list[Trial]) -> None:
    trials[1].settings["finetune"] = "full"
    shutil.rmtree(trials[1].run.adapter)
    trials[1].run.unet.mkdir()
    save_file({"a": torch.zeros(300, 1000)}, trials[1].run.unet / "x.safetensors")
    (name, costs), _ = cost_rows(trials)
    assert (name, *costs[:2]) == ("all weights", "300,000", "1.2 MB")


def test_models_png_leaves_out_what_is_not_finished(trials: list[Trial], tmp_path: Path) -> None:
    """finished_config refuses a trial that was stopped, or whose folder lacks its settings."""
    assert comparison.write_models(tmp_path, trials) is None


def test_one_evaluation_that_fails_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in "ab":
        make_run(tmp_path / name)
    seen = []

    def evaluate_one(run: RunDir, options: object) -> None:
        seen.append(run.path.name)
        if len(seen) == 1:
            raise UserError("no such folder")

    monkeypatch.setattr(sweep, "evaluate_one", evaluate_one)
    settings = SimpleNamespace(evaluate=True, report_only=False)
    sweep.evaluate_all(SimpleNamespace(settings=settings, folder=tmp_path, evaluate=None))
    assert sorted(seen) == ["a", "b"]
    assert "this evaluation failed: no such folder" in capsys.readouterr().out


def test_a_study_has_a_report_page(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, gains in (("a", (0, 0.3, 0.4)), ("b", (0, 0.1, 0.2))):
        make_run(tmp_path / name, gains)
    sweep.report(tmp_path)
    assert "The first leads the second" in (tmp_path / "report.html").read_text()
    assert "report.html" in capsys.readouterr().out


def test_costs_are_read_from_the_files(trials: list[Trial]) -> None:
    """15 steps of 8 examples in 3 epochs at a median of 20 a second: 2 seconds an epoch; 17 numbers."""
    (name, costs), _ = cost_rows(trials)
    assert name == "LoRA, trained at guidance 1"
    assert costs == ("17", "0.0 MB", "2.0", "1.00 GiB")


def test_the_markdown_holds_both_tables(trials: list[Trial], tmp_path: Path) -> None:
    lines = comparison.write_cells(tmp_path, trials).read_text().splitlines()
    assert lines[0] == "| model | DDPM 1 | DDIM 7.5 | DDIM 15 |"
    assert lines[2] == "| untouched base | 8.00 +- 1.00 | 4.00 +- 0.50 |  |"
    assert "| LoRA, trained at guidance 7.5 | 17 | 0.0 MB | 2.0 | 1.00 GiB |" in lines


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "{", '{"models": {"base": [{"kernel": 1}]}}', '{"models": {"base": []}, "real": 1}'],
)
def test_a_malformed_evaluation_is_left_out(trials: list[Trial], content: str) -> None:
    trials[1].run.evaluation.write_text(content)
    assert [trial for trial, _ in evaluations.evaluated(trials)] == [trials[0], trials[2]]


def test_a_study_that_was_not_evaluated_has_no_table(trials: list[Trial], tmp_path: Path) -> None:
    for trial in trials:
        trial.run.evaluation.unlink()
    assert comparison.cell_table(trials) is costs.cost_table(trials) is None
    assert comparison.write_cells(tmp_path, trials) is None
