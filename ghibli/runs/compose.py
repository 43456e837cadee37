"""From the overrides of a command to a checked `Config` and the folder it writes to, by Hydra."""

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import filterfalse
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from ghibli.config.files import section_to_dataclass, to_dataclass
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.keys import affects_result, all_keys
from ghibli.config.paths import check_base_path, check_model
from ghibli.config.schema import Command, Config, check_name
from ghibli.config.trainer_flags import check_trainer, reject_unknown_flags
from ghibli.config.typed_paths import with_typed_paths
from ghibli.runs.find import run_to_resume
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import ROOT

NOT_OF_A_RUN = ("hydra", "experiment", "sweep")  # top-level keys that are not settings of a run
CHOOSE_BASE = ("model", "data", "data.style", "experiment", "cache_dir")  # with model.* and local.*
COMPOSING = threading.Lock()  # Hydra keeps one state for the whole process, and a page has several threads
LONGEST_NAME = 150  # bytes of a trial's folder name; most file systems allow 255, and repeats add to it


def register() -> None:
    """Register the schema and the resolvers that conf/ uses with Hydra."""
    ConfigStore.instance().store(name="schema", node=Command)
    resolvers = {
        "and_keys_without_effect": lambda *keys: [*keys, *filterfalse(affects_result, all_keys(Command))],
        "folder_name": folder_name,
        "alpha_for": default_alpha,
        "tenth": lambda number: number / 10,
        "run_dir_for": run_dir_for,
        "name_or": lambda name, other: other if name is None else name,
        "hydra_subdir_for": lambda resume: ".hydra" if resume is None else ".hydra/resume",
    }
    for name, function in resolvers.items():
        cached = name == "run_dir_for"
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=cached)


def default_alpha(variant: str, rank: int) -> int:
    """Return the alpha of a run that sets none: twice the rank, but of rslora one that is fixed over ranks.

    Kalajdzievski 2023 keeps alpha and divides by sqrt(rank), so that the update does not grow with the rank.
    16 scales rank 32 by 2.8, where LoRA's default scales it by 2; no other value was tried.
    """
    return 16 if variant == "rslora" else 2 * rank


def run_dir_for(resume: str | None, name: str | None) -> str:
    """Return the folder that a command writes to: that of the run to resume, or one of this name or time.

    Where that is taken, launch.claimed finds another name.
    """
    if resume is not None:
        return str(run_to_resume(resume).path)
    if name is not None:
        check_name(str(name))
        return f"outputs/train/{name}"
    return datetime.now().strftime("outputs/train/%Y-%m-%d_%H-%M-%S")


def folder_name(overrides: str) -> str:
    """Turn a trial's overrides into a folder name: without slashes, cut to LONGEST_NAME bytes."""
    plain = overrides.replace("/", "_") or "defaults"
    content = os.fsencode(plain)
    if len(content) <= LONGEST_NAME:
        return plain
    begin = content[: LONGEST_NAME - 13].decode(errors="ignore")  # a letter that is cut is left out
    return f"{begin}-{hashlib.sha256(os.fsencode(overrides)).hexdigest()[:12]}"


def conf_folder() -> Path:
    """Return conf/ of the current folder, else the one beside this package.

    Raises:
        UserError: neither exists.
    """
    for folder in (Path("conf"), ROOT / "conf"):
        if (folder / "train.yaml").is_file():
            return folder.resolve()
    raise UserError("no conf/train.yaml here: change to the project's folder first")


def cache_of_this_machine() -> str:
    """Return the cache_dir of conf/train.yaml, for commands that compose no settings."""
    return str(OmegaConf.load(conf_folder() / "train.yaml").cache_dir)


def parse_overrides(overrides: list[str]) -> list[Override]:
    """Parse overrides as Hydra does."""
    return OverridesParser.create().parse_overrides(list(overrides))


def reject_spaces_around_equals(overrides: list[str]) -> None:
    """Raise a UserError for `KEY =VALUE`, which the shell splits in two."""
    for override in overrides:
        if override.startswith("="):
            raise UserError(f"cannot parse `{override}`: expected KEY=VALUE without spaces around =")


