"""What A1111, Forge and InvokeAI read beside an adapter, and the name under which they list it."""

import re
from pathlib import Path

from ghibli.config.schema import Config, describe
from ghibli.models.base import BaseModel
from ghibli.runtime.files import shortened, write_json

LONGEST = 100  # bytes of a name, so that one with an ending fits any file system


def clean_name(text: str) -> str:
    """Turn a text into a name for files and for `<lora:NAME:1>`, which colon, comma, = and > would end."""
    return shortened(re.sub(r"[^\w.+-]+", "_", text).strip("._-"), LONGEST) or "adapter"


def title_of(style: str, settings: str) -> str:
    """Return a readable title: the style's words, then what was trained."""
    words = style.strip(" ,")
    title = f"{words}: {settings}" if words else settings
    return title.encode("utf-8", "replace").decode()


def write_sidecar(adapter_file: Path, config: Config, base: BaseModel) -> None:
    """Write NAME.json beside an adapter file: trigger words, title and the base's version.

    A file that is there already stays: A1111 keeps there what its user typed.
    """
    target = adapter_file.with_suffix(".json")
    if target.exists():
        return
    content = {
        "description": title_of(config.data.style, describe(config)),
        "sd version": "SD2" if base.family == "sd2" else "SD1",
        "activation text": config.data.style.strip(" ,").encode("utf-8", "replace").decode(),
        "preferred weight": 1.0,
        "notes": f"clip skip {config.model.clip_skip}" if config.model.clip_skip > 1 else "",
    }
    write_json(target, content)
