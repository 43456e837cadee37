"""`ghibli check`, and the checks of train.py before it trains."""

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import CACHE, CHECKPOINTS, GRIDS, SMALL
from PIL import Image
from typer.testing import CliRunner

import train
from ghibli.cli.main import app
from ghibli.data import datamodule
from ghibli.data.folder import CaptionedImage, read_folder
from ghibli.data.split import split_apart, split_by_content
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.evaluation.diagnosis import Finding
from ghibli.images.duplicates import near_duplicates, thumbnail
from ghibli.models import load
from ghibli.models.base import BaseModel
from ghibli.models.cost import Live
from ghibli.models.performance import shrink_frozen
from ghibli.prepare import dataset_checks, memory, preflight
from ghibli.prepare.memory import measure_cost
from ghibli.runs.folder import RunDir
from ghibli.runtime import resources
from ghibli.runtime.errors import UserError
from ghibli.runtime.resources import free_memory
from ghibli.training.module import GhibliModule

# Each word is composed alone where one is wrong.
FEW = ("data.draw=null", "data.accumulate=2", "wandb.mode=disabled", f"cache_dir={CACHE}")


@pytest.fixture
def check(images: Path) -> Callable[..., list[Finding]]:
    """preflight.check of the shrunk demo with further overrides."""

    def run(*words: str, card: str | None = None) -> list[Finding]:
        return preflight.check([*SMALL, f"data.root={images}", "data.draw=null", *words], card)

    return run


def texts(found: list[Finding], level: str) -> dict[str, str]:
    return {finding.name: finding.text for finding in found if finding.level == level}


# All of it


def test_a_healthy_run(check: Callable) -> None:
    """No warnings; the planned learning rates are those of torch's own schedule, stepped per epoch."""
    found = check("data.batch_size=5", "data.accumulate=1", "trainer.max_epochs=4")
    assert {finding.level for finding in found} == {"note"}
    notes = texts(found, "note")
    assert set(notes) >= {"config", "base", "device", "images", "plan", "memory", "disk"}
    assert "it predicts epsilon, its VAE encodes 8x8 px as one latent" in notes["base"]
    assert "21 to train on, 3 held out" in notes["images"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (
        "batch size 5 x accumulation 1 x 1 device: 4 optimiser steps per epoch, 4 epochs, 16 steps"
        in notes["plan"]
    )
    said = [float(number) for number in re.findall(r"([\d.e-]+) at \d+ %", notes["plan"])]
    assert said == pytest.approx([*rates, rates[-1]], rel=5e-3)  # step 0, 4, 8, 12 and the last, 15


def test_the_base_is_counted_without_the_adapter(check: Callable, base: BaseModel) -> None:
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (base.unet, base.text_encoder)]
    (text,) = [finding.text for finding in check("lora.rank=64") if finding.name == "base"]
    assert f"UNet of {millions[0]:.1f} million weights, text encoder of {millions[1]:.1f} million" in text


def test_the_command_prints_all_findings_and_fails_on_errors(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["check", *SMALL, f"data.root={images}", "data.draw=null"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["note"] * 7
    monkeypatch.setattr(resources, "free_disk", lambda folder: 2**20)
    monkeypatch.setattr(resources, "free_memory", lambda device: 2**20)
    done = CliRunner().invoke(app, [*words, "optimizer.warmup_steps=5000"])
    assert done.exit_code == 2
    levels = [line.split(":")[0] for line in done.output.splitlines()]
    assert levels == ["error"] * 2 + ["warning"] + ["note"] * 5
    assert "1 MB are free: free some space, or choose another disk, hydra.run.dir=DIR" in done.output
    assert "warning: warm-up: optimizer.warmup_steps=5000, but there are 10 steps" in done.output


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (
            ["lora.rnak=3", "lora.rank=1.5", "data.val_fraction=2", "model.path=./nowhere"],
            ["unknown key lora.rnak", "lora.rank=1.5: expected a", "val_fraction=2 is", "nowhere: no such"],
        ),
        (
            ["lora.rank=0", "optimizer.lr=2", "data.val_fraction=2", "trainer.precision=16", "seed=-1"],
            ["lora.rank=0 is out", "optimizer.lr=2 is out", "data.val_fraction=2 is out", "precision=16 is"],
        ),
        (
            ["model.path=./nowhere", "data.root=nowhere", "trainer.devices=0"],
            ["model.path=./nowhere: no such", "data.root=nowhere: no such", "`Trainer(devices=0)`"],
        ),
        (
            ["data.batch_size=20", "lora.targets=[to_w]"],
            ["lora.targets: no UNet layer is called to_w"],
        ),
        (["data.batch_size=20"], ["data.batch_size=20 x accumulation 2 x devices 1 is more than the 21"]),
        (["resume=latest"], ["drop resume"]),
        (["=3"], ["cannot parse `=3`"]),
    ],
    ids=["spelling", "ranges", "places", "targets", "batch", "resume", "equals"],
)
def test_all_errors_at_once(images: Path, words: list[str], messages: list[str]) -> None:
    found = preflight.check([*FEW, f"data.root={images}", *words])
    errors = [finding.text for finding in found if finding.level == "error"]
    assert [finding.level for finding in found[: len(errors)]] == ["error"] * len(errors)  # errors first
    assert len(errors) == len(messages)
    assert "\n" not in "".join(errors)
    assert [message for message in messages if not any(message in error for error in errors)] == []


