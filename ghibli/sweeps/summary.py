"""The summary of a study: what is printed at its end, and the files written beside the trials."""

from collections.abc import Iterator
from pathlib import Path

from rich.console import RenderableType

from ghibli.sweeps import comparison, costs, effects, plots, ranking, tradeoffs
from ghibli.sweeps.trials import Trial
from ghibli.sweeps.winner import winner_lines


def study_summary(trials: list[Trial]) -> Iterator[RenderableType]:
    """Yield the ranking, the effect of each setting and, for evaluated trials, the tables with notes.

    The tables are the comparison and the costs.
    """
    yield ranking.ranking_table(trials)
    for line in (*effects.effects(trials), effects.seed_noise(trials), *winner_lines(trials)):
        yield str(line or "")
    yield from filter(None, [tradeoffs.front_line(trials)])
    for table in (comparison.cell_table(trials), costs.cost_table(trials)):
        if table is not None:
            yield ""
            yield table
    yield from (*comparison.table_notes(trials), *comparison.paired_comparisons(trials))


def write_study_files(folder: Path, trials: list[Trial]) -> list[Path]:
    """Write the files of a study, as far as the trials allow, and return their paths.

    The files are study.csv, study.png, best_and_worst.png, cells.md and models.png.
    """
    writers = (
        ranking.write_table, plots.write_plot, plots.write_grids,
        comparison.write_cells, comparison.write_models,
    )  # fmt: skip
    return [file for write in writers if (file := write(folder, trials)) is not None]
