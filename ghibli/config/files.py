"""A `Config` as YAML with a checksum, and back; settings changed after a run."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.schema import LATER_KEYS, RENAMED_KEYS, Config
from ghibli.runtime.errors import UserError

SEAL = "# sha256 of the lines above: "


def checked(content: Any, kind: type = Config) -> Any:
    """Nested dictionaries as a `Config` or a part of it, whose types and ranges are thereby checked."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), content))
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def to_yaml(config: Config) -> str:
    """The whole configuration, resolved, as YAML; the last line is a checksum."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def with_present_names(content: Any) -> Any:
    """Give the keys of an older version's config.yaml the names they have now."""
    for (section, before), now in RENAMED_KEYS.items():
        inner = content.get(section) if isinstance(content, dict) else None
        if isinstance(inner, dict) and before in inner:
            content[section] = {now if key == before else key: value for key, value in inner.items()}
    return content


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a run's config.yaml as nested dictionaries, unchecked; None when it is missing or damaged."""
    try:
        content = with_present_names(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def from_yaml(path: Path) -> Config:
    """The configuration that a run wrote to its config.yaml.

    Raises:
        UserError: the file is damaged or was written by another version of this project.
    """
    try:
        text = path.read_text(encoding="utf-8")
        config = checked(OmegaConf.merge(LATER_KEYS, with_present_names(yaml.safe_load(text))))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split("full_key:")[0].split())
        raise UserError(f"{path} is not the configuration of a run of this version: {reason}") from error
    settings, seal, digest = text.partition(SEAL)
    if seal and digest.strip() != hashlib.sha256(settings.encode()).hexdigest():
        raise UserError(
            f"{path} was changed or damaged after the run wrote it, and its result would be another: put it "
            "back (its last line is a checksum), or start a new run"
        )
    return config


def changed(config: Config, words: list[str], allowed: tuple[str, ...]) -> Config:
    """The configuration with KEY=VALUE words applied, such as evaluate.samples=100.

    Args:
        allowed: keys and sections that may be changed.

    Raises:
        UserError: another key, or a value that is not accepted.
    """
    for word in words:
        key = word.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(f"{word}: only {', '.join(allowed)} can be changed after a run")
    with hydra_errors():
        merged = OmegaConf.merge(OmegaConf.structured(config), OmegaConf.from_dotlist(words))
        return checked(OmegaConf.to_container(merged))