def test_the_errors_of_the_reference_study_are_warned_of(check: Callable) -> None:
    found = check("experiment=slides_asrun", "loss.guidance=7.5")
    assert set(texts(found, "warning")) == {"noise schedule", "sampling scale"}


def test_a_base_that_is_not_downloaded_is_not_fetched(
    check: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warning if the hub can be reached; an error if not, as training could not begin."""
    monkeypatch.setattr(preflight, "hub_answers", lambda: True)
    text = texts(check("model.path=nobody/nothing"), "warning")["base"]
    assert "nobody/nothing is not downloaded yet" in text
    for module in (preflight, load):
        monkeypatch.setattr(module, "hub_answers", lambda: False)
    text = texts(check("model.path=nobody/nothing"), "error")["base"]
    assert "the hub cannot be reached" in text


# Images and captions


def lint(root: Path, base: BaseModel, val_fraction: float = 0.5, notes: bool = False) -> dict[str, str]:
    """Return the findings about a folder: name -> text."""
    thumbnails = {}
    folder = read_folder(
        root, style=", Studio Ghibli style", default_caption=None, min_side=32,
        on_image=lambda path, image: thumbnails.update({path: thumbnail(image)}),
    )  # fmt: skip
    split = split_apart(folder.images, thumbnails, val_fraction)
    found = dataset_checks.check_dataset(folder, split.train, split.held_out, thumbnails, split.moved)
    found += [dataset_checks.long_captions(folder.images, base.tokenizer)]
    return {f.name: f.text for f in found if f is not None and (notes or f.level != "note")}


def table(names: list[str], captions: list[str]) -> str:
    """Return the text of captions.txt."""
    return "".join(f"{name}|{caption}\n" for name, caption in zip(names, captions, strict=True))


def test_findings_about_captions(tmp_path: Path, base: BaseModel) -> None:
    write_folder(tmp_path, "drawn", 10, FINETUNE_SEEDS.start)
    assert lint(tmp_path, base) == {}
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    captions = [f"image {number} of a girl" for number in range(10)]
    captions[0] = "the legend of ze ze ze ze"
    captions[1] = "one red dog, one red dog, one red dog and a mouse"
    captions[2] = "a very very old house"  # twice is normal
    captions[3] = " ".join(["a girl in a greenhouse by a lake"] * 2 + ["panda train"] * 40)
    captions[4] = ""
    (tmp_path / "captions.txt").write_text(table(names, captions))
    (tmp_path / "images" / names[5]).write_bytes(b"no image")
    found = lint(tmp_path, base)
    assert set(found) == {"stuttering captions", "long captions", "missing captions", "unusable images"}
    assert "3 of 8 captions repeat" in found["stuttering captions"]
    assert f"{names[0]} (`ze ze ze ze`), {names[1]} (" in found["stuttering captions"]
    assert names[4] in found["missing captions"]
    assert f"{names[5]} (it is not an image" in found["unusable images"]
    limit = base.tokenizer.model_max_length
    assert f"1 of 8 captions have more than the {limit - 2} tokens" in found["long captions"]
    assert f"{names[3]} loses `" in found["long captions"]


def test_the_lost_words_are_those_that_the_tokenizer_cuts_off(base: BaseModel) -> None:
    """The kept and the lost words together are the caption."""
    words = ["a girl", "in", "a", "greenhouse", "by", "a", "lake", "under", "the", "moon"] * 9
    caption = " ".join(words)
    text = dataset_checks.long_captions([CaptionedImage(Path("a.png"), caption, "0")], base.tokenizer).text
    start = re.search(r"loses `(.*?)( \.\.\.)?`", text)[1]
    kept = base.tokenizer.decode(base.tokenize([caption])[0], skip_special_tokens=True).strip()
    assert caption.startswith(f"{kept} {start}")


def test_shared_captions(tmp_path: Path, base: BaseModel) -> None:
    write_folder(tmp_path, "drawn", 8, FINETUNE_SEEDS.start)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    captions = ["a cat"] * 6 + ["a dog", "a house"]
    (tmp_path / "captions.txt").write_text(table(names, captions))
    assert (
        "6 of 8 images share their caption with another, 6 of them `a cat, Studio"
        in (lint(tmp_path, base)["duplicate captions"])
    )


def test_near_duplicates_are_the_same_image_saved_again_and_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path, "drawn", 40, FINETUNE_SEEDS.start)
    files = sorted((tmp_path / "images").iterdir())
    originals = torch.stack([torch.from_numpy(thumbnail(Image.open(file))) for file in files]).numpy()
    assert near_duplicates(originals[:20], originals[20:]) == []
    again = []
    for number, file in enumerate(files):
        image = Image.open(file)
        copy = tmp_path / f"{number}.jpg"
        image.resize((image.width // 2, image.height // 2)).save(copy, quality=30)
        again.append(thumbnail(Image.open(copy)))
    found = near_duplicates(originals, torch.stack([torch.from_numpy(a) for a in again]).numpy())
    assert [(train, held_out) for train, held_out, _ in found] == [(n, n) for n in range(40)]
    blank = thumbnail(Image.new("RGB", (64, 64), "red"))[None]
    assert near_duplicates(blank, blank) == []  # flat images have nothing to compare


def test_a_copy_across_the_split_is_trained_on_and_named(tmp_path: Path, base: BaseModel) -> None:
    write_folder(tmp_path, "drawn", 10, FINETUNE_SEEDS.start)
    images = tmp_path / "images"

    def split() -> tuple[set[str], set[str]]:
        folder = read_folder(tmp_path, style="", default_caption="x", min_side=32)
        train, held_out = split_by_content(folder.images, 0.5)
        return {p.path.stem for p in train}, {p.path.stem for p in held_out}

    original = sorted(split()[1])[0]
    (images / "copy.txt").write_text("a copy")
    for quality in range(50, 90):  # until its hash puts it in the training set
        Image.open(images / f"{original}.png").save(images / "copy.jpg", quality=quality)
        if "copy" in split()[0]:
            break
    assert "near-duplicates" not in lint(tmp_path, base)
    text = lint(tmp_path, base, notes=True)["near-duplicates"]
    assert text.startswith("1 image trained on, not held out")
    assert f"{original}.png like copy.jpg" in text


def test_other_files_are_a_warning(tmp_path: Path, base: BaseModel) -> None:
    write_folder(tmp_path, "drawn", 8, FINETUNE_SEEDS.start)
    (tmp_path / "images" / "a.mp4").write_text("x")
    (tmp_path / "old").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "old" / "a.png")
    said = lint(tmp_path, base)["not read"]
    assert said.startswith("beside the 8 images there are 1 .mp4, 1 image in old/ (1), which are not read")


# Memory and disk


def test_live_counts_what_is_alive() -> None:
    start = torch.zeros(1000, requires_grad=True)  # was there before
    with Live() as live:
        view = start[:10]
        assert live.now == 0
        kept = start.exp()  # saves its result, 4000 bytes
        assert live.now == 4000
        gone = kept + 1
        assert live.now == 8000
        del gone
        assert (live.now, live.peak) == (4000, 8000)
        chain = kept
        for _ in range(5):
            chain = chain.exp()
        assert live.now == 4000 * 6  # autograd keeps what the names do not
    assert view.numel() == 10


def test_measure_cost_recovers_what_grows_with_the_area_and_what_does_not() -> None:
    cost = measure_cost(lambda height, width: [torch.zeros(100), torch.zeros(3, height, width)], 16)
    assert (cost.example, cost.pixel) == (400, 12)
    assert cost.at(40, 7) == 7 * (400 + 12 * 1600)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_need_of_training_is_found_at_a_small_size(
    make_config: Callable, base: BaseModel, precision: str
) -> None:
    """Scaled up from 64 px, it is what a real forward pass of training keeps at 192 px and batch 3."""
    config = make_config("model.resolution=192", "data.batch_size=3")
    module = GhibliModule(config, base)
    before, modes = torch.get_rng_state(), [part.training for part in module.modules()]
    need = memory.estimate_memory(module, 10, precision)
    assert torch.equal(torch.get_rng_state(), before)
    assert [part.training for part in module.modules()] == modes
    shrink_frozen(module.base, precision)  # as training does
    module.unet.train()
    module.text_encoder.train()
    latents, ids = torch.zeros(3, 4, 24, 24), module.empty_ids.expand(3, -1)
    batch = {"latents": latents, "noise": latents, "timesteps": torch.zeros(3, dtype=torch.long)}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"), Live() as live:
        losses = module.losses(batch | {"input_ids": ids})
    assert losses.requires_grad
    assert need.phases["training"] == pytest.approx(live.peak, rel=0.05)
    weights = sum(weight.numel() for weight in module.trainable.values())
    assert need.kept == 12 * weights + 10 * 2 * latents[0].numel() * 4


def test_too_little_memory_names_the_setting(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory", lambda device: 50 * 2**20)
    text = texts(check("data.batch_size=8", "data.accumulate=1"), "error")["memory"]
    assert "50 MiB are free: lower data.batch_size to 4 with data.accumulate=2, which gives the same" in text
    text = texts(check("data.batch_size=1", "finetune=none", "model.resolution=128"), "error")["memory"]
    assert "lower model.resolution (it is 128), or free some memory" in text


def test_free_memory_knows_a_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu) > 2**20
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    assert free_memory(cpu) > 2_250_000  # no limit at all
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert free_memory(cpu) == 2_000_000
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 250000\nactive_file 150000\n")
    assert free_memory(cpu) == 2_250_000  # the kernel frees inactive page cache
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu) > 2_250_000


def test_each_process_of_a_run_on_the_cpu_needs_its_memory(
    make_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: memory.Memory(2**30, {"training": 2**30}))
    monkeypatch.setattr(resources, "resident_memory", lambda: 2**30)
    monkeypatch.setattr(resources, "free_memory", lambda device: 2**40)
    module = SimpleNamespace(config=make_config())
    data = SimpleNamespace(train_images=[1], val_images=[2])
    needs = []
    for devices in (1, 3):
        strategy = SimpleNamespace(root_device=torch.device("cpu"))
        trainer = SimpleNamespace(strategy=strategy, precision="32-true", num_devices=devices)
        text = preflight.about_memory(module, data, trainer).text
        needs.append(float(re.search(r"needs about ([\d.]+) GiB", text)[1]))
    assert needs[1] == pytest.approx(3 * needs[0] + 2, abs=0.2)


def test_the_cached_latents_are_as_large_as_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """131 kB per image at 512 px, twice that with mirrored ones; one line if the disk is too small."""
    latents = torch.zeros(3, 4, 64, 64)  # twice, mean and log-variance, in latents.Moments
    assert memory.latents_size(512, 3) == 2 * latents.numel() * latents.element_size() == 3 * 131072
    assert memory.latents_size(512, 3, flip=True) == 6 * 131072
    assert preflight.about_cache(3 * 131072, str(tmp_path)) == []
    monkeypatch.setattr(resources, "free_disk", lambda folder: 300_000 if folder == tmp_path else 2**40)
    (finding,) = preflight.about_cache(3 * 131072, str(tmp_path))
    assert finding.text.startswith(f"the cached latents need 0.4 MB below cache_dir={tmp_path}, where 0.3 MB")


def test_images_beside_take_memory_and_disk_too(
    check: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As much as training images, but never mirrored."""
    write_folder(tmp_path / "photos", "photo", 5, FINETUNE_SEEDS.start)
    sizes: list[tuple[float, float]] = []
    about_cache, estimate, kept = preflight.about_cache, memory.estimate_memory, []

    def noted(*of: object) -> memory.Memory:
        need = estimate(*of)
        kept.append(need.kept)
        return need

    monkeypatch.setattr(memory, "estimate_memory", noted)
    monkeypatch.setattr(
        preflight, "about_cache",
        lambda need, folder: sizes.append((kept[-1], need)) or about_cache(need, folder),
    )  # fmt: skip
    for words in ((), (f"data.regularization={tmp_path / 'photos'}",)):
        check("data.flip=true", "model.resolution=64", *words)
    without, beside = sizes
    assert [b - w for w, b in zip(without, beside, strict=True)] == [memory.latents_size(64, 5)] * 2


def test_a_full_cache_is_one_finding_among_all(check: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/scenes")

    monkeypatch.setattr(datamodule.GhibliDataModule, "prepare_data", full)
    found = check("trainer.devices=0")
    assert texts(found, "error")["images"] == "cannot write cache/scenes: the disk is full: free some space"
    assert "`Trainer(devices=0)`" in texts(found, "error")["device"]
    assert "base" in texts(found, "note")


@pytest.mark.slow
def test_the_demo_is_checked_within_a_minute(tmp_path: Path) -> None:
    """CPU time, including drawing the images, so that a busy machine fails no test."""
    began = time.process_time()
    found = preflight.check([f"cache_dir={tmp_path}"])
    assert time.process_time() - began < 60
    assert texts(found, "error") == {}


# In train.py


def test_train_reports_errors_and_continues(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The files of the run are as large as predicted."""
    needs = []
    disk = memory.estimate_disk
    monkeypatch.setattr(memory, "estimate_disk", lambda *a: needs.append(disk(*a)) or needs[0])
    monkeypatch.setattr(resources, "free_disk", lambda folder: 0)
    words = ("validation.max_images=2", "sample.samplers=[ddim]", "data.batch_size=4", *GRIDS, *CHECKPOINTS)
    config = make_config(*words)
    train.run(config, RunDir(tmp_path))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[:2] for line in said if line.startswith(("error", "warning", "note"))] == [
        ["error", " disk"],
        ["error", " cache"],
    ]
    checkpoints = [path.stat().st_size for path in (tmp_path / "checkpoints").glob("*.ckpt")]
    assert len(checkpoints) == memory.CHECKPOINTS - 1
    assert needs[0].checkpoints == pytest.approx(sum(checkpoints) * 4 / 3, rel=0.1)
    adapters = [path.stat().st_size for path in tmp_path.rglob("*.safetensors")]
    assert needs[0].adapters == pytest.approx(sum(adapters), rel=0.1)
    grids = [path.stat().st_size for path in (tmp_path / "samples").iterdir()]
    assert 0.3 * needs[0].grids < sum(grids) < 1.5 * needs[0].grids


def test_train_stops_before_it_encodes_images_for_nothing(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghibli.data.datamodule.encode", lambda *a, **k: pytest.fail("encoded"))
    with pytest.raises(UserError, match="data.batch_size=20 x accumulation 2"):
        train.run(make_config("data.batch_size=20"), RunDir(tmp_path))


@pytest.mark.slow
def test_a_card_that_is_not_here_is_told_what_fits(check: Callable) -> None:
    """Rehearsed on the demo: everything fits on 8 GB, nothing on 0.3."""
    text = texts(check(card="8GB"), "note")["card"]
    assert text.startswith("on a card of 8 GB this fits: data.batch_size=32 data.accumulate=1 (")
    assert "no settings fit" in texts(check(card="0.3"), "error")["card"]


@pytest.mark.parametrize(
    ("loading", "now", "more", "peak"), [(6.5, 5.2, 0.5, 6.5), (6.5, 5.2, 2.8, 8.0), (None, 5.2, 0.5, 5.7)]
)
def test_the_peak_is_of_loading_or_of_training_and_not_of_both(
    loading: float | None, now: float, more: float, peak: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured of SD 1.5's size, whose loading takes more than it keeps."""
    monkeypatch.setattr(resources, "peak_resident_memory", lambda: loading)
    monkeypatch.setattr(resources, "resident_memory", lambda: now)
    assert preflight.peak_of_process(more) == pytest.approx(peak)
