"""The ranking's columns: one entry is one more column on the terminal, in study.csv and in the report."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.report_material import make_run, page_of
from rich.console import Console

from ghibli.runs.folder import RunDir
from ghibli.runtime.console import PlainConsole
from ghibli.sweeps import ranking
from ghibli.sweeps.ranking import COLUMNS, Column
from ghibli.sweeps.trials import Trial, read_trials


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name, gains, rank in (("low", (0, 0.1, 0.2), 4), ("high", (0, 0.3, 0.5), 8)):
        make_run(tmp_path / name, gains, lora__rank=rank, best_epoch=2)
    make_run(tmp_path / "broken", (0,), lora__rank=16, state="failed", reason="the disk is full")
    return tmp_path


@pytest.fixture
def steps_column() -> Iterator[Column]:
    """A column that somebody adds from outside."""
    column = Column(
        title="optimiser steps",
        csv_names=("steps", "thousands"),
        value=lambda trial: trial.status.get("step") if trial.gain else None,
        text="{:,} steps".format,
        csv_cells=lambda steps: (steps, steps / 1000),
    )
    COLUMNS.insert(2, column)
    yield column
    COLUMNS.remove(column)


def terminal(folder: Path) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(ranking.ranking_table(read_trials(folder)))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def csv_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(ranking.ranking_csv(read_trials(folder)))))


def test_one_more_column_is_one_entry(study: Path, steps_column: Column) -> None:
    head, *rows = terminal(study)
    assert head == "lora.rank gain over the base optimiser steps epoch min verdict"
    assert rows[0].startswith("1 8 ") and " 30 steps 2 6.5" in rows[0]
    assert rows[2] == "3 16 - - - 6.5 failed: the disk is full"

    table = csv_rows(study)
    names = ["gain", "gain_se", "price", "price_se", "steps", "thousands", "distance", "distance_se"]
    assert list(table[0])[3:11] == names
    assert [(row["steps"], row["thousands"]) for row in table] == [("30", "0.03")] * 2 + [("", "")]

    page = page_of(study)
    assert "optimiser steps" in page.text and page.text.count("30 steps") == 2


def test_without_it_the_tables_are_as_before(study: Path) -> None:
    head, *rows = terminal(study)
    assert head == "lora.rank gain over the base epoch min verdict" and len(rows) == 3
    names = ["place", "trial", "lora.rank", "gain", "gain_se", "price", "price_se"]
    names += ["distance", "distance_se"]
    assert list(csv_rows(study)[0]) == [*names, "best_epoch", "minutes", "verdict"]
    assert "optimiser steps" not in page_of(study).text


def test_a_column_that_is_empty_everywhere_is_not_shown(study: Path) -> None:
    assert "image distance" not in terminal(study)[0]
    assert "image distance" not in page_of(study).text.partition("Ranking")[2].partition("Each run")[0]
    (study / "low" / "evaluation.json").write_text(
        '{"models": {"run": [{"sampler": "ddim", "guidance": 7.5, "kernel": [0.5, 0.25]}]}}'
    )
    assert "image distance" in terminal(study)[0]
    row = next(row for row in csv_rows(study) if row["trial"] == "low")
    assert (row["distance"], row["distance_se"]) == ("0.5", "0.25")
    assert "0.50 +- 0.25 (ddim 7.5)" in " ".join(terminal(study))


def test_a_long_verdict_is_cut_on_the_terminal_only(study: Path) -> None:
    make_run(study / "long", (0,), state="failed", reason="the disk is full " * 9)
    assert any(line.endswith("...") and line.count("the disk is full") < 9 for line in terminal(study))
    assert any(row["verdict"].count("the disk is full") == 9 for row in csv_rows(study))


def test_the_table_is_not_cut_in_a_pipe(tmp_path: Path) -> None:
    """Rich assumes 80 columns where there is no terminal."""
    names = [f"model.{k}{'x' * 20}" for k in range(8)]
    RunDir(tmp_path).status.update(state="failed", reason="the disk is full")
    failed, other = (
        Trial(RunDir(tmp_path), dict.fromkeys(names, rank), status, None)
        for rank, status in ((4, RunDir(tmp_path).status.read()), (8, {}))
    )
    output = io.StringIO()
    Console(file=output, width=80, soft_wrap=True).print(ranking.ranking_table([failed, other]))
    lines = output.getvalue().splitlines()
    assert all(name in lines[0] for name in names)
    assert "failed: the disk is full" in lines[1]


@pytest.mark.parametrize("width", [80, 30])
def test_on_a_narrow_terminal_a_verdict_is_broken_between_words(
    study: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """And all numbers stay whole, even where they alone take more than its width."""
    reason, output = "its batch is larger than the image set", io.StringIO()
    make_run(study / "long", (0,), state="failed", reason=reason)
    narrow = PlainConsole(file=output, force_terminal=True, color_system=None, width=width)
    monkeypatch.setattr("ghibli.runtime.console.console", narrow)
    narrow.print(ranking.ranking_table(read_trials(study)))
    lines = output.getvalue().splitlines()
    assert width == 30 or max(map(len, lines)) <= width
    assert f"failed: {reason}" not in output.getvalue()
    column = lines[0].index("verdict")
    assert f"failed: {reason}" in " ".join(line[column:].strip() for line in lines)
    assert lines[0].startswith("   lora.rank  gain over the base  epoch  min  verdict")
    assert any(re.match(r"1  8          [\d.]+ % \+- [\d.]+ %     2      6.5", line) for line in lines)
