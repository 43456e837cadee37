"""From Hydra to a plain, checked `Config` and back. Beside it config_mistakes, grids and search know Hydra.

No torch import: a typo is answered before anything heavy is loaded.
"""

import dataclasses
import functools
import hashlib
import io
import os
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghibli import devices, trial
from ghibli.config_mistakes import hydra_mistakes, reject_unknown_flags, reject_unknown_keys
from ghibli.mistakes import UserMistake, one_line_mistakes
from ghibli.places import check_places, check_typed_base
from ghibli.run_dir import RunDir, find_run
from ghibli.schema import LATER_KEYS, Command, Config, check_trainer

NOT_OF_A_RUN = ("hydra", "experiment", "sweep")  # top-level keys that are no setting of one run
LONGEST_NAME = 150  # letters of a trial's folder; most file systems take 255 bytes
SEAL = "# sha256 of the lines above: "


def to_config(cfg: Any) -> Config:
    """The composed Hydra config as a checked, plain `Config`.

    Raises:
        UserMistake: an unknown key, a missing value, a value out of range, a contradiction.
    """
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in NOT_OF_A_RUN])
    reject_unknown_keys(plain, Config)
    reject_unknown_flags(plain.trainer)
    return checked(OmegaConf.to_container(plain, resolve=True))


def checked(content: Any, kind: type = Config) -> Any:
    """Nested dictionaries as a `Config` or a part of it, whose types and ranges are thereby checked."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), content))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserMistake):
            raise error.__cause__ from None
        raise


def to_yaml(config: Config) -> str:
    """The whole configuration, resolved, as YAML; the last line is a checksum."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def from_yaml(path: Path) -> Config:
    """The configuration that a run wrote to its config.yaml.

    Raises:
        UserMistake: the file is damaged or was written by another version of this project.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = checked(OmegaConf.merge(LATER_KEYS, OmegaConf.load(io.StringIO(text))))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split("full_key:")[0].split())
        raise UserMistake(f"{path} is not the configuration of a run of this version: {reason}") from error
    settings, seal, digest = text.partition(SEAL)
    if seal and digest.strip() != hashlib.sha256(settings.encode()).hexdigest():
        raise UserMistake(
            f"{path} was changed or damaged after the run wrote it, and its result would be another: put it "
            "back (its last line is a checksum), or start a new run"
        )
    return config


def changed(config: Config, words: list[str], allowed: tuple[str, ...]) -> Config:
    """The configuration with KEY=VALUE words applied, such as evaluate.samples=100.

    Args:
        allowed: keys and sections that may be changed.

    Raises:
        UserMistake: another key, or a value that is not accepted.
    """
    for word in words:
        key = word.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserMistake(f"{word}: only {', '.join(allowed)} can be changed after a run")
    with hydra_mistakes():
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(words))
        return checked(OmegaConf.to_container(merged))


def run_dir_for(resume: str | None) -> str:
    """The folder this command writes to: a new one, or the one it resumes."""
    if resume is not None:
        return str(find_run(resume).path)
    fresh = Path("outputs/train") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    number = 2
    while fresh.exists():
        fresh = fresh.with_name(fresh.name.split("+")[0] + f"+{number}")
        number += 1
    return str(fresh)


def folder_name(words: str) -> str:
    """A trial's overrides as a folder's name: no slashes, and cut where a file system would refuse."""
    plain = words.replace("/", "_") or "defaults"
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 13]}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


def parsed(words: list[str]) -> list[Override]:
    """Overrides as Hydra understands them."""
    return OverridesParser.create().parse_overrides(list(words))


def register() -> None:
    """Makes the schema and the resolvers of conf/ known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Command)
    resolvers = {
        "folder_name": folder_name,
        "twice": lambda number: 2 * number,
        "tenth": lambda number: number / 10,
        "run_dir_for": run_dir_for,
        "hydra_subdir_for": lambda resume: ".hydra" if resume is None else ".hydra/resume",
    }
    for name, function in resolvers.items():
        cached = name == "run_dir_for"
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=cached)


def this_run() -> RunDir:
    """The run folder that Hydra chose for the running job."""
    return RunDir(Path(HydraConfig.get().runtime.output_dir))


def trial_number() -> int:
    """The place of the running job in its sweep, from 0."""
    return int(HydraConfig.get().job.num)


