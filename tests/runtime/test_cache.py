"""Rows of the cache: a new image costs one row, and rows equal those computed without the cache."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ghibli.data.folder import read_folder
from ghibli.data.latents import encode
from ghibli.models.base import BaseModel
from ghibli.runtime import cache


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names in each call of `make`; shards hold three rows."""
    monkeypatch.setattr(cache, "SHARD", 3)
    return []


def rows(folder: Path, names: list[str], made: list[list[str]], key: str = "vae") -> torch.Tensor:
    def make(missing: list[str], before: int, total: int) -> dict[str, torch.Tensor]:
        assert before == sum(map(len, made)) - start and total <= len(set(names))
        made.append(missing)
        return {"value": torch.tensor([[float(len(name)), ord(name[0])] for name in missing])}

    start = sum(map(len, made))
    return cache.cached_rows(folder, {"key": key}, names, make)["value"]


def expected(names: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(name)), ord(name[0])] for name in names])


def test_only_new_rows_are_computed(tmp_path: Path, made: list[list[str]]) -> None:
    names = ["a", "bb", "ccc", "dddd", "a"]
    assert torch.equal(rows(tmp_path, names, made), expected(names))
    assert made == [["a", "bb", "ccc"], ["dddd"]]
    edited = ["dddd", "bb", "e", "a"]
    assert torch.equal(rows(tmp_path, edited, made), expected(edited))
    assert made[2:] == [["e"]]
    assert torch.equal(rows(tmp_path, edited, made, key="another VAE"), expected(edited))
    assert made[3:] == [["dddd", "bb", "e"], ["a"]]


def test_a_damaged_shard_is_recomputed(tmp_path: Path, made: list[list[str]]) -> None:
    names = ["a", "bb", "ccc", "dddd"]
    rows(tmp_path, names, made)
    for file in tmp_path.glob("*.pt"):
        if len(file.read_bytes()) > 0 and torch.load(file, weights_only=True)["names"] == ["dddd"]:
            file.write_bytes(file.read_bytes()[:-7])
    assert torch.equal(rows(tmp_path, names, made), expected(names))
    assert made[2:] == [["dddd"]]


def test_rows_computed_before_a_kill_stay(tmp_path: Path, made: list[list[str]]) -> None:
    def killed(missing: list[str], before: int, total: int) -> dict[str, torch.Tensor]:
        if before:
            raise KeyboardInterrupt
        return {"value": expected(missing)}

    with pytest.raises(KeyboardInterrupt):
        cache.cached_rows(tmp_path, {"key": "vae"}, ["a", "bb", "ccc", "dddd"], killed)
    rows(tmp_path, ["a", "bb", "ccc", "dddd"], made)
    assert made == [["dddd"]]


def test_latents_do_not_depend_on_the_rest_of_the_batch(images: Path, base: BaseModel) -> None:
    paths = [p.path for p in read_folder(images, style="", default_caption=None, min_side=1).images][:9]
    together = encode(base, paths, resolution=64, resize="squash")
    alone = encode(base, paths[4:5], resolution=64, resize="squash")
    assert torch.equal(together.mean[4:5], alone.mean) and torch.equal(together.logvar[4:5], alone.logvar)
    with Image.open(paths[4]) as image:
        assert image.size[0] >= 64
