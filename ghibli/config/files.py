"""A `Config` as YAML with a checksum, and back; overrides applied after a run.

Settings that were resolved once, such as those in a run's config.yaml, are data: `${oc.env:HOME}` is that
text. Otherwise a run folder from elsewhere could copy this machine's environment into cards and metadata.
"""

import dataclasses
import hashlib
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ghibli.config.hydra_errors import hydra_errors
from ghibli.config.schema import LATER_KEYS, RENAMED_KEYS, Config
from ghibli.config.typed_paths import path_key, plain_path
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain

LONGEST = 2**20  # bytes of a config.yaml; ours have some thousand
CHANGED_BY_EVALUATE = (  # settings of an evaluation that may differ from those of the run
    "evaluate", "sample.samplers", "sample.guidance", "sample.num_inference_steps", "sample.seed",
    "data.reference", "model.clip", "cache_dir",
)  # fmt: skip
CHECKSUM_LINE = "# sha256 of the lines above: "


def as_data(content: Any) -> Any:
    """Escape every text in nested dictionaries and lists, so that OmegaConf interpolates none of it."""
    if isinstance(content, dict):
        return {as_data(key): as_data(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [as_data(value) for value in content]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", content) if isinstance(content, str) else content


def as_node(config: Config) -> Any:
    """Return a configuration as OmegaConf's typed node, to be changed or written."""
    return OmegaConf.merge(OmegaConf.structured(Config), as_data(dataclasses.asdict(config)))


def refuse_other_shapes(section: type, content: Any, prefix: str = "") -> None:
    """Refuse what OmegaConf takes for a list or a section: a text with `${`, and a list of lists.

    Args:
        section: a dataclass of the schema, without lists of lists.
        content: nested dictionaries for it; anything else in them is left to OmegaConf.
        prefix: of its keys, for the message.

    Raises:
        UserError: there is one.
    """
    if not isinstance(content, dict):
        return
    for name, hint in typing.get_type_hints(section).items():
        value, kind = content.get(name), present(hint)
        is_list, is_section = typing.get_origin(kind) is list, dataclasses.is_dataclass(kind)
        if is_section:
            refuse_other_shapes(kind, value, f"{prefix}{name}.")
        if isinstance(value, str | list) and (is_section or typing.get_origin(kind) is dict):
            raise UserError(f"{prefix}{name}: expected a section, found {value}")
        if isinstance(value, str) and is_list:
            raise UserError(f"{prefix}{name}: expected a list, found {value}")
        if is_list and isinstance(value, list) and any(isinstance(one, list | dict) for one in value):
            raise UserError(f"{prefix}{name}: expected a list of single values, found {value}")


def present(kind: Any) -> Any:
    """Return the type X of `X | None`, and any other type as it is."""
    return typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind


def to_dataclass(content: Any, section: type = Config) -> Any:
    """Convert nested dictionaries, whose interpolations are resolved, to a `Config` or to one section of it.

    Raises:
        UserError: an unknown key, a missing one, or a value of the wrong type or out of range.
    """
    refuse_other_shapes(section, content)
    with hydra_errors():
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), as_data(content)))


def section_to_dataclass(cfg: Any, name: str) -> Any:
    """Convert one section of a composed config, such as `lora`, checking nothing else.

    Raises:
        UserError: as to_dataclass, with the key in full.
    """
    with hydra_errors():
        content = OmegaConf.to_container(cfg[name], resolve=True)
        refuse_other_shapes(Config, {name: content})
        merged = OmegaConf.merge(OmegaConf.structured(Config), {name: as_data(content)})
        return OmegaConf.to_object(merged[name])


def to_yaml(config: Config) -> str:
    """Write all settings, interpolations resolved, as YAML whose last line is a checksum."""
    node = as_node(config)
    text = OmegaConf.to_yaml(node, resolve=True)
    if "\x85" in text:  # a line end to YAML, which PyYAML 6.0 writes as it is and reads as a space
        content = OmegaConf.to_container(node, resolve=True)
        text = yaml.safe_dump(content, allow_unicode=False, sort_keys=False)
    return f"{text}{CHECKSUM_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def rename_old_keys(content: Any) -> Any:
    """Rename the keys of a config.yaml of an older version to the current ones."""
    for (section, old), new in RENAMED_KEYS.items():
        inner = content.get(section) if isinstance(content, dict) else None
        if isinstance(inner, dict) and old in inner:
            content[section] = {new if key == old else key: value for key, value in inner.items()}
    return content


def with_later_keys(content: Any) -> Any:
    """Add the keys that an older version did not write, with what runs without them did."""
    if not isinstance(content, dict):
        return content
    added = dict(content)
    for key, later in LATER_KEYS.items():
        inner = content.get(key, {})
        if not isinstance(later, dict):
            added.setdefault(key, later)
        elif isinstance(inner, dict):
            added[key] = later | inner
    return added


class PlainLoader(yaml.SafeLoader):
    """A loader without aliases, of which a short file can make an endless one; we write none."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*NAME), which no run writes")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """Parse the YAML of a run's file as data.

    Raises:
        yaml.YAMLError, RecursionError: no YAML, an alias, or nested too deeply.
    """
    return yaml.load(text, PlainLoader)  # a SafeLoader


def read_settings(path: Path) -> dict[str, Any] | None:
    """Read a run's config.yaml as nested dictionaries, unchecked; None when it is missing or damaged."""
    try:
        content = rename_old_keys(plain_yaml(read_plain(path, LONGEST).decode()))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def from_yaml(path: Path) -> Config:
    """Read the config.yaml of a run.

    Raises:
        UserError: the file is damaged, was edited, or was written by an incompatible version.
    """
    try:
        text = read_plain(path, LONGEST).decode()
        config = to_dataclass(with_later_keys(rename_old_keys(plain_yaml(text))))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # a UserError is a ValueError
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
    settings = as_node(config)
    for override in overrides:
        key = override.partition("=")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in allowed):
            raise UserError(f"{override}: only {', '.join(allowed)} can be changed after a run")
    with hydra_errors():
        for override in overrides:
            found = path_key(override)
            path = None if found is None else plain_path(found[2])
            if found is None or path is None:
                settings = OmegaConf.merge(settings, OmegaConf.from_dotlist([override]))
            else:
                OmegaConf.update(settings, found[1], path)
        return to_dataclass(OmegaConf.to_container(settings, resolve=True))
