"""Folders within folders: what is entered, how often kohya's folders repeat, what stays outside."""

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_folders import captions_of, read
from PIL import Image

from ghibli.data.dataset import EncodedImages, EpochPlan, TrainExamples, check_shared_memory
from ghibli.data.folder import recognised
from ghibli.data.latents import Moments
from ghibli.inference.photos import find_photos
from ghibli.prepare.captioning import caption_folder
from ghibli.prepare.download import fetch
from ghibli.runtime.errors import UserError, loader_trouble
from ghibli.runtime.files import write_json


def noise(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def kohya_set(root: Path) -> Path:
    """`img/` as kohya's trainer wants it."""
    for place in range(3):
        noise(root / "10_ghibli style" / f"{place}.png", place)
    (root / "10_ghibli style" / "0.txt").write_text("a cat")
    (root / "10_ghibli style" / "1.caption").write_text("a dog")
    noise(root / "2_other" / "0.png", 7).with_suffix(".txt").write_text("a house")
    noise(root / "0_unused" / "0.png", 8)
    return root


def test_kohya_s_folders_are_entered_with_their_repeats(tmp_path: Path) -> None:
    folder = read(kohya_set(tmp_path))
    assert {image.name: (image.caption, image.repeats) for image in folder.images} == {
        "10_ghibli style/0.png": ("a cat, in ink", 10),
        "10_ghibli style/1.png": ("a dog, in ink", 10),
        "10_ghibli style/2.png": ("ghibli style, in ink", 10),
        "2_other/0.png": ("a house, in ink", 2),
    }
    assert folder.not_read == "1 image in 0_unused/ (1)"
    photos = {
        photo.path.relative_to(tmp_path).as_posix(): photo.prompt
        for photo in find_photos([tmp_path], None, ", in ink")
    }
    assert photos == {image.name: image.caption for image in folder.images}  # the same captions to restyle
    assert "10_ghibli style/ (3 images, each 10 times in an epoch)" in recognised(tmp_path)


def test_an_epoch_has_each_image_as_often_as_its_folder_says(make_config: Callable) -> None:
    repeats = [3, 1, 2]
    moments = Moments(*torch.randn(2, 3, 4, 4, 4))
    ids = torch.ones(3, 77, dtype=torch.int64)
    images = EncodedImages(["a", "b", "c"], moments, None, ids, ids[0], [(32, 32)] * 3, 1.0, repeats)
    examples = TrainExamples(images, EpochPlan(6, 2, 1000), make_config().loss, 1)
    for epoch in range(2):
        seen = Counter(examples[epoch * 6 + place]["name"] for place in range(6))
        assert seen == {"a": 3, "b": 1, "c": 2}


def test_a_single_inner_folder_is_entered(tmp_path: Path) -> None:
    for place in range(2):
        noise(tmp_path / "set" / "inner" / "images" / f"{place}.png", place)
    (tmp_path / "set" / "inner" / "captions.txt").write_text("0.png|one\n1.png|two\n")
    assert captions_of(read(tmp_path / "set")) == {"0.png": "one, in ink", "1.png": "two, in ink"}
    assert recognised(tmp_path / "set") == "inner/images/ with captions.txt"
    noise(tmp_path / "set" / "inner" / "images" / "2.png", 5)
    result = caption_folder(tmp_path / "set", lambda: lambda images: ["new"] * len(images), batch_size=2)
    assert result.written == {"2.png": "new"}
    assert captions_of(read(tmp_path / "set"))["2.png"] == "new, in ink"


def test_an_image_has_the_longest_name_that_a_file_can_have(tmp_path: Path) -> None:
    """Beside it a .txt fits, and a .caption does not."""
    names = [f"{'x' * 251}.png", f"{'ä' * 125}.jpeg", "b.png"]
    for place, name in enumerate(names):
        noise(tmp_path / name, place)
    (tmp_path / names[1]).with_suffix(".txt").write_text("a cat")
    found = read(tmp_path, caption="other")
    assert found.unusable == {} and not found.not_read
    assert captions_of(found) == {
        names[0]: "other, in ink",
        names[1]: "a cat, in ink",
        "b.png": "other, in ink",
    }
    assert recognised(tmp_path) == "images with a .txt beside each"
    assert [photo.prompt for photo in find_photos([tmp_path / names[1]], None, "")] == ["a cat"]


# Inside the folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """An image and a caption outside of the set."""
    noise(tmp_path / "private" / "me.png", 1).with_suffix(".txt").write_text("SECRET")
    return tmp_path / "private"


def refused(root: Path) -> dict[str, str]:
    found = read(root, caption="plain")
    assert not any("SECRET" in image.caption for image in found.images)
    return found.unusable


def test_captions_do_not_lead_out_of_the_folder(tmp_path: Path, secret: Path) -> None:
    root = tmp_path / "set"
    for place in range(5):
        noise(root / f"{place}.png", place)
    names = [str(secret / "me.png"), "../private/me.png", "x/../../private/me.png"]
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": "x"}) for n in names))
    (root / "link.png").symlink_to(secret / "me.png")
    (root / "0.txt").symlink_to(secret / "me.txt")
    (root / "sub").symlink_to(secret)
    (root / "captions.txt").write_text("sub/me.png|x\nnul\0.png|x\n" + "n" * 300 + ".png|x\n1.png|inside\n")
    found = refused(root)
    for name in (str(secret / "me.png"), "../private/me.png", "link.png", "sub/me.png"):
        assert found[name] == "it leads out of the folder: copy the file into it"
    assert found["0.png"] == "0.txt: it leads out of the folder: copy the file into it"
    assert set(found) - {*names} == {"0.png", "link.png", "sub/me.png", "nul\0.png", "n" * 300 + ".png"}
    photos = find_photos([root], "p", "")
    assert [photo.path.name for photo in photos if os.path.exists(photo.path)] == [
        f"{n}.png" for n in range(5)
    ]


@pytest.mark.parametrize("name", ["captions.txt", "metadata.jsonl", "metadata.csv", "images/captions.txt"])
def test_a_caption_table_does_not_lead_out_of_the_folder(tmp_path: Path, secret: Path, name: str) -> None:
    """Training would learn another set's captions, and `ghibli caption` would copy the file into this one."""
    for place in range(2):
        noise(tmp_path / "set" / "images" / f"{place}.png", place)
    table = secret / "table"
    table.write_text("0.png|SECRET\n")
    (tmp_path / "set" / name).symlink_to(table)
    for act in (read, lambda root: caption_folder(root, lambda: lambda images: ["x"] * 2, batch_size=2)):
        with pytest.raises(UserError, match=f"{name} cannot be used: it leads out of the folder"):
            act(tmp_path / "set")
    assert table.read_text() == "0.png|SECRET\n" and (tmp_path / "set" / name).is_symlink()


def test_shards_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    """The images of another set would be unpacked into this one."""
    (tmp_path / "set").mkdir()
    (tmp_path / "theirs.parquet").write_bytes(b"PAR1")
    (tmp_path / "set" / "train-0.parquet").symlink_to(tmp_path / "theirs.parquet")
    with pytest.raises(UserError, match=r"train-0.parquet cannot be used: it leads out of the folder"):
        fetch(str(tmp_path / "set"), tmp_path / "data", lambda done, total: None)
    assert not (tmp_path / "data").exists()


def test_a_link_within_the_folder_and_a_linked_set_are_fine(tmp_path: Path) -> None:
    for place in range(2):
        noise(tmp_path / "set" / f"{place}.png", place)
    (tmp_path / "set" / "2.png").symlink_to("1.png")
    (tmp_path / "data").symlink_to(tmp_path / "set")
    assert len(read(tmp_path / "data", caption="x").images) == 3
    (tmp_path / "set" / "metadata.csv").write_text(f"file_name,text\n{tmp_path / 'set' / '0.png'},absolute\n")
    assert captions_of(read(tmp_path / "set", caption="x"))["0.png"] == "absolute, in ink"


def test_the_hub_s_cache_links_to_its_blobs(tmp_path: Path) -> None:
    root = tmp_path / "datasets--a--b" / "snapshots" / "0a1b"
    root.mkdir(parents=True)
    for place in range(2):
        noise(tmp_path / "datasets--a--b" / "blobs" / f"{place}.png", place)
        os.symlink(f"../../blobs/{place}.png", root / f"{place}.png")
    assert len(read(root, caption="x").images) == 2


def test_a_file_that_is_no_caption_is_refused(tmp_path: Path) -> None:
    noise(tmp_path / "a.png", 1).with_suffix(".txt").write_bytes(b"x" * (2**20 + 1))
    noise(tmp_path / "b.png", 2)
    noise(tmp_path / "c.png", 3)
    assert read(tmp_path, caption="x").unusable == {"a.png": "a.txt is larger than 1 MiB: it is no caption"}


# Names in files


def test_split_json_tells_equal_names_apart(tmp_path: Path) -> None:
    for place, folder in enumerate(("1_a", "1_b")):
        noise(tmp_path / folder / "same.png", place)
    hashes = {image.name: image.content_hash for image in read(tmp_path, caption="x").images}
    assert list(hashes) == ["1_a/same.png", "1_b/same.png"]
    hashes["\udcff.png"] = "x"
    write_json(tmp_path / "split.json", hashes)
    assert json.loads((tmp_path / "split.json").read_text(encoding="utf-8")) == hashes


# Shared memory


def test_too_little_shared_memory_is_said_before_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 2**20

    monkeypatch.setattr("ghibli.data.dataset.shutil.disk_usage", lambda folder: Usage)
    with pytest.raises(UserError, match=r"data.workers=2: loader processes need .* set data.workers=0"):
        check_shared_memory(2, 2**16, tmp_path)
    Usage.free = 2**30
    check_shared_memory(2, 2**16, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader timed out after 120 seconds",
        "DataLoader worker (pid 3) is killed by signal: Bus error. It is possible that dataloader's workers "
        "are out of shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_loader_processes_that_hang_name_shared_memory(text: str) -> None:
    assert "/dev/shm" in (loader_trouble(RuntimeError(text)) or "")


def test_keys_below_null_are_one_line(train_py: Callable) -> None:
    done = train_py("data=ghibli", "data.draw.count=24", small=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.draw.count=24: data.draw is null here and has no keys")
    assert len(done.stderr.strip().splitlines()) == 1
