"""`ghibli influence` on a run: resumed after Ctrl-C, bounded in time, its list, its sheet and its section."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.report_material import page_of
from PIL import Image
from typer.testing import CliRunner

import train
from ghibli.cli.influence import closing_lines
from ghibli.cli.main import app
from ghibli.config.files import to_yaml
from ghibli.config.schema import Config
from ghibli.data.datamodule import GhibliDataModule
from ghibli.data.exclude import write_names
from ghibli.data.folder import CaptionedImage
from ghibli.evaluation.influence import Influences, RankedImage, read_influences
from ghibli.evaluation.statistics import Estimate
from ghibli.inference import influence as command
from ghibli.inference.gradients import Batch, HeldOut, Products
from ghibli.inference.influence import InfluenceOptions, influence, with_copies, write_list
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError

BLOCK = "attentions.1.transformer_blocks.0"
SETTINGS = (
    "trainer.max_epochs=2", "optimizer.lr=5e-3", "lora.rank=4", "lora.alpha=6", "data.val_fraction=0.4",
    "model.resolution=64", "lora.text_encoder=false", "sample.every_n_epochs=0", "threads=1",
    f"lora.targets=[{BLOCK}.attn1.to_v,{BLOCK}.attn2.to_v]",
)  # fmt: skip
ALL = InfluenceOptions(items=None, minutes=None, exclude=0.2)


@pytest.fixture(scope="module")
def trained(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A finished run of a few steps."""
    found = RunDir(tmp_path_factory.mktemp("influence") / "run")
    train.run(make_config(*SETTINGS), found)
    return found


@pytest.fixture(scope="module")
def measured(trained: RunDir) -> Influences:
    return influence(trained, finished_config(trained), ALL)


