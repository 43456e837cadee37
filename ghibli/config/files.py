"""A `Config` as YAML with a checksum, and back; overrides applied after a run."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.schema import LATER_KEYS, RENAMED_KEYS, Config
from ghibli.runtime.errors import UserError

CHECKSUM_LINE = "# sha256 of the lines above: "


def to_dataclass(content: Any, section: type = Config) -> Any:
    """Convert nested dictionaries to a `Config`, or to one section of it.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type or out of range.
    """
    with hydra_errors():
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), content))


def section_to_dataclass(cfg: Any, name: str) -> Any:
    """Convert one section of a composed config, such as `lora`, checking nothing else.

    Raises:
        UserError: as to_dataclass, with the key in full.
    """
    with hydra_errors():
        content = OmegaConf.to_container(cfg[name], resolve=True)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), {name: content})[name])


def to_yaml(config: Config) -> str:
    """Write all settings, interpolations resolved, as YAML whose last line is a checksum."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return f"{text}{CHECKSUM_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


class TreeLoader(yaml.SafeLoader):
    """Reads YAML without aliases: we write none, and ten lines of them can stand for a billion values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which no run writes")
        return super().compose_node(parent, index)


def load_tree(text: str) -> Any:
    """Read YAML as plain values without aliases.

    Raises:
        yaml.YAMLError: it is no YAML, has aliases, or is nested too deeply.
    """
    try:
        return yaml.load(text, TreeLoader)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


def rename_old_keys(content: Any) -> Any:
    """Rename the keys of a config.yaml of an older version to the current ones."""
    for (section, old), new in RENAMED_KEYS.items():
        inner = content.get(section) if isinstance(content, dict) else None
        if isinstance(inner, dict) and old in inner:
            content[section] = {new if key == old else key: value for key, value in inner.items()}
    return content


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a run's config.yaml as nested dictionaries, unchecked; None when it is missing or damaged."""
    try:
        content = rename_old_keys(load_tree(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def from_yaml(path: Path) -> Config:
    """Read the config.yaml of a run.

    Raises:
        UserError: the file is damaged, was edited, or was written by an incompatible version.
    """
    try:
        text = path.read_text(encoding="utf-8")
        with hydra_errors():
            content = OmegaConf.merge(LATER_KEYS, rename_old_keys(load_tree(text)))
        config = to_dataclass(content)
    except (OSError, ValueError, yaml.YAMLError) as error:  # a UserError is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a run's configuration of this version: {reason}") from error
    settings, line, digest = text.partition(CHECKSUM_LINE)
    if line and digest.strip() != hashlib.sha256(settings.encode()).hexdigest():
        raise UserError(
            f"{path} was edited or damaged after the run wrote it (its last line is a checksum), so the "
            "result would differ: restore it, or start a new run"
        )
    return config


def apply_overrides(config: Config, overrides: list[str], allowed: tuple[str, ...]) -> Config:
    """Return the configuration with KEY=VALUE overrides applied, such as evaluate.samples=100.

    Args:
        allowed: keys and sections that may be changed.

    Raises:
        UserError: another key, or a value that is not accepted.
    """
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(f"{override}: only {', '.join(allowed)} can be changed after a run")
    with hydra_errors():
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(overrides))
        return to_dataclass(OmegaConf.to_container(merged))
