"""The fixed items of the probe: timesteps, noise and latents of an image depend on its content alone."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments, encode
from ghibli.data.validation_items import images_in_a_pass, in_passes, make_items, strata
from ghibli.models.base import BaseModel

T, SCALING = 1000, 0.18215


def image(name: str, caption: str = "a cat") -> CaptionedImage:
    return CaptionedImage(Path(name), caption, hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("items", [1, 2, 4, 8, 1000])
def test_strata_hold_one_timestep_each(items: int) -> None:
    for number in range(50):
        drawn = strata(image(str(number)).content_hash, items, T)
        assert len(drawn) == items
        for k, t in enumerate(drawn):
            assert k * T // items <= t <= (k + 1) * T // items - 1 + (T % items > 0)


def test_strata_are_uniform_over_many_images() -> None:
    drawn = np.concatenate([strata(image(str(n)).content_hash, 8, T) for n in range(1000)])
    counts = np.bincount(drawn // 25, minlength=40)
    assert counts.sum() == 8000
    assert np.abs(counts - 200).max() < 5 * 200**0.5


def test_strata_follow_from_content_alone() -> None:
    one, other = image("one").content_hash, image("other").content_hash
    before = strata(one, 8, T)
    assert before != strata(other, 8, T)
    torch.manual_seed(1)
    np.random.seed(1)
    assert strata(one, 8, T) == before


def items_of(names: list[str], items_per_image: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Image name -> its batch of items; an image's latents and caption follow from its name."""
    images = [image(name) for name in names]
    seeds = [int(p.content_hash[:8], 16) for p in images]
    drawn = [torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    moments = Moments(torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn]))
    input_ids = torch.tensor([[seed % 800] * 77 for seed in seeds])
    batches = make_items(
        images, moments, input_ids, items_per_image=items_per_image,
        num_train_timesteps=T, scaling_factor=SCALING,
    )  # fmt: skip
    return dict(zip(names, batches, strict=True))


def test_items_do_not_depend_on_other_images() -> None:
    reference = items_of(["a", "b", "c"])
    torch.manual_seed(3)
    for names in (["c"], ["b", "a"], ["x", "c", "y", "a", "z", "b"]):
        batches = items_of(names)
        for name in set(names) & set(reference):
            assert batches[name].keys() == {"latents", "noise", "timesteps", "input_ids"}
            assert len(batches[name]["timesteps"]) == 4
            for key, value in batches[name].items():
                assert torch.equal(value, reference[name][key])


def test_items_of_an_image_differ_from_each_other() -> None:
    batch = items_of(["a"], items_per_image=8)["a"]
    for i in range(8):
        for j in range(i + 1, 8):
            assert batch["timesteps"][i] < batch["timesteps"][j]
            assert not torch.equal(batch["noise"][i], batch["noise"][j])
            assert not torch.equal(batch["latents"][i], batch["latents"][j])


def test_probe_noise_is_not_the_noise_of_its_latents() -> None:
    """The posterior's draw and the added noise are two streams of random numbers."""
    images = [image(str(n)) for n in range(40)]
    flat = Moments(torch.zeros(40, 4, 8, 8), torch.zeros(40, 4, 8, 8))  # so latents are the draw itself
    batches = make_items(
        images, flat, torch.zeros(40, 77, dtype=torch.int64), items_per_image=2,
        num_train_timesteps=T, scaling_factor=1.0,
    )  # fmt: skip
    latents, noise = (torch.cat([batch[key] for batch in batches]) for key in ("latents", "noise"))
    standard_error = noise.numel() ** -0.5
    assert abs((latents * noise).mean()) < 5 * standard_error
    for drawn in (latents, noise):
        assert abs(drawn.mean()) < 5 * standard_error
        assert abs(drawn.square().mean() - 1) < 5 * 2**0.5 * standard_error


def test_an_images_moments_do_not_depend_on_the_others(base: BaseModel, images: Path) -> None:
    """Bit for bit, wherever in a chunk it is encoded; else probe items would differ after all."""
    files = sorted((images / "images").iterdir())[:11]
    size = {"resolution": 64, "resize": "squash"}
    together = encode(base, files, **size)
    for index in (0, 5, 9):
        alone = encode(base, [files[index]], **size)
        assert torch.equal(together.mean[index], alone.mean[0])
        assert torch.equal(together.logvar[index], alone.logvar[0])


def test_passes_hold_images_of_one_shape_and_are_all_of_one_size() -> None:
    """Every image once, with its place; the last of a pass fills it up."""
    shapes = [(4, 2, 2)] * 3 + [(4, 2, 4)] + [(4, 2, 2)] * 2
    batches = [
        {"latents": torch.full((2, *shape), float(row)), "timesteps": torch.tensor([row, 10 + row])}
        for row, shape in enumerate(shapes)
    ]
    passes = in_passes(batches, [0, 1, 3, 2, 5], 3)
    assert [places for places, _ in passes] == [[0, 1, 3], [4], [2]]
    assert [batch["timesteps"].tolist() for _, batch in passes] == [
        [0, 10, 1, 11, 2, 12], [5, 15] * 3, [3, 13] * 3,
    ]  # fmt: skip
    assert [tuple(batch["latents"].shape) for _, batch in passes] == [(6, *shapes[row]) for row in (0, 5, 3)]
    alone = in_passes(batches, [1, 3], 1)
    assert all(torch.equal(alone[0][1][key], batches[1][key]) for key in batches[1])


def test_small_images_share_a_pass() -> None:
    """As many items at 256 px have as many pixels as a fourth of them at 512."""
    assert [images_in_a_pass(side, 4) for side in (64, 128, 256, 264, 512)] == [4, 4, 4, 1, 1]
    assert [images_in_a_pass(128, items) for items in (1, 2, 5, 16, 40)] == [16, 8, 3, 1, 1]
