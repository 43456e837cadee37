"""Train a grid of runs, rank them and say which settings matter: `python sweep.py KEY=A,B ...`.

The same command resumes a study that was stopped or killed. See conf/sweep.yaml.
"""

import math
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import ghibli.runtime.installed  # noqa: F401  ends here where the packages are missing

# isort: split
import train
from ghibli.config.files import from_yaml
from ghibli.config.schema import Config
from ghibli.runs.attempts import failures
from ghibli.runs.folder import RunDir
from ghibli.runs.here import on_this_machine
from ghibli.runs.launch import current_run, hydra_entry
from ghibli.runtime.console import console
from ghibli.runtime.errors import UserError, one_line_errors
from ghibli.runtime.terminal import one_line
from ghibli.sweeps import grid
from ghibli.sweeps.grid import studies
from ghibli.sweeps.jobs import past_runs, run_trial


def main() -> None:
    """Train the trials, repeat the best, evaluate them and report; exit with 1 if a trial failed."""
    here = str(Path(__file__).resolve().parent)  # a launcher's processes import this file by its name
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    request = one_line_errors(lambda: grid.parse_study_request(sys.argv[1:]))
    if request is None:
        hydra_entry(Path(__file__).parent / "conf", "sweep", hydra_job)
    else:
        one_line_errors(lambda: run_requested_study(request))
    if studies:  # none after --help
        study = studies[-1]
        one_line_errors(lambda: repeat_best(study))
        one_line_errors(lambda: evaluate_all(study))
        one_line_errors(lambda: report(study.folder))
        if failures or grid.failure_notes(study.folder):
            raise SystemExit(1)


def hydra_job(cfg: Any) -> float:
    """Train one trial of a grid, in this process or wherever Hydra's launcher puts it."""
    if cfg.sweep.report_only:
        return math.nan
    return run_trial(current_run(), lambda: train.main(cfg))


def run_requested_study(request: grid.StudyRequest) -> None:
    """Train the trials of sweep.search, sweep.halving or sweep.race; none with sweep.report_only."""
    if request.settings.report_only:
        grid.open_study(request.cfg, None)
        return
    from ghibli.sweeps import race, search

    if request.settings.halving or request.settings.race:
        with grid.hydra_on_conf():
            overrides = [*request.fixed, *(override.input_line for override in request.free)]
            trials = grid.grid_trials(request.cfg, overrides)
            plan, example = grid.check_trials("sweep", trials)
        grid.open_study(request.cfg, plan)
        if request.settings.race:
            race.race(trials, raced_job)
        else:
            console.print(search.halving_announcement(plan, past_runs(example)))
            search.successive_halving(trials, requested_job)
    else:
        with grid.hydra_on_conf():
            plan, example = grid.check_trials("sweep", search.corner_trials(request))
        study = grid.open_study(request.cfg, None)
        console.print(search.announcement(request, plan, past_runs(example)))
        search.optuna_search(request, study, requested_job)


def requested_job(config: Config, run: RunDir, resumes: bool = False) -> float:
    """Train one trial of a search or of halving."""
    console.print(run.path.name, style="bold")
    return run_trial(run, lambda: train.run(config, run, resumes))


def raced_job(config: Config, run: RunDir, judge: Any) -> float:
    """Train one trial of a race."""
    console.print(run.path.name, style="bold")
    return run_trial(run, lambda: train.run(config, run, judge=judge))


def repeat_best(study: grid.Study) -> None:
    """Train the best trials again with other seeds, as sweep.repeats asks, or where their order is open."""
    if study.settings.repeats == 0 or study.settings.report_only:
        return
    from ghibli.sweeps.repeats import repeat_best_trials

    repeat_best_trials(study, train.run)


def evaluate_all(study: grid.Study) -> None:
    """Evaluate the images of every finished trial, when sweep.evaluate asks for it."""
    if not study.settings.evaluate or study.settings.report_only:
        return
    from ghibli.sweeps.trials import read_trials

    finished = [trial.run for trial in read_trials(study.folder) if trial.run.status.state == "finished"]
    for number, run in enumerate(finished, start=1):
        console.print(f"\nevaluating {number} of {len(finished)}: {run.path.name}", style="bold")
        try:
            evaluate_one(run, study)
        except Exception as error:  # the others are still evaluated, and the report is written
            if not isinstance(error, UserError):
                traceback.print_exc()
            console.print(one_line(f"this evaluation failed: {error}"), style="yellow")


def evaluate_one(run: RunDir, study: grid.Study) -> None:
    """Evaluate the images of one trial, as `ghibli evaluate` does."""
    from ghibli.evaluation.evaluate import evaluate
    from ghibli.training.loggers.choice import log_evaluation

    run.refuse_links()
    config = on_this_machine(from_yaml(run.config), study.cache_dir)
    config.evaluate = study.evaluate
    result = evaluate(run, config)
    for finding in result["findings"]:
        console.print(one_line(f"{finding['name']}: {finding['text']}"), style="yellow")
    log_evaluation(config, run, result)


def report(folder: Path) -> None:
    """Rank all trials in the study's folder, those of earlier grids too."""
    from ghibli.report.page import write as write_page
    from ghibli.sweeps.summary import study_summary, write_study_files
    from ghibli.sweeps.trials import read_trials

    trials = read_trials(folder)
    if not trials:
        raise UserError(f"{folder} holds no trial yet: drop sweep.report_only=true to train them")
    for part in study_summary(trials):
        console.print(part)
    written = [*write_study_files(folder, trials), write_page([folder])]
    console.print(f"written  {', '.join(map(str, written))}")


if __name__ == "__main__":
    import sweep  # itself, so that its job can be sent to other processes by name

    sweep.main()
