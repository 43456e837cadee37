"""Train one run, with seeds=N several: `python train.py KEY=VALUE ...`; -m: a sweep. See conf/train.yaml."""

import math
from pathlib import Path
from typing import Any

import ghibli.runtime.installed  # noqa: F401  ends here where the packages are missing

# isort: split
from ghibli.config.files import from_yaml
from ghibli.config.schema import Config
from ghibli.runs import distributed, identity, reuse
from ghibli.runs.attempts import failures
from ghibli.runs.folder import RunDir
from ghibli.runs.here import on_this_machine
from ghibli.runs.launch import current_run, hydra_entry, job_config
from ghibli.runs.repeats import planned_seeds
from ghibli.runtime.console import console
from ghibli.runtime.errors import stop_at_once
from ghibli.runtime.rank import is_first

SCRIPT = Path(__file__).resolve()  # what further processes of a run start


def run(config: Config, run_dir: RunDir, resumes: bool = False, judge: Any = None) -> float:
    """Train as the configuration says and write everything into the run folder, which this process locks.

    A folder that holds this very run half done is resumed; a finished one answers at once.

    Args:
        resumes: go on from checkpoints/last.ckpt of the folder, whatever code it was started by.
        judge: of a sweep's race, called with the probe's history before every epoch but the first; what it
            returns, unless None, is why the run stops there.

    Returns:
        The objective of sweeps: the best share by which the held-out loss is below the base's; NaN for a run
        that the judge has stopped.
    """
    with run_dir.lock():
        objective, resumes = reuse.resume_or_restart(config, run_dir, resumes)
        if objective is not None:
            return objective
        console.print("loading torch, diffusers and Lightning ...")
        with stop_at_once():  # they take seconds to import
            from ghibli.data.drawing import drawn_meanwhile

            with drawn_meanwhile(config.data.root_folder, config.data.draw):
                from ghibli.prepare import preflight
                from ghibli.training.callbacks.race import Outrun
                from ghibli.training.finalize import finalize
                from ghibli.training.loggers import choice
                from ghibli.training.session import build, is_trial_at_work, training_session

        try:
            with training_session(config, run_dir, resumes) as session:
                training = build(config, run_dir, session.stop, judge)
                session.check_inputs(training.module)
                session.note_start(training.trainer)
                training.trainer.loggers = dashboards = choice.start(config, run_dir)
                if not resumes:
                    preflight.before_training(training.module, training.data, training.trainer, run_dir)
                training.fit(session.checkpoint, SCRIPT)
                result = finalize(training, dashboards)
                console.print(result.brief if is_trial_at_work(run_dir) else result.summary)
        except Outrun:
            return math.nan
    return result.objective


def follow(config: Config, run_dir: RunDir) -> None:
    """Train along as one of a run's further processes: print nothing, end when the first one does."""
    with distributed.following(run_dir):
        from ghibli.training import session

        session.follow(config, run_dir, SCRIPT)


def main(cfg: Any) -> float:
    """Run one Hydra job with the composed settings, or resume with the run's; return the objective."""
    run_dir = current_run()
    if is_first():
        config, resumes = job_config(cfg), cfg.resume is not None
        objective = run(config, run_dir, resumes)
        first, seeds = planned_seeds(run_dir, config)
        if len(seeds) > 1:
            from ghibli.training.seeds import closing_lines, train_other_seeds

            if first is not run_dir:
                config = on_this_machine(from_yaml(first.config), config.cache_dir)
            train_other_seeds(first, seeds, config, run_dir if resumes else None, run)
            for line in closing_lines(first, seeds):
                console.print(line)
            if failures:
                raise SystemExit(1)
        return objective
    if cfg.resume is not None or identity.finished_objective(run_dir) is None:  # else the first has left
        follow(job_config(cfg), run_dir)
    return math.nan


def start() -> None:
    """Run the command: a run of the user's, or a further process of one that is under way."""
    joined = distributed.run_to_join()
    if joined is None:
        hydra_entry(Path(__file__).parent / "conf", "train", main)
    else:
        follow(from_yaml(joined.config), joined)


if __name__ == "__main__":
    start()
