"""Shapes of training images: nearest to the image's own, one in each batch, the same every time."""

import csv
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ghibli.data.dataset import batches_in, left_out, order_in_batches
from ghibli.data.latents import Moments, encode
from ghibli.images.resize import WIDEST, bucket_sizes, preprocess, size_for
from ghibli.models.base import BaseModel


def test_the_shapes_at_512_px() -> None:
    assert bucket_sizes(512) == [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]


@pytest.mark.parametrize("resolution", [64, 128, 256, 512, 768])
def test_every_shape_fits_the_unet_and_the_square_s_memory(resolution: int) -> None:
    found = bucket_sizes(resolution)
    assert (resolution, resolution) in found
    for width, height in found:
        assert width % 8 == height % 8 == 0
        assert width * height <= resolution**2
        assert max(width, height) / min(width, height) <= WIDEST
        assert (height, width) in found


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ((1920, 1080), (640, 384)),
        ((1080, 1920), (384, 640)),
        ((1000, 1000), (512, 512)),
        ((1040, 1000), (512, 512)),
        ((4, 3), (576, 448)),
        ((9000, 100), (640, 384)),
    ],
)
def test_the_nearest_shape_is_chosen(image: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_for(image, 512, "bucket") == expected
    assert size_for(image, 512, "squash") == size_for(image, 512, "center_crop") == (512, 512)


def test_a_circle_stays_a_circle() -> None:
    columns, rows = np.meshgrid(np.arange(320), np.arange(180))
    disc = (columns - 160) ** 2 + (rows - 90) ** 2 < 60**2
    image = Image.fromarray(np.uint8(disc * 255)).convert("RGB")
    values = preprocess(image, 128, "bucket")
    assert values.shape == (3, 96, 160)
    bright = values[0] > 0
    width, height = bright.any(dim=0).sum().item(), bright.any(dim=1).sum().item()
    assert abs(width - height) <= 1
    squashed = preprocess(image, 128, "squash")[0] > 0
    assert squashed.any(dim=1).sum() > 1.5 * squashed.any(dim=0).sum()


def test_one_shape_leaves_the_order_alone() -> None:
    order = np.random.default_rng(0).permutation(23)
    assert order_in_batches(order, [(512, 512)] * 23, 4) == order[:20].tolist()
    assert batches_in([(512, 512)] * 23, 4) == 5


def test_every_batch_has_one_shape_and_no_image_comes_twice() -> None:
    shapes = [((512, 512), (640, 384), (384, 640))[i % 3 if i < 40 else 0] for i in range(50)]
    for seed in range(5):
        laid = order_in_batches(np.random.default_rng(seed).permutation(50), shapes, 4)
        assert len(laid) == 4 * batches_in(shapes, 4) and len(set(laid)) == len(laid)
        for start in range(0, len(laid), 4):
            assert len({shapes[image] for image in laid[start : start + 4]}) == 1
    counts = Counter(shapes)
    assert len(laid) == sum(count // 4 * 4 for count in counts.values())
    assert left_out([*shapes, (64, 64)], 4) == 1 and left_out(shapes, 4) == 0


def test_codes_of_several_shapes_are_those_of_each_image_alone(base: BaseModel, tmp_path: Path) -> None:
    paths = shaped_images(tmp_path, 5)
    together = encode(base, paths, resolution=128, resize="bucket")
    assert {tuple(mean.shape) for mean in together.mean} == {(4, 12, 20), (4, 20, 12), (4, 16, 16)}
    for place, path in enumerate(paths):
        alone = encode(base, [path], resolution=128, resize="bucket")
        assert torch.equal(together.mean[place], alone.mean[0])
        assert torch.equal(together.logvar[place], alone.logvar[0])
    some = Moments(together.mean, together.logvar).of([3, 1])
    assert torch.equal(some.mean[0], together.mean[3]) and torch.equal(some.logvar[1], together.logvar[1])


def shaped_images(folder: Path, count: int) -> list[Path]:
    """Noise in three shapes, with captions."""
    generator = np.random.default_rng(0)
    paths = []
    for place in range(count):
        width, height = ((160, 90), (90, 160), (100, 100))[place % 3]
        coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        path = folder / f"{place:02d}.png"
        Image.fromarray(coarse).resize((width, height)).save(path)
        path.with_suffix(".txt").write_text(f"an image of shape {place % 3}")
        paths.append(path)
    return paths


@pytest.mark.slow
def test_trains_on_images_of_every_shape(
    train_py: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shaped_images(folder, 20)
    done = train_py(
        f"data.root={folder}", "data.resize=bucket", "data.batch_size=2", "data.accumulate=1",
        "trainer.max_epochs=1",
        "sample.every_n_epochs=0", f"hydra.run.dir={tmp_path / 'run'}", "data.min_side=16",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "run" / "metrics.csv") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) >= 6 and all(np.isfinite(losses))
