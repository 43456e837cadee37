"""`ghibli evaluate`: the table, its cache, what it refuses, and the warning about too few images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import train
from ghibli.adapters.trained import starting_base, trained_base
from ghibli.cli import runs
from ghibli.config.files import CHANGED_BY_EVALUATE, apply_overrides
from ghibli.config.schema import Config
from ghibli.data import sources
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, write_folder
from ghibli.diffusion import samplers
from ghibli.diffusion.samplers import Cell, sample
from ghibli.evaluation import diagnosis, evaluate, samples
from ghibli.evaluation.copies import TrainingThumbnails
from ghibli.evaluation.distances import kernel_distance
from ghibli.evaluation.features import FeatureExtractor, ReferenceSet
from ghibli.models.base import BaseModel, weights_hash
from ghibli.runs.folder import RunDir
from ghibli.runs.settings import finished_config
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import checksum_of, write_with_checksum
from ghibli.training.loggers import choice, wandb_logger

QUICK = (
    "evaluate.samples=6", "evaluate.scan_samples=3", "evaluate.scales=[1,3]", "evaluate.batch_size=4",
    "sample.guidance=[1,7.5]", "sample.samplers=[ddim]",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A tiny finished run trained with guidance 7.5, with its own cache and reference."""
    root = tmp_path_factory.mktemp("evaluation")
    write_folder(root / "reference", "drawn", 16, EVALUATION_SEEDS.start)
    config = make_config(
        "data.reference_draw=null", f"data.reference={root / 'reference'}", f"cache_dir={root / 'cache'}",
        "loss.guidance=7.5", "trainer.max_epochs=1", "lora.text_encoder=false", "validation.max_images=2",
        "data.val_fraction=0.2", *QUICK,
    )  # fmt: skip
    run = RunDir(root / "run")
    train.run(config, run)
    return run


@pytest.fixture(scope="module")
def result(finished: RunDir) -> dict:
    return evaluate.evaluate(finished, finished_config(finished))


@pytest.mark.slow
def test_the_table_has_every_cell_and_the_guided_run_its_own_scale(finished: RunDir, result: dict) -> None:
    cells = {name: [(r["sampler"], r["guidance"]) for r in rows] for name, rows in result["models"].items()}
    assert cells["base"] == [("ddim", 1), ("ddim", 7.5)]
    assert cells["run"] == [("ddim", 1), ("ddim", 7.5), ("ddim", 15)]
    assert json.loads(finished.evaluation.read_text()) == json.loads(json.dumps(result))
    assert set(result["scan"]["run"]) == {"1", "3"}
    assert finished.evaluation_images.stat().st_size > 10_000


def test_a_cell_is_what_sampling_and_measuring_by_hand_give(finished: RunDir, result: dict) -> None:
    config = finished_config(finished)
    base = starting_base(config)
    reference_images, training = sources.real_images(config)
    assert len(reference_images) == 16 and len(training) < 24
    prompts = [p.caption for p in reference_images][:6]
    options = {"num_inference_steps": 2, "resolution": 64}
    batches = [list(range(4)), [4, 5]]
    drawn = [sample(base, [prompts[i] for i in b], Cell("ddim", 7.5), seeds=b, **options) for b in batches]
    extractor = FeatureExtractor(config, base)
    measure = samples.SampleCache(config, extractor, prompts).measure_real
    own, units = (measure("", images)["features"] for images in (reference_images, training))
    rows = extractor.measure(torch.cat(drawn), prompts)["features"]
    wanted = ReferenceSet(own, units).kernel(rows)
    in_units = [(part - units.mean(0)) / units.std(0) for part in (rows, own)]
    assert wanted == kernel_distance(*in_units, torch.arange(6))
    layouts = [layout_by_hand(base, part) for part in (torch.cat(drawn), reference_images, training)]
    in_units = [(part - layouts[2].mean(0)) / layouts[2].std(0) for part in layouts[:2]]
    layout = kernel_distance(*in_units, torch.arange(6))
    row = next(r for r in result["models"]["base"] if r["guidance"] == 7.5)
    assert row["kernel"] == (wanted.value, wanted.standard_error)
    assert row["layout"] == pytest.approx((layout.value, layout.standard_error), rel=1e-3)