def check_first(cfg: Any) -> None:
    """Checks all of a command that can be checked before anything is loaded or written.

    Raises:
        UserMistake: a value that is not accepted, a place that is not there, a folder that is taken.
    """
    with hydra_mistakes():
        if cfg.resume is not None:
            run = find_run(cfg.resume)
            check_places(resumed(run, cfg.hydra.overrides))
            run.lock().close()
            return
        config = to_config(cfg)
        check_places(config)
        chosen = any(text.startswith("hydra.run.dir=") for text in cfg.hydra.overrides.hydra)
        if devices.started_outside() and not chosen:
            raise UserMistake(
                "several processes of this command were started at once (srun, torchrun): "
                "give them one folder, hydra.run.dir=DIR"
            )
        run = RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir")))
        trial.require_same(config, run)
        try:
            run.lock().close()
        except OSError as error:
            raise UserMistake(
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
        UserMistake: anything else was asked for than what the run has; all of it is listed.
    """
    dropped = [text for text in overrides.hydra if not text.startswith("hydra.mode=")]
    if dropped:
        raise UserMistake(f"resume goes on in the run's own folder: drop {', '.join(dropped)}")
    own = from_yaml(run.config)
    values, refused = asked_beside_resume(run, overrides.task)
    content = OmegaConf.structured(own)
    for key, value in values.items():
        OmegaConf.update(content, key, value, force_add=key.startswith("trainer."))
    if "trainer.max_epochs" not in values and own.trainer["max_epochs"] == own.data.epochs:
        content.trainer.max_epochs = content.data.epochs  # as conf/train.yaml has it
    asked = checked(OmegaConf.to_container(content, resolve=True))
    reject_unknown_flags(asked.trainer)
    sides = [trial.flat(dataclasses.asdict(config)) for config in (own, asked)]
    different = list(trial.differences(*sides))
    more = asked.trainer["max_epochs"] > own.trainer["max_epochs"]
    growing = ("trainer.max_epochs", "data.epochs") if more else ()
    refused += [d for d in different if d[0] not in growing and not trial.is_free(d[0])]
    if refused:
        raise UserMistake(
            f"resume={run.path}: {trial.listed(refused, 'in this run')}; only trainer.max_epochs may change, "
            "and only grow: start a new run for other settings"
        )
    return asked


def asked_beside_resume(run: RunDir, words: list[str]) -> tuple[dict[str, Any], list[trial.Difference]]:
    """(key -> value, groups of another choice than the run was started with) of the overrides."""
    groups = chosen_groups(run)
    values, refused = {}, []
    for override in parsed(words):
        key = override.key_or_group
        if override.is_delete():
            raise UserMistake(f"resume goes on with the run's own settings: drop {override.input_line}")
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


def look_at(words: list[str]) -> tuple[Config | None, RunDir | None, list[str]]:
    """(configuration, run folder, mistakes) of `train.py WORDS`; nothing is written.

    With any mistake there is no configuration, and the mistakes are as many as can be told apart.
    """
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        found = mistakes_in(lambda: composed(words))
        if found:  # each word alone, then what is right together
            alone = {word: mistakes_in(lambda word=word: composed([word])) for word in words}
            found = [text for texts in alone.values() for text in texts] or found
            words = [word for word in words if not alone[word]]
            if mistakes_in(lambda: composed(words)):
                return None, None, found
        cfg = composed(words)
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            found += mistakes_in(lambda section=section: to_section(cfg[section.name], section.type))
    for check in (lambda: reject_beside_check(cfg), lambda: to_config(cfg)):
        found += [text for text in mistakes_in(check) if text not in found]
    if found:
        return None, None, found + mistakes_in(lambda: check_typed_base(cfg.model.path or ""))
    return to_config(cfg), RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir"))), []


def mistakes_in(check: Callable[[], Any]) -> list[str]:
    """The mistake that `check` finds, if any."""
    try:
        with hydra_mistakes():
            check()
    except UserMistake as mistake:
        return [str(mistake)]
    return []


def composed(words: list[str]) -> Any:
    """conf/train.yaml with these overrides, as train.py gets it."""
    reject_misspelled(words)
    return compose("train", overrides=words, return_hydra_config=True)


def conf_folder() -> Path:
    """conf/ of the folder one is in, else that beside this package.

    Raises:
        UserMistake: neither is there.
    """
    for place in (Path("conf"), Path(__file__).parents[1] / "conf"):
        if (place / "train.yaml").is_file():
            return place.resolve()
    raise UserMistake("no conf/train.yaml here: go to the project's folder first")


def to_section(node: Any, section: type) -> Any:
    """One part of the configuration, such as `lora`, with its types and ranges checked."""
    return checked(OmegaConf.to_container(node, resolve=True), section)


def reject_beside_check(cfg: Any) -> None:
    """Raises for `ghibli check resume=...`, and for flags the trainer does not take."""
    if cfg.resume is not None:
        raise UserMistake("ghibli check looks at a new run, a resumed one was checked: drop resume")
    check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))


def reject_misspelled(words: list[str]) -> None:
    """Raises for `KEY =VALUE`, which the shell cuts in two words."""
    for word in words:
        if word.startswith("="):
            raise UserMistake(f"cannot read `{word}`: expected KEY=VALUE without spaces around =")


def hydra_entry(config_dir: Path, config_name: str, job: Callable[[Any], Any]) -> None:
    """Runs `job(cfg)` under Hydra with CONFIG_DIR/CONFIG_NAME.yaml; mistakes end in one line."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of being printed

    def explained(cfg: Any) -> Any:
        with hydra_mistakes():
            return job(cfg)

    @functools.wraps(job)
    def guarded(cfg: Any) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            return explained(cfg)  # the other trials go on; Hydra reports this one at the end
        return one_line_mistakes(lambda: explained(cfg))

    def run() -> None:
        reject_misspelled(sys.argv[1:])
        decorate = hydra_main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
        with hydra_mistakes():
            decorate(guarded)()

    one_line_mistakes(run)