def compose_cfg(overrides: list[str]) -> Any:
    """Compose conf/train.yaml with these overrides, as train.py gets it; Hydra must know conf/ already."""
    reject_spaces_around_equals(overrides)
    return compose("train", overrides=overrides, return_hydra_config=True)


def to_config(cfg: Any) -> Config:
    """Convert a composed Hydra config to a checked, plain `Config`.

    Raises:
        UserError: an unknown key, a missing value, a value out of range, a contradiction.
    """
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in NOT_OF_A_RUN])
    reject_unknown_flags(plain.trainer)
    return to_dataclass(OmegaConf.to_container(plain, resolve=True))


def compose_config(overrides: list[str]) -> Config:
    """Return the settings that `train.py OVERRIDES` would train with.

    Raises:
        UserError: the first error in the overrides.
    """
    config, _, errors = check_overrides(overrides)
    if config is None:
        raise UserError(errors[0])
    return config


def base_config(overrides: list[str]) -> Config:
    """Return the settings of a command that trains nothing: which base, and the style of its prompts.

    Raises:
        UserError: as compose_config and check_model, or a setting that only a training has.
    """
    config = compose_config(overrides)
    for override in parse_overrides(with_typed_paths(overrides)):
        key = override.key_or_group
        if key not in CHOOSE_BASE and not key.startswith(("model.", "local.")):
            raise UserError(
                f"{override.input_line} changes nothing here: only model.*, data=NAME and data.style do; "
                "leave it out"
            )
    check_model(config.model)
    return config


def check_overrides(overrides: list[str]) -> tuple[Config | None, RunDir | None, list[str]]:
    """Check `train.py OVERRIDES` and write nothing: (configuration, run folder, errors).

    With any error, configuration and folder are None, and all errors that can be told apart are returned.
    """
    register()
    overrides = with_typed_paths(overrides)
    with COMPOSING, initialize_config_dir(str(conf_folder()), version_base="1.3"):
        cfg, errors = composed(overrides)
        if errors:
            own_errors, overrides = check_each_override(overrides)
            errors = own_errors or errors
            cfg, others = composed(overrides)
            if others:
                return None, None, errors
    if not errors:
        with suppress(UserError), hydra_errors():  # one check of all; only where it fails, each on its own
            return new_run(cfg), RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir"))), []
    errors += list(dict.fromkeys(error for check in checks_of(cfg) for error in errors_in(check)))
    return None, None, errors + errors_in(lambda: check_base_if_named(cfg))


def new_run(cfg: Any) -> Config:
    """Return the configuration of a run that is to be started anew.

    Raises:
        UserError: as to_config, or it is to be resumed, or Lightning knows no such flag.
    """
    require_new_run(cfg)
    check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))
    return to_config(cfg)


def check_base_if_named(cfg: Any) -> None:
    """Check model.path of a composed config, unless it is empty, which is an error of its own."""
    if cfg.model.path:
        check_base_path(str(cfg.model.path))


def composed(overrides: list[str]) -> tuple[Any, list[str]]:
    """Compose with these overrides: (the config, no errors), or (None, the error in a list)."""
    try:
        with hydra_errors():
            return compose_cfg(overrides), []
    except UserError as error:
        return None, [str(error)]


def check_each_override(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Compose with each override alone: (errors, the overrides without one)."""
    errors = {one: composed([one])[1] for one in overrides}
    valid = [one for one in overrides if not errors[one]]
    return [error for found in errors.values() for error in found], valid


def checks_of(cfg: Any) -> Iterator[Callable[[], Any]]:
    """Yield a check for each section of a composed config, then those of the whole."""
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            yield partial(section_to_dataclass, cfg, section.name)
    yield lambda: require_new_run(cfg)
    yield lambda: check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))
    yield lambda: to_config(cfg)


def errors_in(check: Callable[[], Any]) -> list[str]:
    """Run a check; return the message of the UserError that it raises, if any."""
    try:
        with hydra_errors():
            check()
    except UserError as error:
        return [str(error)]
    return []


def require_new_run(cfg: Any) -> None:
    """Raise a UserError for `ghibli check resume=...`."""
    if cfg.resume is not None:
        raise UserError("`ghibli check` is for new runs; a resumed one was checked at its start: drop resume")
