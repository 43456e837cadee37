"""From Hydra to a plain, checked `Config` and back. The only module that knows Hydra.

No torch import: a typo is answered before anything heavy is loaded.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghibli import schema
from ghibli.mistakes import UserMistake, did_you_mean, fail, one_line_mistakes
from ghibli.run_dir import RunDir, find_run
from ghibli.schema import Config


def reject_unknown_keys(node: Any, section: type, prefix: str = "") -> None:
    """Raises for keys that slipped past the schema through a `+key=value` override."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key in node:
        if key not in fields:
            hint = did_you_mean(str(key), fields)
            raise UserMistake(f"unknown key {prefix}{key}{hint} (known here: {', '.join(fields)})")
        inner = fields[key].type
        if dataclasses.is_dataclass(inner) and node._get_node(key) is not None:
            reject_unknown_keys(node[key], inner, f"{prefix}{key}.")


def to_config(cfg: Any) -> Config:
    """The composed Hydra config as a checked, plain `Config`.

    Raises:
        UserMistake: an unknown key, a missing value, a value out of range, a contradiction.
    """
    plain = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in ("hydra", "experiment")])
    reject_unknown_keys(plain, Config)
    try:
        resolved = OmegaConf.to_container(plain, resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), resolved))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserMistake):
            raise error.__cause__ from None
        raise


def to_yaml(config: Config) -> str:
    """The whole configuration, resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(path: Path) -> Config:
    """The configuration that a run wrote to its config.yaml."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path)))


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


def register() -> None:
    """Makes the schema and the resolvers of conf/ known to Hydra."""
    ConfigStore.instance().store(name="schema", node=Config)
    resolvers = {
        "twice": lambda number: 2 * number,
        "tenth": lambda number: number / 10,
        "run_dir_for": run_dir_for,
        "hydra_subdir_for": lambda resume: ".hydra" if resume is None else ".hydra/resume",
    }
    for name, function in resolvers.items():
        cached = name == "run_dir_for"
        OmegaConf.register_new_resolver(name, function, replace=True, use_cache=cached)


def this_run() -> tuple[RunDir, list[str]]:
    """The run folder that Hydra chose for the running job, and the overrides the user typed."""
    hydra = HydraConfig.get()
    return RunDir(Path(hydra.runtime.output_dir)), list(hydra.overrides.task)


def overrides_beside_resume(overrides: list[str]) -> list[str]:
    """The overrides that a resumed run would ignore: all but `resume` itself."""
    parser = OverridesParser.create()
    keys = [(parser.parse_override(text).key_or_group, text) for text in overrides]
    return [text for key, text in keys if key not in ("resume", "model", "data")]


def explain(error: Exception) -> str:
    """Hydra's and OmegaConf's several lines as one that names the key and what is accepted."""
    text = f"{error}\n{error.__cause__ or ''}"
    own = re.search(r"UserMistake raised while resolving interpolation: (.*)", text)
    if own:
        return own[1]
    override = re.search(r"Could not override '([^']+)'", text)
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown and hasattr(schema, unknown[2]):
        known = [field.name for field in dataclasses.fields(getattr(schema, unknown[2]))]
        name = override[1] if override else unknown[1]
        return f"unknown key {name}{did_you_mean(unknown[1], known)} (known here: {', '.join(known)})"
    if override and override[1].startswith("trainer."):
        return f"{override[1]} has no default here: give more Lightning Trainer flags as +{override[1]}=..."
    group = re.search(r"Could not find '(\w+)/([^']+)'\s+Available options in '\w+':(.*)", text, re.S)
    if group:
        choices = group[3].split("Config search path")[0].split()
        hint = did_you_mean(group[2], choices)
        return f"{group[1]}={group[2]} is unknown: choose one of {', '.join(choices)}{hint}"
    merging = re.match(r"Error merging override (.*)", str(error))
    if merging:
        return f"{merging[1]}: {str(error.__cause__).splitlines()[0]}"
    full_key = re.search(r"full_key: (\S+)", text)
    first = str(error).split("full_key:")[0].split("See https")[0]
    return f"{full_key[1]}: {first}" if full_key and full_key[1] not in first else first


def hydra_entry(config_dir: Path, config_name: str, job: Callable[[Any], Any]) -> None:
    """Runs `job(cfg)` under Hydra with CONFIG_DIR/CONFIG_NAME.yaml; mistakes end in one line."""
    register()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of being printed

    @functools.wraps(job)
    def guarded(cfg: Any) -> Any:
        try:
            return job(cfg)
        except UserMistake as mistake:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                raise  # the other trials go on; Hydra reports this one at the end
            fail(str(mistake))

    def run() -> None:
        decorate = hydra_main(version_base="1.3", config_path=str(config_dir), config_name=config_name)
        try:
            decorate(guarded)()
        except (HydraException, OmegaConfBaseException) as error:
            raise UserMistake(explain(error)) from error

    one_line_mistakes(run)