@pytest.fixture
def copied(trained: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the run without what was measured."""
    run = RunDir(tmp_path / "run")
    ignored = shutil.ignore_patterns("influence*")
    shutil.copytree(trained.path, run.path, ignore=ignored)
    return run


def images_of(run: RunDir) -> set[str]:
    return set(json.loads(run.split.read_text())["train"])


@pytest.mark.slow
def test_every_training_image_is_ranked(trained: RunDir, measured: Influences) -> None:
    assert {one.name for one in measured.ranked} == images_of(trained) and measured.is_whole
    values = [one.influence.value for one in measured.ranked]
    assert values == sorted(values, reverse=True)
    assert sum(map(abs, values)) / len(values) == pytest.approx(1)
    assert measured.preconditioned and measured.held_out == len(json.loads(trained.split.read_text())["val"])
    steps = [torch.load(file, weights_only=True)["global_step"] for file in
             (trained.best_checkpoint, trained.last_checkpoint)]  # fmt: skip
    assert len(measured.checkpoints) == len(set(steps))


@pytest.mark.slow
def test_interrupted_and_continued_equals_undisturbed(
    trained: RunDir, measured: Influences, copied: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, products = [], HeldOut.products

    def some(gradients: HeldOut, batch: Batch) -> Products:
        asked.append(batch)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return products(gradients, batch)

    monkeypatch.setattr(HeldOut, "products", some)
    with pytest.raises(KeyboardInterrupt):
        influence(copied, finished_config(copied), ALL)
    assert len(read_influences(copied.influence).blocks) == 4
    found = influence(copied, finished_config(copied), ALL)
    assert found == measured and len(asked) == 5 + len(measured.ranked) - 4
    for name in ("influence.csv", "influence_exclude.txt", "influence.png"):
        assert (copied.path / name).read_bytes() == (trained.path / name).read_bytes()


@pytest.mark.slow
def test_it_ends_in_time_and_goes_on(
    measured: Influences, copied: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited = replace(ALL, minutes=0)
    for count in (1, 2):
        found = influence(copied, finished_config(copied), limited)
        assert len(found.ranked) == count and not found.is_whole
    assert "as the measurement is unfinished" in page_of(copied.path).text
    kept = copied.influence.read_text()
    monkeypatch.setattr(command, "KEEP_EVERY", 0)  # a write after every image changes nothing
    assert influence(copied, finished_config(copied), ALL) == measured
    assert copied.influence.read_text() != kept


@pytest.mark.slow
def test_other_weights_are_measured_anew(measured: Influences, copied: RunDir, trained: RunDir) -> None:
    content = json.loads(trained.influence.read_text())
    content["of"]["weights"][0] = "0" * 64
    content["blocks"] = dict.fromkeys(content["blocks"], [1.0] * len(content["base"]))
    copied.influence.write_text(json.dumps(content))
    assert "influence.json is older than the run" in page_of(copied.path).text
    assert influence(copied, finished_config(copied), ALL) == measured


@pytest.mark.slow
def test_the_list_leaves_out_the_worst(trained: RunDir, measured: Influences, tmp_path: Path) -> None:
    file = trained.path / "influence_exclude.txt"
    config = finished_config(trained)
    config = replace(config, data=replace(config.data, exclude=str(file)))
    data = GhibliDataModule(config, None, RunDir(tmp_path), 1000)
    data.read()
    ordered = sorted(measured.ranked, key=lambda one: one.agreement)
    worst = {one.name for one in ordered[: round(0.2 * len(ordered))]}
    assert {image.name for image in data.train_images} == images_of(trained) - worst


@pytest.mark.slow
def test_the_page_and_the_sheet_show_both_ends(trained: RunDir, measured: Influences) -> None:
    page = page_of(trained.path)
    assert "Influence of the training images" in page.text
    odd = min(measured.ranked, key=lambda one: one.agreement)
    assert f"{odd.agreement:.1f}".replace("-", "\u2212") in page.text
    for one in (measured.ranked[0], measured.ranked[-1], odd):
        assert one.name in page.text and one.caption in page.text
        assert one.text.replace("+-", "\u00b1").replace("-", "\u2212") in page.text
    with Image.open(trained.path / "influence.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 700


@pytest.mark.slow
def test_the_command_says_what_it_did(measured: Influences, trained: RunDir) -> None:
    done = CliRunner().invoke(app, ["influence", str(trained.path), "--exclude", "20%"])
    assert done.exit_code == 0, done.output
    count = len(measured.ranked)
    assert f"{count} of {count} training images on {measured.held_out} held-out ones" in done.output
    assert f"the {round(0.2 * count)} that agree least" in done.output and "data.exclude=" in done.output
    assert measured.ranked[0].name in done.output and measured.ranked[-1].name in done.output


def ranking(**more: Any) -> Influences:
    """Five ranked images, of which `3.png` agrees least, then `2.png`."""
    ranked = [
        RankedImage(f"{place}.png", "a cat", Estimate(1.0, 0.1, freedom=7), agreement, 0)
        for place, agreement in enumerate((-1.0, -0.5, -4.0, -9.0, 0.5))
    ]
    return Influences(
        of={"items": 4, "timesteps": 1000}, checkpoints=["best.ckpt (step 8)"], preconditioned=True,
        held_out=9, images=5, ranked=ranked, **more,
    )  # fmt: skip


def test_the_list_names_copies_and_what_the_run_left_out_itself(tmp_path: Path) -> None:
    """Else the images that were left out before, or the copies of a bad one, would be trained again."""
    files = ("0.png", "a/3.png", "1.png", "2.png", "3.png", "twin of 2.png", "twin of 3.png", "4.png")
    content = {"a/3.png": "3.png", "twin of 2.png": "2.png", "twin of 3.png": "3.png"}
    images = [CaptionedImage(tmp_path / name, "a cat", content.get(name, name), name=name) for name in files]
    found = ranking(left_out=["bad.png", "worse.png"])
    found = replace(found, ranked=with_copies(found.ranked, images))
    assert found.to_exclude(0.2) == ["bad.png", "worse.png", "3.png", "a/3.png", "twin of 3.png"]
    assert found.to_exclude(0.4) == [*found.to_exclude(0.2), "2.png", "twin of 2.png"]
    run = RunDir(tmp_path)
    found = write_list(run, found, 0.4)
    assert run.exclude_list.read_text().splitlines() == found.to_exclude(0.4)
    assert read_influences(run.influence) == found
    said = closing_lines(found, 0.4, "run")[-1]
    assert "the 2 that agree least and 3 copies of them and the 2 that the run left out already; to" in said
    assert ".txt: the 2 that agree least; to train" in closing_lines(ranking(listed="a"), 0.4, "run")[-1]


def test_a_list_as_it_was_written_is_replaced_and_an_edited_one_is_the_users(tmp_path: Path) -> None:
    """It stays until it is moved away; one with the same words as ours is not edited."""
    run = RunDir(tmp_path)
    first = write_list(run, ranking(), 0.2)
    assert run.exclude_list.read_text() == "3.png\n"
    assert first.listed == sha256(b"3.png\n").hexdigest() and not run.is_list_edited()
    second = write_list(run, first, 0.4)
    assert run.exclude_list.read_text() == "3.png\n2.png\n" and not run.is_list_edited()
    run.exclude_list.write_text("3.png\nmine.png\n")
    assert run.is_list_edited()
    third = write_list(run, second, 0.2)
    assert third.listed == read_influences(run.influence).listed == "" and run.is_list_edited()
    assert run.exclude_list.read_text() == "3.png\nmine.png\n"
    run.exclude_list.write_text("3.png\n")
    assert write_list(run, third, 0.2).listed == first.listed and not run.is_list_edited()
    run.exclude_list.unlink()
    assert write_list(run, third, 0.4).listed == second.listed


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_list_is_ours_after_a_kill_in_the_midst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    """Just before the file is replaced or just after, before its hash alone is stored."""
    run = RunDir(tmp_path)
    kept = write_list(run, ranking(), 0.2)

    def killed(file: Path, names: list[str]) -> None:
        if is_replaced:
            write_names(file, names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "write_names", killed)
        with pytest.raises(KeyboardInterrupt):
            write_list(run, kept, 0.4)
    assert run.exclude_list.read_text() == ("3.png\n2.png\n" if is_replaced else "3.png\n")
    assert not run.is_list_edited()
    found = write_list(run, read_influences(run.influence), 0.6)
    assert run.exclude_list.read_text() == "3.png\n2.png\n0.png\n"
    assert found.listed == sha256(run.exclude_list.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_with_a_list_and_copies_of_an_image(
    make_config: Callable[..., Config], images: Path, tmp_path: Path
) -> None:
    """The list of all names what the run left out, and every file that it trained with."""
    root, run = tmp_path / "set", RunDir(tmp_path / "run")
    shutil.copytree(images, root)
    settings = (*SETTINGS, f"data.root={root}", "data.draw=null", "trainer.max_epochs=1")
    data = GhibliDataModule(make_config(*settings), None, RunDir(tmp_path), 1000)
    data.read()
    out, copied = data.train_images[:2]
    shutil.copy(copied.path, copied.path.with_name("twin.png"))
    with open(root / "captions.txt", "a") as table:
        table.write("twin.png|another caption\n")
    write_names(tmp_path / "list.txt", [out.name])
    train.run(make_config(*settings, f"data.exclude={tmp_path}/list.txt"), run)
    (tmp_path / "list.txt").unlink()  # the run knows what it left out
    found = influence(run, finished_config(run), replace(ALL, exclude=1.0))
    trained = images_of(run)
    assert "twin.png" in trained and len(found.ranked) == len(trained) - 1
    listed = run.exclude_list.read_text().splitlines()
    assert listed[0] == out.name and sorted(listed[1:]) == sorted(trained)


def refused(*words: str) -> str:
    """Run `ghibli influence WORDS`, which fails, and return its one line."""
    done = CliRunner().invoke(app, ["influence", *words])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


def test_what_cannot_be_measured(make_config: Callable[..., Config], tmp_path: Path) -> None:
    for settings, state, expected in (
        ("finetune=full", "finished", "trained all weights"),
        ("finetune=none", "finished", "only measured the base"),
        ("finetune=lora", "interrupted", "is interrupted, not finished"),
    ):
        run = RunDir(tmp_path / f"{settings}-{state}")
        run.path.mkdir()
        run.config.write_text(to_yaml(make_config(settings)))
        run.status.update(state=state)
        assert expected in refused(str(run.path))
        assert "--exclude 0 is out of range" in refused(str(run.path), "--exclude", "0")
        assert "--minutes inf is not a finite number" in refused(str(run.path), "--minutes", "inf")
    assert "holds no run" in refused(str(tmp_path))


@pytest.mark.slow
def test_a_list_that_was_edited_stays(trained: RunDir, measured: Influences, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(trained.path, run.path)
    file = run.path / "influence_exclude.txt"
    edited = f"{measured.ranked[0].name}\n"
    file.write_text(edited)
    for share in ("50%", "20%"):
        done = CliRunner().invoke(app, ["influence", str(run.path), "--exclude", share])
        assert done.exit_code == 0 and file.read_text() == edited, done.output
        assert "influence_exclude.txt was edited and stays as it is: move it away" in done.output
    file.unlink()
    assert influence(run, finished_config(run), ALL).listed and file.exists()


@pytest.mark.slow
def test_a_brake_is_no_part_of_an_images_own_loss(measured: Influences, copied: RunDir) -> None:
    """What is measured of a run with loss.keep is what its images alone did."""
    config = finished_config(copied)
    config = replace(config, loss=replace(config.loss, keep=1.0))
    assert influence(copied, config, ALL) == measured
