"""From typed words to a checked `Config`: Hydra's composition, the folder a command writes to."""

import dataclasses
import hashlib
from collections.abc import Callable
from datetime import datetime
from itertools import filterfalse
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from ghibli.config.files import to_dataclass
from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.keys import affects_result, all_keys
from ghibli.config.paths import check_typed_base
from ghibli.config.schema import Command, Config
from ghibli.config.trainer_flags import check_trainer, reject_unknown_flags
from ghibli.runs.find import find_run
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import ROOT

NOT_OF_A_RUN = ("hydra", "experiment", "sweep")  # top-level keys that are no setting of one run
LONGEST_NAME = 150  # letters of a trial's folder; most file systems take 255 bytes


def to_config(cfg: Any) -> Config:
    """The composed Hydra config as a checked, plain `Config`.

    Raises:
        UserError: an unknown key, a missing value, a value out of range, a contradiction.
    """
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in NOT_OF_A_RUN])
    reject_unknown_flags(plain.trainer)
    return to_dataclass(OmegaConf.to_container(plain, resolve=True))


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
        "and_keys_without_effect": lambda *keys: [*keys, *filterfalse(affects_result, all_keys(Command))],
        "twice": lambda number: 2 * number,
        "tenth": lambda number: number / 10,
        "run_dir_for": run_dir_for,
        "hydra_subdir_for": lambda resume: ".hydra" if resume is None else ".hydra/resume",
    }
    for name, function in resolvers.items():
        cached = name == "run_dir_for"
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=cached)


def look_at(words: list[str]) -> tuple[Config | None, RunDir | None, list[str]]:
    """(configuration, run folder, mistakes) of `train.py WORDS`; nothing is written.

    With any mistake there is no configuration, and the mistakes are as many as can be told apart.
    """
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        found = errors_in(lambda: composed(words))
        if found:  # each word alone, then what is right together
            alone = {word: errors_in(lambda word=word: composed([word])) for word in words}
            found = [text for texts in alone.values() for text in texts] or found
            words = [word for word in words if not alone[word]]
            if errors_in(lambda: composed(words)):
                return None, None, found
        cfg = composed(words)
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            found += errors_in(lambda section=section: to_section(cfg[section.name], section.type))
    for check in (lambda: reject_beside_check(cfg), lambda: to_config(cfg)):
        found += [text for text in errors_in(check) if text not in found]
    if found:
        return None, None, found + errors_in(lambda: check_typed_base(cfg.model.path or ""))
    return to_config(cfg), RunDir(Path(OmegaConf.select(cfg, "hydra.run.dir"))), []


def errors_in(check: Callable[[], Any]) -> list[str]:
    """The mistake that `check` finds, if any."""
    try:
        with hydra_errors():
            check()
    except UserError as mistake:
        return [str(mistake)]
    return []


def composed(words: list[str]) -> Any:
    """conf/train.yaml with these overrides, as train.py gets it."""
    reject_misspelled(words)
    return compose("train", overrides=words, return_hydra_config=True)


def conf_folder() -> Path:
    """conf/ of the folder one is in, else that beside this package.

    Raises:
        UserError: neither is there.
    """
    for place in (Path("conf"), ROOT / "conf"):
        if (place / "train.yaml").is_file():
            return place.resolve()
    raise UserError("no conf/train.yaml here: go to the project's folder first")


def to_section(node: Any, section: type) -> Any:
    """One part of the configuration, such as `lora`, with its types and ranges checked."""
    return to_dataclass(OmegaConf.to_container(node, resolve=True), section)


def reject_beside_check(cfg: Any) -> None:
    """Raises for `ghibli check resume=...`, and for flags the trainer does not take."""
    if cfg.resume is not None:
        raise UserError("ghibli check looks at a new run, a resumed one was checked: drop resume")
    check_trainer(OmegaConf.to_container(cfg.trainer, resolve=True))


def reject_misspelled(words: list[str]) -> None:
    """Raises for `KEY =VALUE`, which the shell cuts in two words."""
    for word in words:
        if word.startswith("="):
            raise UserError(f"cannot parse `{word}`: expected KEY=VALUE without spaces around =")
