"""data.exclude: which images are left out, what stays on its side of the split, and what is refused."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.image_folders import read, write_image

from ghibli.config.paths import check_paths
from ghibli.config.schema import Config
from ghibli.data import exclude, sources
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.exclude import excluded_names, write_names
from ghibli.data.sources import image_set_hash
from ghibli.data.split import split_by_content
from ghibli.runs.folder import RunDir
from ghibli.runs.identity import settings_hash
from ghibli.runtime.errors import UserError


def names(images: list) -> list[str]:
    return [image.name for image in images]


def data_of(config: Config, run: Path) -> GhibliDataModule:
    data = GhibliDataModule(config, None, RunDir(run), 1000)
    data.read()
    return data


@pytest.fixture
def split(make_config: Callable[..., Config], tmp_path: Path) -> GhibliDataModule:
    """The images as they are split without a list."""
    return data_of(make_config("data.val_fraction=0.4"), tmp_path)


def listing(tmp_path: Path, listed: list[str]) -> str:
    write_names(tmp_path / "list.txt", listed)
    return f"data.exclude={tmp_path / 'list.txt'}"


def test_only_the_listed_images_are_left_out(
    make_config: Callable[..., Config], split: GhibliDataModule, tmp_path: Path
) -> None:
    out = [names(split.train_images)[1], names(split.train_images)[4], names(split.held_out)[2]]
    config = make_config("data.val_fraction=0.4", listing(tmp_path, out))
    found = data_of(config, tmp_path)
    assert names(found.train_images) == [name for name in names(split.train_images) if name not in out]
    assert names(found.held_out) == [name for name in names(split.held_out) if name not in out]
    assert found.excluded == sorted(out) and len(found.shapes) == len(split.shapes) - 2
    everything, kept = split.folder.images, found.folder.images
    assert image_set_hash(kept) != image_set_hash(everything)
    assert image_set_hash(kept) == image_set_hash([image for image in everything if image.name not in out])
    assert settings_hash(config) != settings_hash(make_config("data.val_fraction=0.4"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of a list."""
    messages: list[str] = []
    monkeypatch.setattr(exclude.logger, "warning", messages.append)
    return messages


@pytest.mark.parametrize("change", ["shorter", "other names", "deleted"])
def test_a_started_run_keeps_its_images_whatever_becomes_of_the_list(
    make_config: Callable[..., Config], split: GhibliDataModule, tmp_path: Path, said: list[str], change: str
) -> None:
    """Resumed, evaluated or measured, and one line says that the list is another; a new run reads it."""
    out, run = names(split.train_images)[:2], RunDir(tmp_path / "run")
    config = make_config("data.val_fraction=0.4", listing(tmp_path, out))
    config = replace(config, data=replace(config.data, reference=None))
    started = data_of(config, run.path)
    started._write_split(started.read(), started.held_out)
    before = run.split.read_bytes()
    assert names(data_of(config, run.path).train_images) == names(started.train_images) and not said
    if change == "deleted":
        (tmp_path / "list.txt").unlink()
    else:
        listing(tmp_path, out[:1] if change == "shorter" else ["of another set.png"])
    resumed = data_of(config, run.path)
    resumed._write_split(resumed.read(), resumed.held_out)
    assert names(resumed.train_images) == names(started.train_images) and resumed.excluded == sorted(out)
    assert run.split.read_bytes() == before
    _, training = sources.real_images(config, run)
    assert set(names(training)) == set(names(split.train_images)) - set(out)
    text = "is not as it was when the run was started, or gone: the 2 images that its split.json names stay"
    assert said == [f"data.exclude={tmp_path}/list.txt {text} left out"] * 2
    if change == "shorter":
        assert data_of(config, tmp_path / "new").excluded == out[:1]
    else:
        with pytest.raises(UserError, match="data.exclude="):
            data_of(config, tmp_path / "new")


def test_what_an_attempt_without_a_start_left_is_not_read(
    make_config: Callable[..., Config], split: GhibliDataModule, tmp_path: Path
) -> None:
    """A split.json beside no data_hash is of no run that goes on, and a damaged one tells nothing."""
    out, run = names(split.train_images)[:2], RunDir(tmp_path / "run")
    run.path.mkdir()
    config = make_config("data.val_fraction=0.4", listing(tmp_path, out))
    run.split.write_text('{"train": {}, "val": {}, "unusable": {}}')
    assert data_of(config, run.path).excluded == sorted(out)
    run.split.write_text("{")
    run.status.update(data_hash="0" * 64)
    assert data_of(config, run.path).excluded == sorted(out)