def layout_by_hand(base: BaseModel, images: torch.Tensor | list) -> torch.Tensor:
    """Mean latents in 8 x 8 cells of images in 0 .. 1, or of image files at 64 px, one after the other."""
    rows = []
    for image in images:
        if not isinstance(image, torch.Tensor):
            with Image.open(image.path) as file:
                scaled = file.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
            image = torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255).permute(2, 0, 1)
        with torch.no_grad():
            latents = base.vae.encode(image[None] * 2 - 1).latent_dist.mean[0].double()
        side = latents.shape[-1] // 8
        rows.append(latents.unflatten(1, (8, side)).unflatten(3, (8, side)).mean((2, 4)).flatten())
    return torch.stack(rows)


def test_run_and_scan_are_what_sampling_by_hand_gives(finished: RunDir, result: dict) -> None:
    config = finished_config(finished)
    cache = samples.SampleCache(config, FeatureExtractor(config, starting_base(config)), [])
    images, training = sources.real_images(config)
    cache.captions = [image.caption for image in images]
    reference = ReferenceSet(*(cache.measure_real("", part)["features"] for part in (images, training)))
    model = trained_base(finished, config)
    for scale, count, found in (
        (15, 6, result["models"]["run"][2]["kernel"]),
        (3, 3, result["scan"]["run"]["3"]),
    ):
        wanted = reference.kernel(cache.measure_model(model, Cell("ddim", scale), count)["features"])
        assert tuple(found) == (wanted.value, wanted.standard_error)


def test_the_image_has_the_runs_own_column(finished: RunDir, result: dict) -> None:
    """Three columns of 256 px tiles; in the third one the base's tile is white, the run's is not."""
    image = Image.open(finished.evaluation_images).convert("RGB")
    assert image.width == 120 + 3 * (128 + 6) + 6
    left = 120 + 2 * (128 + 6)
    tiles = [image.crop((left, top, left + 128, top + 128)) for top in (130, 130 + 128 + 6)]
    assert tiles[0].getextrema() == ((255, 255),) * 3
    assert min(low for low, _ in tiles[1].getextrema()) < 200


