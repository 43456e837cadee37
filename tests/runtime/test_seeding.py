"""Every random number is determined by (seed, purpose, example number), and by nothing else."""

import random
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy import stats

from ghibli.config.schema import Config
from ghibli.data.dataset import EncodedImages, EpochPlan, ExampleNumbers, TrainExamples, collate
from ghibli.data.latents import Moments
from ghibli.runtime.seeding import (
    Stream,
    chance,
    epoch_order,
    hash_fraction,
    independent_timestep,
    normal,
    rng,
    timestep,
)

PHI = (1 + 5**0.5) / 2
IMAGES = 12

# Timesteps


@pytest.mark.parametrize("seed", [0, 1, 7, 12345, 2**32 - 1])
@pytest.mark.parametrize("start", [0, 100_003])
def test_timesteps_of_neighbouring_examples_are_uniform(seed: int, start: int) -> None:
    """Far closer to uniform than independent draws, over every number of examples from 1 to 4000."""
    drawn = np.array([timestep(start + e, 1000, seed) for e in range(4000)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    for count in (10, 100, 1000, 4000):
        below = np.searchsorted(np.sort(drawn[:count]), np.arange(1, 1001))  # how many are < 1 .. 1000
        assert np.abs(below - count * np.arange(1, 1001) / 1000).max() <= 5  # sqrt(4000) = 63 if independent
    observed = np.bincount(drawn, minlength=1000)
    assert stats.chisquare(observed).statistic < stats.chi2.ppf(0.001, df=999)
    assert observed.min() >= 2
    assert observed.max() <= 6  # 4 is exact; independent draws reach from 0 to about 13


def test_independent_timesteps_are_uniform_and_uncorrelated() -> None:
    drawn = np.array([independent_timestep(e, 1000, 3) for e in range(8000)])
    assert 0 <= drawn.min() < 10 and 990 <= drawn.max() <= 999
    assert stats.chisquare(np.bincount(drawn // 10, minlength=100)).pvalue > 1e-4
    pairs = (drawn[:-1] // 200) * 5 + drawn[1:] // 200
    assert stats.chisquare(np.bincount(pairs, minlength=25)).pvalue > 1e-4
    assert drawn[:50].tolist() == [independent_timestep(e, 1000, 3) for e in range(50)]


def test_one_examples_timestep_is_uniform_over_seeds() -> None:
    drawn = [timestep(17, 20, seed) for seed in range(4000)]
    assert stats.chisquare(np.bincount(drawn, minlength=20)).pvalue > 1e-4


@pytest.mark.parametrize("seed", [0, 1, 99])
def test_any_16_neighbours_are_spread(seed: int) -> None:
    """Three-gap theorem: 13 to 20 consecutive points are phi^-7 to phi^-5 of the range apart."""
    fine = 2**40
    fractions = np.array([timestep(e, fine, seed) for e in range(3000)]) / fine
    for start in range(len(fractions) - 16):
        points = np.sort(fractions[start : start + 16])
        gaps = np.diff(np.append(points, points[0] + 1))
        assert gaps.min() > PHI**-7 - 1e-6
        assert gaps.max() < PHI**-5 + 1e-6
        quarters = np.bincount((points * 4).astype(int), minlength=4)
        assert quarters.min() >= 3


def test_timestep_is_the_documented_sequence() -> None:
    """floor(T x fractional part of (example / golden ratio + shift)), in exact arithmetic."""
    golden = Fraction(0x9E3779B97F4A7C15, 2**64)
    assert abs(float(golden) - 1 / PHI) < 1e-15
    for seed in (0, 5):
        shift = Fraction(int(rng(Stream.TIMESTEP, seed).integers(2**64, dtype=np.uint64)), 2**64)
        for example in (0, 1, 2, 1000, 10**9, 10**15):
            exact = (example * golden + shift) % 1
            assert timestep(example, 1000, seed) == int(exact * 1000)


def test_two_seeds_have_two_sequences() -> None:
    one, other = ([timestep(e, 1000, seed) for e in range(100)] for seed in (0, 1))
    assert sum(a == b for a, b in zip(one, other, strict=True)) < 10


# Streams


def test_stream_numbers_never_change() -> None:
    """They are part of every result: a renumbered stream would change finished runs' numbers."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "ORDER": 0, "NOISE": 1, "POSTERIOR": 2, "FLIP": 3, "CAPTION": 4, "OFFSET": 5, "TIMESTEP": 6,
        "ADAPTER_INIT": 7, "DROPOUT": 8, "PROBE": 9, "REGULARIZATION": 10,
    }  # fmt: skip


def test_every_stream_seed_and_example_differs() -> None:
    keys = [(s, seed, e) for s in Stream for seed in (0, 1) for e in (0, 1, 2)]
    drawn = {key: normal((64,), *key) for key in keys}
    for one, other in combinations(keys, 2):
        correlation = np.corrcoef(drawn[one], drawn[other])[0, 1]
        assert abs(correlation) < 0.65, (one, other)  # 5 standard errors of 1/8, for 2145 pairs
    for key in keys:
        assert torch.equal(normal((64,), *key), drawn[key])


def test_noise_is_standard_normal_and_independent_of_its_neighbour() -> None:
    noise = torch.stack([normal((4, 8, 8), Stream.NOISE, 3, e) for e in range(100)])
    assert noise.dtype == torch.float32
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-4
    correlation = (noise[1:] * noise[:-1]).mean().item()
    assert abs(correlation) < 5 / noise[1:].numel() ** 0.5


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_chance_happens_with_its_probability(probability: float) -> None:
    count = 3000
    hits = sum(chance(probability, Stream.FLIP, 0, e) for e in range(count))
    assert abs(hits - count * probability) <= 5 * (count * probability * (1 - probability)) ** 0.5


def test_epoch_order_is_another_permutation_in_every_epoch_and_seed() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(orders)) == len(orders)
    assert tuple(epoch_order(50, 1, 2)) == orders[-1]


def test_every_image_comes_first_equally_often() -> None:
    first = np.bincount([epoch_order(5, 0, epoch)[0] for epoch in range(2000)], minlength=5)
    assert stats.chisquare(first).pvalue > 1e-4


def test_hash_fraction_is_the_hash_as_a_number_from_0_to_1() -> None:
    assert hash_fraction("0" * 64) == 0
    assert hash_fraction("8" + "0" * 63) == 0.5
    assert 0.999999 < hash_fraction("f" * 64) < 1


# Training examples


@pytest.fixture
def make_examples(make_config: Callable[..., Config]) -> Callable[..., TrainExamples]:
    """Build TrainExamples of 12 random images that use every kind of random number."""
    generator = torch.Generator().manual_seed(0)
    moments, mirrored = (Moments(*torch.randn(2, IMAGES, 4, 4, 4, generator=generator)) for _ in range(2))
    input_ids = torch.randint(1, 800, (IMAGES, 77), generator=generator)

    def make(*overrides: str, examples_per_epoch: int = IMAGES) -> TrainExamples:
        config = make_config("loss.caption_dropout=0.3", "loss.noise_offset=0.2", *overrides)
        images = EncodedImages(
            [f"{i}.png" for i in range(IMAGES)], moments, mirrored, input_ids,
            torch.zeros(77, dtype=torch.int64), [(32, 32)] * IMAGES, scaling_factor=0.18215,
        )  # fmt: skip
        plan = EpochPlan(examples_per_epoch, together=1, num_train_timesteps=1000)
        return TrainExamples(images, plan, config.loss, config.seed)

    return make


def assert_same(left: dict[str, object], right: dict[str, object]) -> None:
    """Assert that two examples (or batches) are equal bit for bit."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key], key


def scramble() -> None:
    """Put every global generator into a new state."""
    number = random.SystemRandom().randrange(2**32)
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_an_example_ignores_global_generators_and_the_order_of_access(make_examples: Callable) -> None:
    examples = make_examples()
    first = [examples[e] for e in range(30)]
    other = make_examples()
    for e in np.random.default_rng(0).permutation(30):
        scramble()
        assert_same(other[int(e)], first[e])


def test_reading_examples_leaves_global_generators_alone(make_examples: Callable) -> None:
    examples = make_examples()
    scramble()
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for e in range(5):
        examples[e]
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_another_seed_changes_every_kind_of_number(make_examples: Callable) -> None:
    one, other = make_examples("seed=1"), make_examples("seed=2")
    assert [one[e]["name"] for e in range(12)] != [other[e]["name"] for e in range(12)]
    assert [int(one[e]["timesteps"]) for e in range(12)] != [int(other[e]["timesteps"]) for e in range(12)]
    assert not any(torch.equal(one[e]["noise"], other[e]["noise"]) for e in range(12))


def test_an_epoch_shows_every_image_once(make_examples: Callable) -> None:
    examples = make_examples()
    for epoch in range(3):
        names = [examples[e]["name"] for e in range(epoch * IMAGES, (epoch + 1) * IMAGES)]
        assert len(set(names)) == IMAGES


def test_what_an_epoch_drops_differs_from_epoch_to_epoch(make_examples: Callable) -> None:
    """floor(N / global batch): 10 of 12 images an epoch, and over epochs all of them."""
    examples = make_examples(examples_per_epoch=10)
    seen = Counter(examples[e]["name"] for e in range(200))
    assert len(seen) == IMAGES
    assert max(seen.values()) <= 20


def test_an_example_is_built_from_its_image_as_written(make_examples: Callable) -> None:
    """latents = (mean + std x noise) x scaling factor of the right image, the right way round."""
    examples = make_examples("seed=4")
    images, kinds = examples.images, Counter()
    for e in range(24):
        example, index = examples[e], int(epoch_order(IMAGES, 4, e // IMAGES)[e % IMAGES])
        flipped = chance(0.5, Stream.FLIP, 4, e)
        dropped = chance(0.3, Stream.CAPTION, 4, e)
        moments = images.mirrored if flipped else images.moments
        deviation = torch.exp(moments.logvar[index]).sqrt()
        latents = (moments.mean[index] + deviation * normal((4, 4, 4), Stream.POSTERIOR, 4, e)) * 0.18215
        noise = normal((4, 4, 4), Stream.NOISE, 4, e) + 0.2 * normal((4, 1, 1), Stream.OFFSET, 4, e)
        torch.testing.assert_close(example["latents"], latents)
        torch.testing.assert_close(example["noise"], noise)
        assert example["timesteps"] == timestep(e, 1000, 4)
        expected_ids = images.empty_ids if dropped else images.input_ids[index]
        assert torch.equal(example["input_ids"], expected_ids)
        assert (example["example"], example["name"]) == (e, f"{index}.png")
        kinds.update([("flipped", flipped), ("dropped", dropped)])
    assert len(kinds) == 4  # both cases of both were among the 24


# Which device sees which example when


def numbers(epochs: int = 3, **options: int) -> list[list[int]]:
    """The example numbers of one device, batch by batch, over several epochs."""
    sampler = ExampleNumbers(**({"rank": 0, "world_size": 1, "start_batch": 0} | options))
    drawn = []
    for epoch in range(sampler.first_epoch, epochs):
        sampler.set_epoch(epoch)
        drawn += list(sampler)
    return [drawn[i : i + sampler.batch_size] for i in range(0, len(drawn), sampler.batch_size)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_one_device_counts_from_zero_without_a_gap() -> None:
    assert flat(numbers(batches=5, batch_size=2)) == list(range(30))


def test_batch_4_and_4_times_batch_1_are_the_same_examples(make_examples: Callable) -> None:
    """The same images, noise and timesteps in the same order, whatever the accumulation."""
    big = numbers(batches=3, batch_size=4)
    small = numbers(batches=12, batch_size=1)
    assert [len(batch) for batch in big] == [4] * 9
    assert [len(batch) for batch in small] == [1] * 36
    assert flat(big) == flat(small)
    one, other = make_examples(), make_examples()
    for step in range(9):
        whole = collate([one[e] for e in big[step]])
        parts = [collate([other[e] for e in batch]) for batch in small[4 * step : 4 * step + 4]]
        joined = {
            key: torch.cat([part[key] for part in parts])
            if isinstance(value, torch.Tensor)
            else [entry for part in parts for entry in part[key]]
            for key, value in whole.items()
        }
        assert_same(whole, joined)


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_devices_together_see_what_one_sees(world_size: int) -> None:
    """In every forward pass, so with any accumulation in every optimiser step."""
    alone = numbers(batches=4, batch_size=2 * world_size)
    ranks = [numbers(batches=4, batch_size=2, rank=r, world_size=world_size) for r in range(world_size)]
    together = [flat(list(batches)) for batches in zip(*ranks, strict=True)]
    assert together == alone


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("start_batch", [0, 1, 4, 5, 6, 10, 14])
def test_starting_later_continues_the_same_sequence(start_batch: int, world_size: int) -> None:
    options = {"batches": 5, "batch_size": 2, "rank": world_size - 1, "world_size": world_size}
    whole = numbers(**options)
    assert numbers(**options, start_batch=start_batch) == whole[start_batch:]
