"""What Hydra starts: the entry point, the running job's folder and settings, resumed settings."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghibli.config.files import checked, from_yaml
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.paths import check_places
from ghibli.config.schema import Config
from ghibli.config.trainer_flags import reject_unknown_flags
from ghibli.runs import distributed, identity
from ghibli.runs.compose import parsed, register, reject_misspelled, to_config
from ghibli.runs.find import find_run
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError, one_line_errors


def this_run() -> RunDir:
    """The run folder that Hydra chose for the running job."""
    return RunDir(Path(HydraConfig.get().runtime.output_dir))


def trial_number() -> int:
    """The place of the running job in its sweep, from 0."""
    return int(HydraConfig.get().job.num)


class CheckRun(Callback):
    """Check a single run before Hydra makes its folder, so that an error leaves nothing behind."""

    def on_run_start(self, config: Any, **_: Any) -> None:
        one_line_errors(lambda: check_first(config))


def check_first(cfg: Any) -> None:
    """Checks all of a command that can be checked before anything is loaded or written.

    Raises:
        UserError: a value that is not accepted, a place that is not there, a folder that is taken.
    """
    with hydra_errors():
        if cfg.resume is not None:
            run = find_run(cfg.resume)
            check_places(resumed(run, cfg.hydra.overrides))
            run.lock().close()
            return
        config = to_config(cfg)
        check_places(config)
        chosen = any(text.startswith("hydra.run.dir=") for text in cfg.hydra.overrides.hydra)
        if distributed.started_outside() and not chosen:
            raise UserError(
                "several processes of this command were started at once (srun, torchrun): "
                "give them one folder, hydra.run.dir=DIR"
            )
        run = RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir")))
        identity.require_same(config, run)
        try:
            run.lock().close()
        except OSError as error:
            raise UserError(
                f"cannot make the run folder {run.path} ({error.strerror}): choose another, hydra.run.dir=DIR"
            ) from error


def job_config(cfg: Any) -> Config:
    """What the running job trains with: the composed settings, or with resume=RUN the run's own."""
    if cfg.resume is not None:
        return resumed(this_run(), HydraConfig.get().overrides)
    config = to_config(cfg)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        name_on_dashboard(config, this_run(), Path(HydraConfig.get().sweep.dir))
    return config


def name_on_dashboard(config: Config, run: RunDir, sweep: Path) -> None:
    """The trials of a sweep share a W&B group called after its folder, each called after its own."""
    config.wandb.group = config.wandb.group or sweep.name
    config.wandb.name = config.wandb.name or run.path.name


def resumed(run: RunDir, overrides: Any) -> Config:
    """The run's own settings, with what may change on the way as it was asked for beside `resume`.

    Raises:
        UserError: anything else was asked for than what the run has; all of it is listed.
    """
    dropped = [text for text in overrides.hydra if not text.startswith("hydra.mode=")]
    if dropped:
        raise UserError(f"resume goes on in the run's own folder: drop {', '.join(dropped)}")
    own = from_yaml(run.config)
    values, refused = asked_beside_resume(run, overrides.task)
    content = OmegaConf.structured(own)
    for key, value in values.items():
        OmegaConf.update(content, key, value, force_add=key.startswith("trainer."))
    if "trainer.max_epochs" not in values and own.trainer["max_epochs"] == own.data.epochs:
        content.trainer.max_epochs = content.data.epochs  # as conf/train.yaml has it
    asked = checked(OmegaConf.to_container(content, resolve=True))
    reject_unknown_flags(asked.trainer)
    sides = [identity.flat(dataclasses.asdict(config)) for config in (own, asked)]
    different = list(identity.differences(*sides))
    more = asked.trainer["max_epochs"] > own.trainer["max_epochs"]
    growing = ("trainer.max_epochs", "data.epochs") if more else ()
    refused += [d for d in different if d[0] not in growing and not identity.is_free(d[0])]
    if refused:
        raise UserError(
            f"resume={run.path}: {identity.listed(refused, 'in this run')}; only trainer.max_epochs may "
            "change, and only grow: start a new run for other settings"
        )
    return asked


def asked_beside_resume(run: RunDir, words: list[str]) -> tuple[dict[str, Any], list[identity.Difference]]:
    """(key -> value, groups of another choice than the run was started with) of the overrides."""
    groups = chosen_groups(run)
    values, refused = {}, []
    for override in parsed(words):
        key = override.key_or_group
        if override.is_delete():
            raise UserError(f"resume goes on with the run's own settings: drop {override.input_line}")
        if key not in ("model", "data", "experiment"):
            values[key] = override.value()
        elif groups.get(key) != override.value():
            refused.append((key, groups.get(key), override.value()))
    values.pop("resume")
    return values, refused


def chosen_groups(run: RunDir) -> dict[str, str]:
    """Group -> choice that a run was started with; empty when Hydra's file is gone or damaged."""
    try:
        return dict(OmegaConf.load(run.path / ".hydra" / "hydra.yaml").hydra.runtime.choices)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError, OmegaConfBaseException):
        return {}


def hydra_entry(config_dir: Path, config_name: str, job: Callable[[Any], Any]) -> None:
    """Runs `job(cfg)` under Hydra with CONFIG_DIR/CONFIG_NAME.yaml; mistakes end in one line."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of being printed

    def explained(cfg: Any) -> Any:
        with hydra_errors():
            return job(cfg)

    @functools.wraps(job)
    def guarded(cfg: Any) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return explained(cfg)  # the other trials go on; Hydra reports this one at the end
        return one_line_errors(lambda: explained(cfg))

    def run() -> None:
        reject_misspelled(sys.argv[1:])
        decorate = hydra_main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
        with hydra_errors():
            decorate(guarded)()

    one_line_errors(run)
