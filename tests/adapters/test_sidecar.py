"""The file of trigger words beside an adapter, and names for other programs."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from ghibli.adapters.sidecar import clean_name, write_sidecar
from ghibli.models.base import BaseModel


def test_what_a1111_writes_beside_a_file_stays(
    make_config: Callable, tmp_path: Path, base: BaseModel
) -> None:
    (tmp_path / "it.json").write_text('{"notes": "mine"}')
    write_sidecar(tmp_path / "it.safetensors", make_config(), base)
    assert json.loads((tmp_path / "it.json").read_text()) == {"notes": "mine"}


def test_names_for_other_programs() -> None:
    """A1111 splits `<lora:NAME:1>` at colons and reads an = as an option."""
    texts = ("lora.rank=8,lr=1e-4", "a:b>c", "  ", "...", "naïve ジブリ", "x" * 300, "ジ" * 85, "../../etc/x")
    for name in map(clean_name, texts):
        assert re.fullmatch(r"[\w+-][\w.+-]*", name), name
        assert len(os.fsencode(f"{name}_merged.safetensors")) <= 255
    assert clean_name("lora.rank=8,lr=1e-4") == "lora.rank_8_lr_1e-4"
