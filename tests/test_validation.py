"""The paired gain and its standard error, and the fixed items it is measured on."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ghibli import base_model
from ghibli.captions import CaptionedPicture
from ghibli.latents import Moments, encode
from ghibli.validation import Gain, make_chunks, paired_gain, strata

T, SCALING = 1000, 0.18215

# The gain


def losses_of(seed: int, pictures: int, items: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """(losses, base losses) as training gives them: a large common spread, a small own one."""
    rng = np.random.default_rng(seed)
    difficulty = rng.gamma(4, 0.05, (pictures, 1)) * rng.gamma(1, 1, (pictures, items))
    share = 1 - gain + 0.15 * rng.standard_normal((pictures, 1))
    return difficulty * share, difficulty * (1 + 0.05 * rng.standard_normal((pictures, items)))


def jackknife(losses: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """1 - sum / sum and its standard error, by really leaving out one picture after another."""

    def gain(ours: np.ndarray, theirs: np.ndarray) -> float:
        return 1 - ours.sum() / theirs.sum()

    count = len(losses)
    left_out = [gain(np.delete(losses, i, 0), np.delete(base, i, 0)) for i in range(count)]
    squares = sum((value - np.mean(left_out)) ** 2 for value in left_out)
    return gain(losses, base), ((count - 1) / count * squares) ** 0.5


@pytest.mark.parametrize(("pictures", "items"), [(2, 1), (3, 4), (64, 8)])
def test_gain_and_standard_error_are_the_jackknife_by_hand(pictures: int, items: int) -> None:
    losses, base = losses_of(1, pictures, items, 0.2)
    ours = paired_gain(torch.from_numpy(losses), torch.from_numpy(base))
    value, error = jackknife(losses, base)
    assert ours.value == pytest.approx(value, rel=1e-10)
    assert ours.standard_error == pytest.approx(error, rel=1e-10)


def test_standard_error_is_the_spread_over_repeats() -> None:
    """600 experiments with 64 pictures each: how far their gains scatter is what each predicted."""
    gains = [paired_gain(*map(torch.from_numpy, losses_of(seed, 64, 8, 0.3))) for seed in range(600)]
    values = np.array([gain.value for gain in gains])
    errors = np.array([gain.standard_error for gain in gains])
    assert abs(values.mean() - 0.3) < 4 * values.std() / len(gains) ** 0.5 + 0.002
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.12)
    covered = (np.abs(values - 0.3) < 1.96 * errors).mean()
    assert 0.91 < covered < 0.98  # 95 % of the intervals hold the true gain


def test_pairing_shrinks_the_standard_error() -> None:
    """Against base losses of other pictures the same gain would have a several times larger one."""
    losses, base = map(torch.from_numpy, losses_of(2, 64, 8, 0.3))
    unpaired = paired_gain(losses, base[torch.randperm(64, generator=torch.Generator().manual_seed(0))])
    assert paired_gain(losses, base).standard_error < unpaired.standard_error / 3


def test_equal_losses_are_a_gain_of_exactly_zero() -> None:
    losses = torch.rand(7, 3)
    assert paired_gain(losses, losses.clone()) == Gain(0.0, 0.0)


@pytest.mark.parametrize(("factor", "gain"), [(0.75, 0.25), (0.5, 0.5), (2.0, -1.0), (0.0, 1.0)])
def test_losses_a_factor_lower_are_that_gain_without_error(factor: float, gain: float) -> None:
    base = torch.rand(7, 3) + 0.1
    ours = paired_gain(factor * base, base)
    assert ours.value == pytest.approx(gain, abs=1e-6)
    assert ours.standard_error == pytest.approx(0, abs=1e-6)


def test_one_picture_has_a_gain_but_no_standard_error() -> None:
    ours = paired_gain(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    assert ours.value == 0.25
    assert np.isnan(ours.standard_error)


def test_many_small_losses_are_summed_in_float64() -> None:
    """fp32 sums of a million numbers lose more than the gain to be seen."""
    base = torch.full((1000, 1000), 0.1)
    assert paired_gain(base * (1 - 2**-20), base).value == pytest.approx(2**-20, rel=0.05)


# The items


def picture(name: str, caption: str = "a cat") -> CaptionedPicture:
    return CaptionedPicture(Path(name), caption, hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.parametrize("items", [1, 2, 4, 8, 1000])
def test_strata_hold_one_timestep_each(items: int) -> None:
    for number in range(50):
        drawn = strata(picture(str(number)).content_hash, items, T)
        assert len(drawn) == items
        for k, t in enumerate(drawn):
            assert k * T // items <= t <= (k + 1) * T // items - 1 + (T % items > 0)


def test_strata_are_uniform_over_many_pictures() -> None:
    drawn = np.concatenate([strata(picture(str(n)).content_hash, 8, T) for n in range(1000)])
    counts = np.bincount(drawn // 25, minlength=40)
    assert counts.sum() == 8000
    assert np.abs(counts - 200).max() < 5 * 200**0.5


def test_strata_follow_from_content_alone() -> None:
    one, other = picture("one").content_hash, picture("other").content_hash
    assert strata(one, 8, T) == strata(one, 8, T)
    assert strata(one, 8, T) != strata(other, 8, T)
    torch.manual_seed(1)
    np.random.seed(1)
    assert strata(one, 8, T) == strata(str(one), 8, T)


def items_of(
    names: list[str], chunk: int, items_per_picture: int = 4
) -> tuple[list[dict], dict[str, list[dict]]]:
    """(chunks, picture name -> its items); a picture's latents and caption follow from its name."""
    pictures = [picture(name) for name in names]
    seeds = [int(p.content_hash[:8], 16) for p in pictures]
    drawn = [torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    moments = Moments(torch.stack([d[0] for d in drawn]), torch.stack([d[1] for d in drawn]))
    input_ids = torch.tensor([[seed % 800] * 77 for seed in seeds])
    chunks = make_chunks(
        pictures, moments, input_ids, items_per_picture=items_per_picture, chunk=chunk,
        num_train_timesteps=T, scaling_factor=SCALING,
    )  # fmt: skip
    items = [{key: value[i] for key, value in c.items()} for c in chunks for i in range(chunk)]
    parts = {name: items[n * items_per_picture : (n + 1) * items_per_picture] for n, name in enumerate(names)}
    return chunks, parts


def assert_same_items(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() == {"latents", "noise", "timesteps", "input_ids"}
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("chunk", [1, 3, 4, 16])
def test_items_do_not_depend_on_other_pictures_or_the_chunk(chunk: int) -> None:
    reference = items_of(["a", "b", "c"], 5)[1]
    torch.manual_seed(3)
    for names in (["c"], ["b", "a"], ["x", "c", "y", "a", "z", "b"]):
        parts = items_of(names, chunk)[1]
        for name in set(names) & set(reference):
            assert_same_items(parts[name], reference[name])


def test_chunks_have_one_size_and_end_in_copies() -> None:
    chunks, parts = items_of(["a", "b", "c"], 5)
    assert [len(chunk["timesteps"]) for chunk in chunks] == [5, 5, 5]  # 12 items and 3 copies
    last = parts["c"][-1]
    for i in (2, 3, 4):
        assert_same_items([{key: value[i] for key, value in chunks[2].items()}], [last])


def test_items_of_a_picture_differ_from_each_other() -> None:
    items = items_of(["a"], 1, items_per_picture=8)[1]["a"]
    for i, one in enumerate(items):
        for other in items[i + 1 :]:
            assert one["timesteps"] < other["timesteps"]
            assert not torch.equal(one["noise"], other["noise"])
            assert not torch.equal(one["latents"], other["latents"])


def test_probe_noise_is_not_the_noise_of_its_latents() -> None:
    """The posterior's draw and the added noise are two streams of random numbers."""
    pictures = [picture(str(n)) for n in range(40)]
    flat = Moments(torch.zeros(40, 4, 8, 8), torch.zeros(40, 4, 8, 8))  # so latents are the draw itself
    chunks = make_chunks(
        pictures, flat, torch.zeros(40, 77, dtype=torch.int64), items_per_picture=2, chunk=80,
        num_train_timesteps=T, scaling_factor=1.0,
    )  # fmt: skip
    latents, noise = chunks[0]["latents"], chunks[0]["noise"]
    standard_error = noise.numel() ** -0.5
    assert abs((latents * noise).mean()) < 5 * standard_error
    for drawn in (latents, noise):
        assert abs(drawn.mean()) < 5 * standard_error
        assert abs(drawn.square().mean() - 1) < 5 * 2**0.5 * standard_error


def test_a_pictures_moments_do_not_depend_on_the_others(base: base_model.BaseModel, pictures: Path) -> None:
    """Bit for bit, wherever in a chunk it is encoded; else probe items would differ after all."""
    files = sorted((pictures / "images").iterdir())[:11]
    size = {"resolution": 64, "resize": "squash"}
    together = encode(base, files, **size)
    for index in (0, 5, 9):
        alone = encode(base, [files[index]], **size)
        assert torch.equal(together.mean[index], alone.mean[0])
        assert torch.equal(together.logvar[index], alone.logvar[0])
