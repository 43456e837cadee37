"""Damaged and hostile files of runs and adapters: one line or nothing, never a traceback, and in bounds.

Two kinds of input: valid files with random bytes changed, and texts built from the format's own pieces.
The `fuzz` variants try 10,000 inputs each: `make test ARGS="-m fuzz"`.
"""

import json
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import REPO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ghibli.adapters.files import read_adapter
from ghibli.config.files import CHECKSUM_LINE, from_yaml, read_settings
from ghibli.models.load import load
from ghibli.report.run_data import read_run
from ghibli.runs import compare, listing
from ghibli.runs.folder import RunDir, read_checkpoint
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import is_whole
from ghibli.runtime.resources import resident_memory

KEPT = REPO / "tests" / "end_to_end" / "runs_of_73ce106" / "finished"
BOUND = 400e6  # bytes that reading damaged files of a few kB may add to the process
COUNTS = [150, pytest.param(10_000, marks=pytest.mark.fuzz)]
SEEDS = st.integers(0, 2**32 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


PIECES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999", b"-1", b"[", b'"', b"\n")


def damaged(content: bytes, seed: int) -> bytes:
    """Return a file with one to four damages, each of a random kind in a random place."""
    draws, data = random.Random(seed), bytearray(content)
    for _ in range(draws.randint(1, 4)):
        place, length = draws.randrange(len(data) + 1), draws.choice((1, 1, 2, 8, 64))
        kind = draws.choice(("flip", "insert", "delete", "repeat", "swap", "nest"))
        piece = bytes(data[place : place + length])
        if kind == "flip":
            data[place : place + length] = draws.randbytes(len(piece))
        elif kind == "insert":
            data[place:place] = draws.choice(
                (b"\x00", b"\xff", b"\xed\xa0\x80", b"NaN", b"1e999", b"-1", b"[", b'"')
            )
        elif kind == "delete":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = piece * draws.choice((2, 50))
        elif kind == "swap":
            other = draws.randrange(len(data) + 1)
            data[other : other + length] = piece
        else:
            data[place:place] = draws.choice((b"[", b"{", b'{"a":', b"- ")) * draws.choice((3, 3_000))
    return bytes(data)


def try_all(count: int, inputs: st.SearchStrategy, read: Callable[[object], object]) -> None:
    """Read `count` inputs: nothing but a UserError may come out, and memory stays in bounds."""

    @settings(max_examples=count, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(inputs)
    def once(content: object) -> None:
        with suppress(UserError):
            read(content)

    before = resident_memory()
    once()
    assert resident_memory() - before < BOUND


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run and an evaluation of it."""
    folder = tmp_path / "run"
    shutil.copytree(KEPT, folder)
    cell = {"sampler": "ddim", "guidance": 1.0, "kernel": [1.0, 0.1], "frechet": 2.0, "caption_fit": None,
            "precision": 0.5, "recall": 0.5}  # fmt: skip
    content = {"features": "style", "models": {"base": [cell], "run": [cell]}, "real": cell, "scan": {},
               "samples": 3, "reference_images": 3, "floor_images": 3, "findings": []}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(content))
    shutil.rmtree(folder / "checkpoints")
    return RunDir(folder)


SHORT = "seed: 0\nfinetune: lora\n"  # settings that are read in no time


@pytest.fixture
def other(tmp_path: Path) -> RunDir:
    """A run to compare with."""
    (tmp_path / "other").mkdir()
    shutil.copy(KEPT / "status.json", tmp_path / "other")
    (tmp_path / "other" / "config.yaml").write_text(SHORT)
    return RunDir(tmp_path / "other")


def read_everywhere(run: RunDir, other: RunDir) -> None:
    """Read a run as list, report, compare and resume do."""
    _ = [row.cells for row in listing.listed([run])]
    data = read_run(run, with_scores=False)
    _ = data.probe, data.metrics, data.distances, data.evaluation, data.gain, data.best_epoch, data.findings
    with suppress(UserError):
        sides = compare.read_side(str(run.path)), compare.read_side(str(other.path))
        compare.compare(*sides)


def read_config(run: RunDir) -> None:
    read_settings(run.config)
    from_yaml(run.config)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    "name", ["status.json", "evaluation.json", "split.json", "config.yaml", "metrics.csv", "probe.csv"]
)
def test_damaged_files_of_a_run(run: RunDir, other: RunDir, name: str, count: int) -> None:
    file = run.path / name
    content = file.read_bytes()
    share = count // 5 if count < 1000 and name == "config.yaml" else count
    if name != "config.yaml":
        run.config.write_text(SHORT)

    def read(seed: object) -> None:
        file.write_bytes(damaged(content, seed))
        if name == "config.yaml":
            read_config(run)
        else:
            read_everywhere(run, other)

    before = {path for path in run.path.parent.rglob("*")}
    try_all(share, SEEDS, read)
    assert {path for path in run.path.parent.rglob("*")} == before


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["evaluation.json", "status.json"])
def test_values_of_other_types_in_a_run(run: RunDir, other: RunDir, name: str, count: int) -> None:
    """Well-formed JSON of the right keys, without a checksum, as a stranger can write it."""
    file = run.path / name
    content = json.loads(file.read_text())
    content.pop("sha256", None)
    run.config.write_text(SHORT)

    def read(changes: dict) -> None:
        file.write_text(json.dumps(content | changes))
        read_everywhere(run, other)

    try_all(count, st.dictionaries(st.sampled_from([*content, "starts"]), JSON, max_size=3), read)


def test_nesting_and_aliases_stop_nothing(run: RunDir, other: RunDir) -> None:
    """Seconds and megabytes, not hours: `lol` nine times over is a billion of them."""
    for text in ("[" * 100_000, '{"a":' * 100_000):
        for file in (run.status.path, run.evaluation, run.split):
            file.write_text(text)
        read_everywhere(run, other)
    bomb = ["a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    for one, two in zip("abcdefghi", "bcdefghij", strict=True):
        bomb.append(f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]")
    for text in ("\n".join(bomb), "a: &a [*a]", "[" * 2_000, f"{CHECKSUM_LINE}x"):
        run.config.write_text(text)
        read_everywhere(run, other)
        assert read_settings(run.config) is None
        with pytest.raises(UserError):
            from_yaml(run.config)


# Adapters and checkpoints


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("where", ["header", "anywhere"])
def test_damaged_adapters(demo, tmp_path: Path, where: str, count: int) -> None:
    """The length, the JSON header and the tensors' offsets of a safetensors file, byte by byte."""
    file = tmp_path / "a.safetensors"
    content = (KEPT / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    head = content[: length if where == "header" else len(content)]

    def read(seed: int) -> None:
        file.write_bytes(damaged(head, seed) + content[len(head) :])
        read_adapter(file, demo, "import")

    try_all(count, SEEDS, read)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("count", COUNTS)
def test_hostile_metadata_of_adapters(demo, tmp_path: Path, count: int) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {"unet.a.lora_A.weight": torch.zeros(1, 1)}
    names = st.sampled_from(["unet_lora_adapter_metadata", "lora_adapter_metadata", "ss_network_dim", "x"])

    def read(metadata: dict[str, str]) -> None:
        save_file(tensors, file, metadata)
        read_adapter(file, demo, "import")

    texts = JSON.map(json.dumps) | st.text(st.characters(exclude_categories=["Cs"]))
    try_all(count, st.dictionaries(names, texts, max_size=2), read)


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_checkpoints(tmp_path: Path, count: int) -> None:
    """A damage changes the checksum; a stranger may have computed it anew, so the content is read too."""
    file = tmp_path / "last.ckpt"
    torch.save({"global_step": 1, "state_dict": {"a": torch.ones(3)}, "probe": [1.5, "x", None]}, file)
    content = file.read_bytes()

    def read(seed: int) -> None:
        file.write_bytes(damaged(content, seed))
        assert not is_whole(file)
        read_checkpoint(file)

    try_all(count, SEEDS, read)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_yaml_reads_no_objects(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"a: !!python/object/apply:os.mkdir [{tmp_path}/ran]")
    assert read_settings(file) is None and not (tmp_path / "ran").exists()
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(file.read_text())
