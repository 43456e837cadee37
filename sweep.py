"""Trains a grid of runs, each once, ranks them and says which settings matter: `python sweep.py KEY=A,B ...`.

Stopped or killed, it goes on when the same command is given again. See conf/sweep.yaml.
"""

import math
import time
import traceback
from pathlib import Path
from typing import Any

import train
from ghibli.config import hydra_entry, studies, this_run, trial_number
from ghibli.mistakes import UserMistake, disk_trouble, one_line_mistakes
from ghibli.progress import console

seconds: list[float] = []  # that each trial took in this process


def trial(cfg: Any) -> float:
    """One Hydra job. A trial that fails is noted in its folder and told; the next one goes on."""
    if cfg.sweep.report_only:
        return math.nan
    began, total = time.monotonic(), studies[-1].trials if studies else None
    console.print(f"\n{progress(trial_number(), total)}: {this_run().path.name}", style="bold")
    try:
        return train.main(cfg)
    except Exception as error:
        trouble = str(error) if isinstance(error, UserMistake) else disk_trouble(error)
        if trouble is None:
            traceback.print_exc()
        console.print(f"this trial failed: {trouble or repr(error)}", style="yellow")
        return math.nan
    finally:
        seconds.append(time.monotonic() - began)


def progress(done: int, total: int | None) -> str:
    """`trial 3 of 8, about 12 min left`; what took no time was finished before."""
    if total is None:
        return f"trial {done + 1}"
    trained = [second for second in seconds if second > 1]
    if not trained:
        return f"trial {done + 1} of {total}"
    left = sum(trained) / len(trained) * (total - done) / 60
    return f"trial {done + 1} of {total}, about {left:.0f} min left"


def report() -> None:
    """Ranks all trials of the study's folder, those of earlier grids too."""
    from ghibli import study

    folder = studies[-1].folder
    trials = study.read_trials(folder)
    if not trials:
        raise UserMistake(f"{folder} holds no trial yet: without sweep.report_only=true they are trained")
    console.print(study.ranking(trials))
    for effect in study.effects(trials):
        console.print(str(effect))
    table, plot = study.write_table(folder, trials), study.write_plot(folder, trials)
    console.print(f"table {table}" + (f", plot {plot}" if plot else ""))


if __name__ == "__main__":
    hydra_entry(Path(__file__).parent / "conf", "sweep", trial)
    if studies:
        one_line_mistakes(report)