@pytest.mark.slow
def test_the_command_prints_the_table_of_a_folder_with_an_equals_sign(
    finished: RunDir, result: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    copy = RunDir(tmp_path / "experiment=slides")
    shutil.copytree(finished.path, copy.path)
    runs.evaluate_command([str(copy.path), "evaluate.samples=6"])
    assert "evaluation.json" in capsys.readouterr().out.replace("\n", "")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(*runs.evaluation_tables(copy, copy.read_evaluation(), 200))
    lines = captured.get().splitlines()
    assert "6 samples, 2 steps, 16 real images" in " ".join(captured.get().split())
    assert any(line.startswith("model") and "style distance" in line for line in lines)
    row = result["models"]["run"][1]
    kernel, below = ("{:.2f} +- {:.2f}".format(*pair) for pair in (row["kernel"], below_base(row)))
    (line,) = (line for line in lines if line.startswith("run") and "DDIM 7.5" in line)
    assert kernel in line and below in line and line.split()[-2:] == ["-", "-"]  # few samples
    assert runs.evaluation_cells(row, 100)[-1] == f"{100 * row['recall']:.0f} %"
    assert lines[-1].split()[:4] == ["real", "floor", "of", "6"]
    halves = runs.evaluation_tables(copy, copy.read_evaluation(), 80)
    console = Console(width=80)
    with console.capture() as captured:
        for half in halves:
            console.print(half)
    columns = [
        line.split("cell")[1].split() for line in captured.get().splitlines() if line.startswith("model")
    ]
    assert columns == [
        ["style", "distance", "below", "base", "layout"], ["Frechet", "captions", "precision", "recall"],
    ]  # fmt: skip
    assert kernel in captured.get() and f"{row['frechet']:.1f}" in captured.get()


def below_base(row: dict) -> tuple[float, float]:
    value, error = row["kernel_minus_base"]
    return -value, error


class Dashboard:
    """Collects what W&B would get."""

    def __init__(self):
        self.logged, self.alerts, self.summary, self.experiment = {}, [], {}, self

    def log(self, values: dict) -> None:
        self.logged |= values

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(title)


def test_a_run_that_was_online_is_logged_offline_without_a_login(
    finished: RunDir, result: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, modes, board = finished_config(finished), [], Dashboard()
    config.wandb.mode = "online"
    opened = wandb_logger.WandbDashboard(finished, board)
    monkeypatch.setattr(wandb_logger, "start", lambda *words: modes.append(words[-1]) or opened)
    choice.log_evaluation(config, finished, result)
    assert modes == ["offline"] and "logging offline" in " ".join(capsys.readouterr().out.split())
    assert board.alerts == ["few images"] and len(board.logged["evaluate/cells"].data) == 5
    first, wanted = board.logged["evaluate/cells"].data[0], result["models"]["base"][0]
    assert first[3:7] == [*wanted["kernel"], *wanted["layout"]] and first[-2:] == [
        wanted["precision"], wanted["recall"],
    ]  # fmt: skip


def test_the_difference_to_the_base_is_the_tables(result: dict) -> None:
    for row, base in zip(result["models"]["run"], result["models"]["base"], strict=False):
        difference = row["kernel"][0] - base["kernel"][0]
        assert row["kernel_minus_base"][0] == pytest.approx(difference, rel=1e-6)
    assert "kernel_minus_base" not in result["models"]["run"][2]  # the base is not drawn at 15


@pytest.mark.slow
def test_a_killed_evaluation_resumes_with_the_same_result(
    finished: RunDir, result: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Killed in the third cell, then the first cell's file is damaged: only the second is not redrawn."""
    config = apply_overrides(finished_config(finished), [f"cache_dir={tmp_path}"], CHANGED_BY_EVALUATE)
    calls, real, copy = [], samplers.sample, RunDir(tmp_path / "run")
    shutil.copytree(finished.path, copy.path)

    def counting(base: BaseModel, prompts: list[str], cell: Cell, **options: object) -> torch.Tensor:
        calls.append((len(prompts), cell.guidance))
        if len(calls) == 5 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise KeyboardInterrupt
        return real(base, prompts, cell, **options)

    monkeypatch.setattr(samples, "sample", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate(copy, config)
    first = tmp_path / "evaluation" / result["models"]["base"][0]["file"]
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    calls.clear()
    assert evaluate.evaluate(copy, config) == result | {"cache_dir": str(tmp_path)}
    again = [1, 1, 7.5, 15]  # the base's first cell, and those of the run
    of_cells = [(count, guidance) for guidance in again for count in (4, 2)]
    assert calls == [*of_cells, *[(3, 3)] * 2, (6, 15)]  # the scan, which shares scale 1; the nearest samples


def test_the_trained_base_is_the_run_and_not_the_base(finished: RunDir) -> None:
    config = finished_config(finished)
    assert weights_hash(trained_base(finished, config)) != weights_hash(starting_base(config))


def test_too_few_images_are_a_finding_and_enough_are_not(finished: RunDir, result: dict) -> None:
    """The run's Frechet distance is computed from fewer images than features."""
    (finding,) = result["findings"]
    noted = [one["name"] for one in finished.status.read()["findings"]]
    assert noted.count("few images") == 1 and "sampling scale" in noted  # the second one from training
    assert finding["name"] == "few images"
    assert "6 images" in finding["text"] and "320 features" in finding["text"]
    assert diagnosis.few_images(321, 320, 1.0) == []


def test_the_nearest_training_images_are_shown(finished: RunDir, result: dict) -> None:
    """Samples that equal a training image, its mirror image or a part of one come first, with distance 0."""
    assert finished.evaluation_nearest.stat().st_size > 10_000
    draws = torch.Generator().manual_seed(0)
    training, crops = torch.rand(9, 768, generator=draws), torch.rand(9, 2, 768, generator=draws)
    own = {"thumbnails": torch.rand(5, 768, generator=draws)}
    samples = {"thumbnails": torch.rand(7, 768, generator=draws)}
    samples["thumbnails"][4] = training[2]
    samples["thumbnails"][1] = training[8].view(3, 16, 16).flip(-1).flatten()
    samples["thumbnails"][5] = crops[6, 1]
    thumbnails = TrainingThumbnails(training, crops)
    found = evaluate.nearest_copies(samples, evaluate.RealImages(None, None, own, None, thumbnails))
    assert sorted(pair for *pair, _ in found[:3]) == [[1, 8], [4, 2], [5, 6]]
    assert [distance for *_, distance in found[:3]] == pytest.approx([0, 0, 0], abs=1e-3)
    assert len(found) == evaluate.NEAREST_SAMPLES
    assert [distance for _, _, distance in found] == sorted(distance for _, _, distance in found)


def test_copies_of_training_images_are_detected(finished: RunDir) -> None:
    config = finished_config(finished)
    measure = samples.SampleCache(config, FeatureExtractor(config, starting_base(config)), ["a"]).measure_real
    reference_images, training_images = sources.real_images(config)
    own, training = measure("", reference_images), measure("", training_images)
    real = evaluate.RealImages(
        ReferenceSet(own["features"], training["features"]),
        ReferenceSet(own["layout"], training["layout"]),
        own,
        None,
        TrainingThumbnails(training["thumbnails"], torch.empty(0)),
    )
    assert evaluate.copying_ratio(own, real) == 1
    assert evaluate.copying_ratio(training, real) == pytest.approx(0, abs=1e-4)


def test_copies_are_searched_among_all_training_images(
    finished: RunDir, result: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """About 20 of 24 images are trained on; the floor uses as many as there are samples, 6."""
    config = finished_config(finished)
    seen, ratio = [], evaluate.copying_ratio
    monkeypatch.setattr(evaluate, "copying_ratio", lambda rows, real: seen.append(real) or ratio(rows, real))
    evaluate.evaluate(finished, config)
    _, training = sources.real_images(config)
    assert len(training) > 6 == result["floor_images"] == len(seen[0].floor["features"])
    extractor = FeatureExtractor(config, starting_base(config))
    wanted = samples.SampleCache(config, extractor, ["a"]).measure_real("", training)["thumbnails"]
    assert torch.equal(seen[0].training.whole, wanted)


def test_the_start_noise_has_the_seed_of_the_grids(finished: RunDir) -> None:
    config = apply_overrides(finished_config(finished), ["sample.seed=40"], CHANGED_BY_EVALUATE)
    base, cell = starting_base(config), Cell("ddim", 1)
    measured = samples.SampleCache(config, FeatureExtractor(config, base), ["a", "b"]).measure_model(
        base, cell, 2
    )
    drawn = sample(base, ["a", "b"], cell, seeds=[40, 41], num_inference_steps=2, resolution=64)
    assert torch.equal(measured["kept"], (drawn * 255).round().to(torch.uint8))


def test_a_users_folder_is_never_written_to(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config(f"data.reference={tmp_path / 'mine'}")
    with pytest.raises(UserError, match=r"data\.reference=.*mine: no such folder"):
        sources.real_images(config)
    write_folder(tmp_path / "mine", "drawn", 4, EVALUATION_SEEDS.start, size=64)
    (tmp_path / "mine" / "captions.txt").unlink()
    config.data.caption = "a"
    files = sorted((tmp_path / "mine").rglob("*"))
    assert len(sources.real_images(config)[0]) == 4 and sorted((tmp_path / "mine").rglob("*")) == files


def test_too_few_images_to_compare_with_are_one_line(make_config: Callable[..., Config]) -> None:
    config = make_config("data.reference=null", "data.val_fraction=0.01")
    with pytest.raises(UserError, match=r"^too few images held out .*: 1, .* data\.reference=DIR$"):
        sources.real_images(config)


def test_an_evaluation_of_other_weights_is_not_read(finished: RunDir, result: dict, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    assert copy.read_evaluation() == json.loads(json.dumps(result))
    assert result["weights"] == copy.weights == checksum_of(copy.best_checkpoint)
    write_with_checksum(copy.best_checkpoint, lambda file: file.write(b"a better epoch"))
    assert copy.read_evaluation() == {}
    copy.best_checkpoint.unlink()  # then nothing shows that it is of other weights
    assert copy.read_evaluation() != {}


def test_held_out_images_are_the_reference_without_a_folder(finished: RunDir) -> None:
    config = finished_config(finished)
    config.data.reference = None
    reference, training = sources.real_images(config)
    split = json.loads(finished.split.read_text())
    assert {p.content_hash for p in reference} == set(split["val"].values())
    assert {p.content_hash for p in training} == set(split["train"].values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("evaluate.samples=2", "at least 3"),
        ("evaluate.features=vgg", "choose one of style, inception"),
        ("lora.rank=4", "only evaluate"),
        ("sample.prompts=[a]", "only evaluate"),
        ("evaluate.sample=2", "unknown key evaluate.sample"),
        ("evaluate.inception=gone.pth", None),
    ],
)
def test_wrong_settings_are_one_line(finished: RunDir, word: str, message: str | None) -> None:
    config = finished_config(finished)
    if message is None:
        config = apply_overrides(config, [word, "evaluate.features=inception"], CHANGED_BY_EVALUATE)
        with pytest.raises(UserError, match=r"evaluate\.inception=gone\.pth: no such file"):
            FeatureExtractor(config, starting_base(config))
        return
    with pytest.raises(UserError, match=message):
        apply_overrides(config, [word], CHANGED_BY_EVALUATE)


@pytest.mark.parametrize("finetune", ["none", "lora"])
def test_another_base_than_in_training_is_refused(
    finetune: str, make_config: Callable, tmp_path: Path
) -> None:
    """Also where the base alone is measured."""
    run = RunDir(tmp_path)
    run.status.update(base_hash="0" * 64)
    with pytest.raises(UserError, match=r"the base model.path=demo is not the one it was trained from"):
        evaluate.models_to_evaluate(run, make_config(f"finetune={finetune}"))


def test_a_guided_target_is_drawn_at_the_scale_that_suits_it(
    make_config: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("run_base", "trained_base", "for_sampling"):
        monkeypatch.setattr(evaluate, name, lambda *of: None)
    config = make_config(*QUICK, "loss.guidance_target=3")
    found = evaluate.models_to_evaluate(RunDir(tmp_path), config)
    assert [cell.guidance for cell in found["run"].cells] == [1, 7.5, 2.5]
    assert [cell.guidance for cell in found["base"].cells] == [1, 7.5]


def test_an_unfinished_run_is_refused_in_one_line(finished: RunDir, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        finished_config(RunDir(tmp_path))
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(finished.path, copy.path)
    copy.status.update(state="interrupted")
    with pytest.raises(UserError, match=r"is interrupted, not finished: python train\.py resume="):
        finished_config(copy)
    copy.status.update(state="finished")
    (copy.adapter / "pytorch_lora_weights.safetensors").unlink()
    with pytest.raises(UserError, match="no pytorch_lora_weights"):
        trained_base(copy, finished_config(copy))


def test_other_images_than_the_run_was_trained_on_are_refused(
    finished: RunDir, images: Path, tmp_path: Path
) -> None:
    """Under the same path, as after a download that was repeated: one caption, then one image."""
    copy, root = RunDir(Path(shutil.copytree(finished.path, tmp_path / "run"))), tmp_path / "images"
    shutil.copytree(images, root)
    config = finished_config(copy)
    config.data.root = str(root)
    assert sources.real_images(config, copy)
    captions = (root / "captions.txt").read_text(encoding="utf-8")
    (root / "captions.txt").write_text(captions.replace("a ", "no ", 1), encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="data.root=.* not the images that this run was trained on"):
            evaluate.evaluate(copy, config)
        (root / "captions.txt").write_text(captions, encoding="utf-8")
        next((root / "images").iterdir()).unlink()


def test_training_images_are_no_reference(
    finished: RunDir, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training folder itself, one renamed copy among others, and one saved again as a JPEG."""
    config, said = finished_config(finished), []
    _, training = sources.real_images(config)
    monkeypatch.setattr(sources.logger, "warning", said.append)
    config.data.reference = str(images)
    with pytest.raises(UserError, match=rf"data.reference=.*: {len(training)} of its 24 images are training"):
        sources.real_images(config)
    mixed = tmp_path / "mixed"
    write_folder(mixed, "drawn", 6, EVALUATION_SEEDS.start)
    config.data.reference = str(mixed)
    assert sources.real_images(config) and not said
    first = sorted((mixed / "images").iterdir())[0]
    Image.open(training[0].path).convert("RGB").save(first, format=Image.open(first).format, quality=60)
    if Image.open(first).format == "PNG":
        recoloured = Image.open(training[0].path).convert("RGB").point(lambda level: min(level + 1, 255))
        recoloured.save(first)
    assert sources.real_images(config)
    assert len(said) == 1 and f"{first.name} of {training[0].path.name}" in said[0]
    shutil.copy(training[0].path, first)
    with pytest.raises(UserError, match=f"1 of its 6 images are training images of this run .{first.name}"):
        sources.real_images(config)
