"""Copies of training images among samples: exact, mirrored and cropped ones, and none."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ghibli.demo.scenes.scene import EVALUATION_SEEDS, FINETUNE_SEEDS, compose, draw
from ghibli.evaluation.copies import TrainingThumbnails, copies_among, crops_of, thumbnails_of
from ghibli.report.text import counted_copies

COUNT, COPIED = 100, 20


def scenes(first: int, count: int) -> torch.Tensor:
    """(count, 3, 128, 128) in 0 .. 1."""
    arrays = [np.asarray(draw(compose(first + i), "drawn")) for i in range(count)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def training_images() -> torch.Tensor:
    return scenes(FINETUNE_SEEDS.start, COUNT)


@pytest.fixture(scope="module")
def training(training_images: torch.Tensor) -> TrainingThumbnails:
    crops = torch.stack([crops_of(image) for image in training_images])
    return TrainingThumbnails(thumbnails_of(training_images), crops)


@pytest.fixture(scope="module")
def unseen() -> tuple[torch.Tensor, torch.Tensor]:
    """(to calibrate with, to take for samples) thumbnails of scenes that are not trained on."""
    return thumbnails_of(scenes(EVALUATION_SEEDS.start, 2 * COUNT)).chunk(2)


def noisy(images: torch.Tensor) -> torch.Tensor:
    """What an encoder and decoder might lose."""
    draws = torch.Generator().manual_seed(0)
    return (images + 0.03 * torch.randn(images.shape, generator=draws)).clamp(0, 1)


def cropped(images: torch.Tensor) -> torch.Tensor:
    return interpolate(images[..., 0:115, 13:128], size=128, mode="bilinear")


COPIES = {"exact": lambda images: images, "mirrored": lambda images: images.flip(-1), "cropped": cropped}


@pytest.mark.slow
@pytest.mark.parametrize("kind", COPIES)
def test_a_fifth_of_copies_is_found_that_the_median_hides(
    training: TrainingThumbnails, training_images: torch.Tensor, unseen: tuple, kind: str
) -> None:
    real, others = unseen
    copies = thumbnails_of(noisy(COPIES[kind](training_images[:COPIED])))
    samples = training.distances(torch.cat([copies, others[COPIED:]]))
    found = copies_among(samples, training.distances(real))
    assert found["below"] >= 0.9 * COPIED
    assert training.nearest(copies)[1].tolist() == list(range(COPIED))
    assert found["p"] < 1e-4
    assert found["quantiles"]["0.5"] > 0.8  # what a median would have said
    assert counted_copies(found).startswith("signs of copies: ")


def test_unseen_images_are_no_copies(training: TrainingThumbnails, unseen: tuple) -> None:
    real, others = unseen
    found = copies_among(training.distances(others), training.distances(real))
    assert found["p"] > 0.01
    assert found["expected"] == 1.0  # a hundredth of 100
    assert counted_copies(found).startswith(f"no sign of copies: {found['below']} of 100 samples")


def test_the_distance_is_that_of_the_nearest_view(
    training: TrainingThumbnails, training_images: torch.Tensor
) -> None:
    """By hand: the smallest over whole, parts, and both of the mirrored sample; 0 for each of them."""
    one = thumbnails_of(scenes(EVALUATION_SEEDS.start + 7, 1))
    mirrored = one.view(3, 16, 16).flip(-1).flatten()
    views = torch.cat([training.whole, training.crops.flatten(0, 1)])
    wanted = min((views - one).norm(dim=1).min(), (views - mirrored).norm(dim=1).min())
    torch.testing.assert_close(training.distances(one)[0], wanted, atol=1e-3, rtol=0)
    part = crops_of(training_images[3])
    assert part.shape == (10, 768)
    assert training.distances(part).max() < 0.02
    assert training.distances(thumbnails_of(training_images[3:4].flip(-1)))[0] < 0.02