def test_other_images_than_the_run_was_started_with_are_named(
    make_config: Callable[..., Config], split: GhibliDataModule, tmp_path: Path
) -> None:
    run, where = RunDir(tmp_path / "run"), rf"data.root=.* without data.exclude={tmp_path}/list.txt"
    config = make_config("data.val_fraction=0.4", listing(tmp_path, names(split.train_images)[:2]))
    config = replace(config, data=replace(config.data, reference=None))
    started = data_of(config, run.path)
    started._write_split(started.read(), started.held_out)
    run.status.update(data_hash="0" * 64)
    with pytest.raises(UserError, match=rf"^{where}: these are not"):
        sources.real_images(config, run)
    resumed = data_of(config, run.path)
    with pytest.raises(UserError, match=rf"the image set {where} is not the same"):
        resumed._write_split(resumed.read(), resumed.held_out)


def test_a_copy_stays_in_training_when_its_original_is_left_out(
    make_config: Callable[..., Config], images: Path, tmp_path: Path
) -> None:
    """A held-out near-duplicate was moved to training; without its twin it must not turn up held out."""
    root = tmp_path / "set"
    shutil.copytree(images, root)
    plain = make_config("data.val_fraction=0.4")
    train, _ = split_by_content(data_of(plain, tmp_path).folder.images, 0.4)
    twin = root / "images" / "twin.png"
    for bits in range(300):  # the same pixels, other bytes, until they are held out
        twin.write_bytes(train[0].path.read_bytes() + bytes([bits % 256, bits // 256]))
        with open(root / "captions.txt", "a") as table:
            table.write("twin.png|a cat\n" if bits == 0 else "")
        data = data_of(replace(plain, data=replace(plain.data, root=str(root))), tmp_path)
        if "twin.png" in [image.name for image in data.moved]:
            break
    assert "twin.png" in names(data.train_images) and "twin.png" in names(list(data.moved))
    config = make_config(f"data.root={root}", "data.val_fraction=0.4", listing(tmp_path, [train[0].name]))
    found = data_of(config, tmp_path)
    assert "twin.png" in names(found.train_images) and names(found.held_out) == names(data.held_out)


def test_a_list_is_read_as_it_was_written_and_as_editors_save_it(tmp_path: Path) -> None:
    odd = ["a b.png", " c.png", os.fsdecode(b"d\xff.png"), "#e.png"]
    for name in odd:
        write_image(tmp_path / name)
    folder = read(tmp_path, caption="x")
    write_names(tmp_path / "list", odd)
    assert excluded_names(str(tmp_path / "list"), folder) == set(odd)
    (tmp_path / "list").write_bytes(b"\xef\xbb\xbfa b.png\r\n\r\n  #e.png \r\n")
    assert excluded_names(str(tmp_path / "list"), folder) == {"a b.png", "#e.png"}


def test_an_unknown_name_is_named_with_its_line(tmp_path: Path) -> None:
    for name in ("cat.png", "dog.png"):
        write_image(tmp_path / name)
    (tmp_path / "small.png").write_bytes(b"")  # unusable, but known
    folder = read(tmp_path, caption="x")
    (tmp_path / "list").write_text("dog.png\nsmall.png\n\nCat.png\nbird.png\n")
    with pytest.raises(UserError) as raised:
        excluded_names(str(tmp_path / "list"), folder)
    expected = "line 4: the image set has no image Cat.png; did you mean cat.png?; nor do lines 5 name one"
    assert str(raised.value) == f"data.exclude={tmp_path / 'list'} {expected}"


@pytest.mark.parametrize(("side", "said"), [("train_images", "to train on"), ("held_out", "held out")])
def test_what_leaves_nothing_is_refused(
    make_config: Callable[..., Config], split: GhibliDataModule, tmp_path: Path, side: str, said: str
) -> None:
    config = make_config("data.val_fraction=0.4", listing(tmp_path, names(getattr(split, side))))
    with pytest.raises(UserError, match=f"leaves no image {said}: shorten it"):
        data_of(config, tmp_path)


def test_a_missing_list_is_refused_before_anything_is_loaded(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    config = make_config(f"data.exclude={tmp_path / 'none.txt'}")
    with pytest.raises(UserError, match="none.txt: no such file"):
        check_paths(config)
    (tmp_path / "none.txt").mkdir()
    with pytest.raises(UserError, match="no such file"):
        check_paths(config)
