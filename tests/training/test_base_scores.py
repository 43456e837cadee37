"""The base's scores: computed once, the same whatever else is scored, and the zero of every gain."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import CHECKPOINTS

import train
from ghibli.data.folder import CaptionedImage
from ghibli.data.validation_items import images_in_a_pass
from ghibli.demo.scenes.scene import FINETUNE_SEEDS, write_folder
from ghibli.evaluation.gain import Probe, expected_losses
from ghibli.runs.folder import RunDir
from ghibli.training.base_scores import cached_scores
from ghibli.training.callbacks import resume_check
from ghibli.training.module import GhibliModule

SETTINGS = {"base": "abc", "guidance": 1}


def image(number: int, caption: str = "a cat") -> CaptionedImage:
    return CaptionedImage(Path(f"{number}.png"), caption, f"{number:064x}")


class Scorer:
    """Scores images by their numbers and counts for how many it was asked."""

    def __init__(self, images: list[CaptionedImage]):
        self.images, self.asked = images, 0

    def __call__(self, rows: list[int]) -> torch.Tensor:
        self.asked += len(rows)
        return torch.tensor([[1 / 3, 1.0]]) * torch.tensor(
            [[int(self.images[row].content_hash, 16)] for row in rows]
        )


def scored(folder: Path, images: list[CaptionedImage], settings: dict[str, Any] = SETTINGS) -> tuple:
    """(scores, how many images had to be computed)."""
    scorer = Scorer(images)
    return cached_scores(folder, settings, images, scorer), scorer.asked


def test_only_what_is_not_known_is_computed(tmp_path: Path) -> None:
    first, asked = scored(tmp_path, [image(1), image(2)])
    assert asked == 2
    assert torch.equal(first, torch.tensor([[1 / 3, 1.0], [2 / 3, 2.0]]))  # float32, to the bit
    again, asked = scored(tmp_path, [image(3), image(2), image(1)])
    assert asked == 1
    assert torch.equal(again[[2, 1]], first)


@pytest.mark.parametrize(
    ("images", "settings"),
    [
        ([image(1, "a dog")], SETTINGS),
        ([image(1)], SETTINGS | {"guidance": 7.5}),
        ([image(1)], SETTINGS | {"base": "abd"}),
    ],
    ids=["caption", "guidance", "base"],
)
def test_another_caption_base_or_guidance_is_scored_anew(
    tmp_path: Path, images: list[CaptionedImage], settings: dict[str, Any]
) -> None:
    scored(tmp_path, [image(1)])
    assert scored(tmp_path, images, settings)[1] == 1


def test_a_damaged_cache_is_computed_again(tmp_path: Path) -> None:
    """Each byte of the file flipped in turn: never a score that is not the right one."""
    right, _ = scored(tmp_path, [image(1)])
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert torch.equal(scored(tmp_path, [image(1)])[0], right)


# In a run


@pytest.fixture
def probe_of(make_config: Callable, tmp_path: Path) -> Callable[..., tuple[Probe, list[str], int]]:
    """Starts a run with finetune=none: (its probe, the probe's images, passes made to score the base)."""

    def start(root: Path, *overrides: str) -> tuple[Probe, list[str], int]:
        seen: dict[str, Any] = {"asked": 0}
        run = RunDir(tmp_path / f"run{len(list(tmp_path.glob('run*')))}")
        original = GhibliModule.scores

        def counting(module: GhibliModule, batch: dict, *arguments: Any) -> torch.Tensor:
            seen["asked"] += 1
            seen["module"] = module
            return original(module, batch, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GhibliModule, "scores", counting)
            words = (f"data.root={root}", f"cache_dir={tmp_path / 'cache'}")
            train.run(make_config("finetune=none", *words, *overrides), run)
        module = seen["module"]
        names = [p.path.name for p in module.trainer.datamodule.probe_images]
        validation = len(module.trainer.datamodule.val_dataloader())
        return module.probe.history[-1], names, seen["asked"] - validation

    return start


def test_scores_are_bit_equal_whatever_the_batch_size_workers_and_added_images(
    probe_of: Callable, tmp_path: Path
) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    write_folder(few, "drawn", 14, FINETUNE_SEEDS.start)
    write_folder(many, "drawn", 22, FINETUNE_SEEDS.start)
    reference, names, _ = probe_of(few, "data.val_fraction=0.4")
    other, more, _ = probe_of(
        many, "data.val_fraction=0.4", "data.batch_size=5", "data.workers=1", f"cache_dir={tmp_path / 'new'}"
    )
    held_out = len(reference.val)
    assert 2 <= held_out < len(other.val)
    for row, name in enumerate(names[:held_out]):
        place = more.index(name)
        assert torch.equal(reference.val[row], other.val[place])
        assert torch.equal(reference.base_val[row], other.base_val[place])


def test_the_base_is_scored_once_and_read_by_the_next_run(probe_of: Callable, images: Path) -> None:
    first, names, asked = probe_of(images)
    again, _, later = probe_of(images)
    assert (asked, later) == (-(-len(names) // 8), 0)  # of 2 items each, eight images share a pass
    assert all(torch.equal(vars(first)[key], vars(again)[key]) for key in vars(first))
    assert first.val_gain.value == first.train_gain.value == 0
    assert [gain.value for gain in first.gain_by_timestep] == [0, 0]


@pytest.mark.slow
def test_the_training_loss_is_compared_with_the_base_at_its_own_schedule_and_guidance(
    probe_of: Callable, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table behind train/loss_normalised, against the base scored by hand; the cache is shared."""
    tables = []
    setup = GhibliModule.setup

    @torch.no_grad()
    def keep(module: GhibliModule, stage: str) -> None:
        setup(module, stage)
        batches, guidance = module.trainer.datamodule.probe_batches, module.config.loss.guidance
        losses = [module.scores(batch, guidance, module.alphas_cumprod)[0] for batch in batches]
        timesteps = torch.cat([batch["timesteps"] for batch in batches])
        tables.append((module.probe.expected, expected_losses(timesteps, torch.cat(losses), 1000)))

    monkeypatch.setattr(GhibliModule, "setup", keep)
    for words in ((), ("loss.noise_schedule=linear",), ("loss.guidance=7.5",)):
        probe_of(images, *words)
    assert all(torch.allclose(own, by_hand, rtol=1e-5) for own, by_hand in tables)
    assert not torch.allclose(tables[0][0], tables[1][0], rtol=1e-2)
    assert not torch.allclose(tables[0][0], tables[2][0], rtol=1e-2)


@pytest.mark.slow
def test_what_the_probe_costs_in_examples_through_the_unet(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in a real epoch: tests/runs/test_compose.py reckons with these numbers for the default sizes.

    A checkpoint notes the scores of two images, for a resume to compare with.
    """
    counted, saves = {"training": 0, "scored": 0}, []  # saves: the steps
    branches, save = GhibliModule.branches, GhibliModule.on_save_checkpoint

    def count(module: GhibliModule, batch: dict, *words: object) -> tuple:
        counted["training" if torch.is_grad_enabled() else "scored"] += len(batch["latents"])
        return branches(module, batch, *words)

    def saving(module: GhibliModule, checkpoint: dict) -> None:
        saves.append(module.trainer.global_step)
        save(module, checkpoint)

    config = make_config("trainer.max_epochs=1", *CHECKPOINTS)
    train.run(make_config("finetune=none"), RunDir(tmp_path / "first"))  # scores the base, once
    monkeypatch.setattr(GhibliModule, "branches", count)
    monkeypatch.setattr(GhibliModule, "on_save_checkpoint", saving)
    train.run(config, RunDir(tmp_path / "second"))
    split = json.loads((tmp_path / "second" / "split.json").read_text())
    together = images_in_a_pass(config.model.resolution, config.validation.items_per_image)
    probed = -(-2 * len(split["val"]) // together) * together  # what fills up a pass counts too
    images = probed + resume_check.IMAGES * len(set(saves))
    assert set(saves) == {2, 4, 5}  # best.ckpt and last.ckpt of one step share theirs
    assert counted["scored"] == images * config.validation.items_per_image
    assert counted["training"] == len(split["train"]) // 4 * 4


@pytest.mark.slow
def test_of_two_copies_one_is_scored(probe_of: Callable, tmp_path: Path) -> None:
    """The second would tell nothing new, and make the standard error too small."""
    write_folder(tmp_path, "drawn", 14, FINETUNE_SEEDS.start)
    alone, names, _ = probe_of(tmp_path, "data.val_fraction=0.4")
    held_out = names[: len(alone.val)]
    for name in held_out:
        copy = f"copy-{name}"
        (tmp_path / "images" / copy).write_bytes((tmp_path / "images" / name).read_bytes())
        captions = (tmp_path / "captions.txt").read_text()
        caption = next(line for line in captions.splitlines() if line.startswith(name)).partition("|")[2]
        (tmp_path / "captions.txt").write_text(f"{captions}{copy}|{caption}\n")
    twice, _, _ = probe_of(tmp_path, "data.val_fraction=0.4")
    assert torch.equal(twice.val, alone.val)


def test_a_switched_off_adapter_gains_exactly_nothing(make_config: Callable, tmp_path: Path) -> None:
    """A trained adapter, then disabled: its items score what the base scored, to the bit."""
    seen: list[GhibliModule] = []
    original = GhibliModule.on_validation_epoch_end

    def keep(module: GhibliModule) -> None:
        seen.append(module)
        original(module)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GhibliModule, "on_validation_epoch_end", keep)
        words = (
            "trainer.max_epochs=1",
            "data.batch_size=8",
            "lora.rank=4",
            f"cache_dir={tmp_path / 'cache'}",
        )
        train.run(make_config(*words), RunDir(tmp_path / "run"))
    module = seen[0]
    assert module.probe.history[-1].val_gain.value != 0
    for part in (module.unet, module.text_encoder):
        part.disable_adapters()
        part.eval()
    with torch.no_grad():
        module.probe.begin_epoch()
        for index, batch in enumerate(module.trainer.datamodule.val_dataloader()):
            module.validation_step(batch, index)
    probe = module.probe.probe_of(module.probe.collected(), module.trainer.datamodule)
    assert torch.equal(probe.val, probe.base_val)
    assert probe.val_gain.value == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["gain"] == module.probe.history[-1].val_gain.value
