"""Trains a grid of runs, each once, ranks them and says which settings matter: `python sweep.py KEY=A,B ...`.

Stopped or killed, it goes on when the same command is given again. See conf/sweep.yaml.
"""

import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import train
from ghibli.config.files import apply_overrides, from_yaml
from ghibli.config.schema import Config, EvaluateConfig
from ghibli.runs.folder import RunDir
from ghibli.runs.launch import current_run, hydra_entry, job_number
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, disk_trouble, one_line_errors
from ghibli.runtime.files import write_text
from ghibli.sweeps import grid
from ghibli.sweeps.grid import studies

seconds: list[float] = []  # that each trial took in this process
failures: list[Path] = []  # trials that failed in this process; a launcher's others leave a note only


def attempt(run: RunDir, job: Callable[[], float]) -> float:
    """Trains one trial. One that fails is noted in its folder and told; NaN, and the next one goes on."""
    began = time.monotonic()
    run.no_result.unlink(missing_ok=True)
    try:
        return job()
    except Exception as error:
        trouble = str(error) if isinstance(error, UserError) else disk_trouble(error)
        if trouble is None:
            traceback.print_exc()
        console.print(f"this trial failed: {trouble or repr(error)}", style="yellow")
        failures.append(run.path)
        with suppress(OSError):  # a full disk, of which failures knows
            write_text(run.no_result, (trouble or repr(error)).removeprefix(f"{run.path} "))
        return math.nan
    finally:
        seconds.append(time.monotonic() - began)


def hydra_job(cfg: Any) -> float:
    """One trial of a grid, started by Hydra, in this process or wherever the launcher puts it."""
    if cfg.sweep.report_only:
        return math.nan
    total = studies[-1].trials if studies else None
    console.print(f"\n{progress(job_number(), total)}: {current_run().path.name}", style="bold")
    return attempt(current_run(), lambda: train.main(cfg))


def chosen_job(config: Config, run: RunDir, resumes: bool = False) -> float:
    """One trial that the study has chosen itself."""
    console.print(run.path.name, style="bold")
    return attempt(run, lambda: train.run(config, run, resumes))


def progress(done: int, total: int | None) -> str:
    """`trial 3 of 8, about 12 min left`; what took no time was finished before."""
    if total is None:
        return f"trial {done + 1}"
    trained = [second for second in seconds if second > 1]
    if not trained:
        return f"trial {done + 1} of {total}"
    left = sum(trained) / len(trained) * (total - done) / 60
    return f"trial {done + 1} of {total}, about {left:.0f} min left"


def choose_and_train(choice: grid.Choice) -> None:
    """Trains the trials of sweep.search or sweep.halving; none with sweep.report_only."""
    if choice.settings.report_only:
        grid.begin(choice.cfg, None)
        return
    from ghibli.sweeps import search

    halves = choice.settings.halving
    with grid.hydra_here():
        words = [*choice.fixed, *(override.input_line for override in choice.free)]
        trials = grid.grid(choice.cfg, words) if halves else search.corners(choice)
        grid.check_trials("sweep", trials)
    study = grid.begin(choice.cfg, len(trials) if halves else None)
    if halves:
        search.halve(choice, trials, chosen_job)
    else:
        search.search(choice, study, chosen_job)


def repeat_the_best(study: grid.Study) -> None:
    """Trains the best trials again with further seeds, as sweep.best and sweep.repeats say."""
    from ghibli.sweeps.trials import read_trials

    again = study.settings.repeats if not study.settings.report_only else 0
    if again == 0:
        return
    first = [trial for trial in read_trials(study.folder) if trial.gain and not trial.repeats]
    for trial in first[: study.settings.best]:
        for number in range(1, again + 1):
            repeat(trial.run, trial.settings["seed"] + number)


def repeat(first: RunDir, seed: int) -> None:
    """Trains a trial once more with another seed, under the name of its own folder on the dashboard."""
    from ghibli.sweeps.trials import REPEAT

    run = RunDir(first.path.with_name(f"{first.path.name}{REPEAT}{seed}"))

    def job() -> float:
        config = apply_overrides(from_yaml(first.config), [f"seed={seed}"], ("seed",))
        config.wandb.name = run.path.name
        return train.run(config, run)

    console.print(run.path.name, style="bold")
    attempt(run, job)


def evaluate_all(study: grid.Study) -> None:
    """Measures the images of every finished trial, when sweep.evaluate asks for it."""
    from ghibli.sweeps.trials import read_trials

    if not study.settings.evaluate or study.settings.report_only:
        return
    done = [trial for trial in read_trials(study.folder) if trial.run.state == "finished"]
    for number, trial in enumerate(done, start=1):
        console.print(f"\nevaluating {number} of {len(done)}: {trial.run.path.name}", style="bold")
        try:
            evaluate_one(trial.run, study.evaluate)
        except Exception as error:  # the others go on, and the report is made
            if not isinstance(error, UserError):
                traceback.print_exc()
            console.print(f"this evaluation failed: {error}", style="yellow")


def evaluate_one(run: RunDir, options: EvaluateConfig) -> None:
    """Measures the images of one trial, as `ghibli evaluate` does."""
    from ghibli.evaluation import evaluate
    from ghibli.training import wandb_logger

    config = from_yaml(run.config)
    config.evaluate = options
    result = evaluate.evaluate(run, config)
    for finding in result["findings"]:
        console.print(f"{finding['name']}: {finding['text']}", style="yellow")
    wandb_logger.log_evaluation(config, run, result)


def report(folder: Path) -> None:
    """Ranks all trials of the study's folder, those of earlier grids too."""
    from ghibli.report.page import write as write_page
    from ghibli.sweeps import comparison, costs, effects, ranking
    from ghibli.sweeps.trials import read_trials

    trials = read_trials(folder)
    if not trials:
        raise UserError(f"{folder} holds no trial yet: without sweep.report_only=true they are trained")
    console.print(ranking.table(trials))
    for line in (*effects.effects(trials), effects.seed_noise(trials)):
        console.print(str(line or ""))
    for table in (comparison.cell_table(trials), costs.cost_table(trials)):
        if table is not None:
            console.print("", table)
    writers = (
        ranking.write_table, ranking.write_plot, ranking.write_grids,
        comparison.write_cells, comparison.write_models,
    )  # fmt: skip
    for line in (*comparison.notes(trials), *comparison.comparisons(trials)):
        console.print(line)
    written = [*(write(folder, trials) for write in writers), write_page([folder])]
    console.print(f"written  {', '.join(str(path) for path in written if path)}")


def main() -> None:
    """The command."""
    here = str(Path(__file__).resolve().parent)  # a launcher's processes import this file by its name
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    choice = one_line_errors(lambda: grid.choice_of(sys.argv[1:]))
    if choice is None:
        hydra_entry(Path(__file__).parent / "conf", "sweep", hydra_job)
    else:
        one_line_errors(lambda: choose_and_train(choice))
    if studies:
        one_line_errors(lambda: repeat_the_best(studies[-1]))
        one_line_errors(lambda: evaluate_all(studies[-1]))
        one_line_errors(lambda: report(studies[-1].folder))
        if failures or grid.notes(studies[-1].folder):
            raise SystemExit(1)


if __name__ == "__main__":
    import sweep  # itself, so that its job can be sent to other processes by name

    sweep.main()
