"""Names and captions of any Unicode, through a run: read, split, stored, read by its resume, printed."""

import io
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.image_folders import write_image
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ghibli.config.files import from_yaml, to_yaml
from ghibli.config.schema import Config
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.folder import summarise
from ghibli.runs.folder import RunDir
from ghibli.runtime.console import PlainConsole
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import write_text
from ghibli.runtime.terminal import Terminal, one_line

NOT_UTF8 = st.sampled_from([os.fsdecode(bytes([byte])) for byte in (0x80, 0xE9, 0xFF)])
LETTERS = st.one_of(st.characters(codec="utf-8", exclude_characters="/\0\\"), NOT_UTF8)
NAMES = st.text(LETTERS, min_size=1, max_size=20)
CAPTIONS = st.text(st.characters(codec="utf-8"), max_size=40)


@pytest.fixture(scope="module")
def plain(make_config: Callable[..., Config]) -> Config:
    return make_config("data.style=''", "data.caption=none")


def data_of(config: Config, run: RunDir) -> GhibliDataModule:
    """Read and split the images of a run, as its start and each resume do."""
    data = GhibliDataModule(config, None, run, 1000)
    data._write_split(data.read(), data.held_out)
    return data


@settings(max_examples=10, deadline=None, derandomize=True)
@given(rows=st.dictionaries(NAMES, CAPTIONS, min_size=2, max_size=4), place=NAMES)
@example(
    rows={"[/INST]\x1b[2J": "[/INST]", "\n\x85 \u2028": "\x85", "\udcff": '|,"'},
    place="\x85 \u2028\n(1)\udce9",
)
@example(rows={"a": "", "b": "x\x85y"}, place="a\x85b")  # PyYAML reads it back as a space
def test_they_survive_a_run(rows: dict[str, str], place: str, plain: Config) -> None:
    assume("${" not in place)  # which Hydra reads as a reference
    with tempfile.TemporaryDirectory() as parent:
        root, run = Path(parent, f"set{place}"), RunDir(Path(parent, f"run{place}"))
        names = {f"{at}{name}.png": caption for at, (name, caption) in enumerate(rows.items())}
        for name in names:
            write_image(root / name)
        lines = [json.dumps({"file_name": name, "text": caption}) for name, caption in names.items()]
        (root / "metadata.jsonl").write_text("\n".join(lines))
        config = replace(plain, data=replace(plain.data, root=str(root)))
        write_text(run.config, to_yaml(config))
        assert from_yaml(run.config) == config

        data = data_of(config, run)
        found = {image.name: image.caption for image in data.folder.images}
        assert found == {name: " ".join(text.split()) or "none" for name, text in names.items()}
        split = json.loads(run.split.read_text(encoding="utf-8"))
        assert [*split["train"], *split["val"]] and {*split["train"], *split["val"]} == set(names)
        assert [image.name for image in data_of(config, run).train_images] == list(split["train"])  # resumed
        changed = lines[0].replace('"text": "', '"text": "no ')
        (root / "metadata.jsonl").write_text("\n".join([changed, *lines[1:]]))
        with pytest.raises(UserError, match="is not the same as when the run was started"):
            data_of(config, run)

        said = summarise(dict.fromkeys(names, "it is empty"), most=9)
        assert (
            said == f"{len(names)} skipped: {', '.join(f'{one_line(name)} (it is empty)' for name in names)}"
        )
        for encoding in ("utf-8", "latin-1", "ascii"):
            content = io.BytesIO()
            stream = io.TextIOWrapper(content, encoding=encoding, newline="")
            PlainConsole(file=Terminal(stream), width=10_000).print(said)
            stream.flush()
            assert content.getvalue() == said.encode(encoding, "backslashreplace") + b"\n"
