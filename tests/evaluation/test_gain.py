"""The paired gain and its standard error, and what a run's history of probes says."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from ghibli.adapters import apply
from ghibli.config.paths import resolve_path
from ghibli.data.folder import CaptionedImage
from ghibli.data.latents import Moments
from ghibli.data.validation_items import make_items
from ghibli.demo.scenes.scene import EVALUATION_SEEDS, compose, draw
from ghibli.diffusion.losses import mse
from ghibli.diffusion.process import add_noise
from ghibli.diffusion.samplers import make_scheduler
from ghibli.evaluation.gain import (
    Gain,
    Probe,
    best_epoch,
    expected_losses,
    mean_gain,
    paired_gain,
    significant_best,
)
from ghibli.models.base import BaseModel
from ghibli.models.load import load

T = 1000

# The gain


def losses_of(seed: int, images: int, items: int, gain: float) -> tuple[np.ndarray, np.ndarray]:
    """(losses, base losses) like those of a training: a large common spread, a small one of their own."""
    rng = np.random.default_rng(seed)
    difficulty = rng.gamma(4, 0.05, (images, 1)) * rng.gamma(1, 1, (images, items))
    share = 1 - gain + 0.15 * rng.standard_normal((images, 1))
    return difficulty * share, difficulty * (1 + 0.05 * rng.standard_normal((images, items)))


def jackknife(losses: np.ndarray, base: np.ndarray) -> tuple[float, float]:
    """1 - sum / sum and its standard error, leaving out one image after another."""

    def gain(ours: np.ndarray, theirs: np.ndarray) -> float:
        return 1 - ours.sum() / theirs.sum()

    count = len(losses)
    left_out = [gain(np.delete(losses, i, 0), np.delete(base, i, 0)) for i in range(count)]
    squares = sum((value - np.mean(left_out)) ** 2 for value in left_out)
    return gain(losses, base), ((count - 1) / count * squares) ** 0.5


@pytest.mark.parametrize(("images", "items"), [(2, 1), (3, 4), (64, 8)])
def test_gain_and_standard_error_are_the_jackknife_by_hand(images: int, items: int) -> None:
    losses, base = losses_of(1, images, items, 0.2)
    ours = paired_gain(torch.from_numpy(losses), torch.from_numpy(base))
    value, error = jackknife(losses, base)
    assert ours.value == pytest.approx(value, rel=1e-10)
    assert ours.standard_error == pytest.approx(error, rel=1e-10)


def test_standard_error_is_the_spread_over_repeats() -> None:
    """600 experiments with 64 images each: their gains scatter as much as each one predicted."""
    gains = [paired_gain(*map(torch.from_numpy, losses_of(seed, 64, 8, 0.3))) for seed in range(600)]
    values = np.array([gain.value for gain in gains])
    errors = np.array([gain.standard_error for gain in gains])
    assert abs(values.mean() - 0.3) < 4 * values.std() / len(gains) ** 0.5 + 0.002
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(ddof=1), rel=0.12)
    covered = (np.abs(values - 0.3) < 1.96 * errors).mean()
    assert 0.91 < covered < 0.98  # 95 % of the intervals hold the true gain


@pytest.mark.parametrize("images", [5, 20, 50])
def test_intervals_hold_the_true_gain_with_few_images_too(images: int) -> None:
    """1000 experiments; with 1.96 in place of Student's t five images have it in 87 % of them."""
    for measure in (paired_gain, mean_gain):
        gains = [measure(*map(torch.from_numpy, losses_of(seed, images, 4, 0.3))) for seed in range(1000)]
        covered = np.mean([gain.low <= 0.3 <= gain.high for gain in gains])
        assert 0.9 < covered < 0.99, measure


@pytest.mark.parametrize(("images", "items"), [(2, 1), (3, 4), (40, 4)])
def test_the_mean_gain_is_that_of_the_columns_by_hand(images: int, items: int) -> None:
    losses, base = losses_of(3, images, items, 0.2)
    ours = mean_gain(torch.from_numpy(losses), torch.from_numpy(base))

    def gain(rows: list[int]) -> float:
        return float(np.mean([1 - losses[rows, k].sum() / base[rows, k].sum() for k in range(items)]))

    everything = list(range(images))
    left_out = [gain([j for j in everything if j != i]) for i in everything]
    squares = sum((value - np.mean(left_out)) ** 2 for value in left_out)
    assert ours.value == pytest.approx(gain(everything), rel=1e-10)
    assert ours.standard_error == pytest.approx(((images - 1) / images * squares) ** 0.5, rel=1e-9)
    assert ours.freedom == images - 1


def test_the_balanced_gain_counts_a_quarter_with_small_losses_as_much() -> None:
    base = torch.tensor([72.0, 20.0, 7.1, 0.9]).repeat(9, 1) * torch.rand(9, 1).add(0.5)
    ours = base * torch.tensor([0.5, 0.5, 0.75, 1.8])
    probe = Probe(val=ours, val_g1=ours, train=ours, base_val=base, base_train=base)
    assert probe.val_gain.value == pytest.approx(0.47, abs=0.01)
    assert probe.balanced_gain.value == pytest.approx((0.5 + 0.5 + 0.25 - 0.8) / 4, abs=1e-5)


def priced(losses: np.ndarray, base: np.ndarray) -> Probe:
    ours = torch.ones(3, 4)
    return Probe(ours, ours, ours, ours, ours, torch.from_numpy(losses), torch.from_numpy(base))


@pytest.mark.parametrize(("groups", "items"), [(2, 1), (7, 4)])
def test_the_price_is_the_share_above_the_base_by_hand(groups: int, items: int) -> None:
    losses, base = losses_of(4, groups, items, -0.1)
    price = priced(losses, base).forgotten
    value, error = jackknife(losses, base)
    assert price.value == pytest.approx(losses.sum() / base.sum() - 1, rel=1e-10)
    assert price.value == pytest.approx(-value, rel=1e-10) and price.value > 0
    assert (price.standard_error, price.freedom) == (pytest.approx(error, rel=1e-9), groups - 1)


def test_the_price_of_nothing_is_exactly_zero_and_of_no_images_none() -> None:
    _, base = losses_of(5, 7, 4, 0)
    assert priced(base.copy(), base).forgotten == Gain(0.0, 0.0, freedom=6)
    assert priced(base.copy(), base).forgotten.signed_size == "0.0 % +- 0.0 %"
    ours = torch.ones(3, 4)
    for without in (Probe(ours, ours, ours, ours, ours), priced(np.empty((0, 4)), np.empty((0, 4)))):
        assert without.forgotten is None and without.broken == []


def test_a_price_that_is_not_finite_is_found() -> None:
    losses, base = losses_of(6, 7, 4, 0)
    losses[2, 1] = np.nan
    assert priced(losses, base).broken == [3 + 3 + 2]  # behind three held-out and three training images


def test_pairing_shrinks_the_standard_error() -> None:
    """Against base losses of other images the same gain would have a several times larger one."""
    losses, base = map(torch.from_numpy, losses_of(2, 64, 8, 0.3))
    unpaired = paired_gain(losses, base[torch.randperm(64, generator=torch.Generator().manual_seed(0))])
    assert paired_gain(losses, base).standard_error < unpaired.standard_error / 3


def test_equal_losses_are_a_gain_of_exactly_zero() -> None:
    losses = torch.rand(7, 3)
    assert paired_gain(losses, losses.clone()) == Gain(0.0, 0.0, freedom=6)


@pytest.mark.parametrize(("factor", "gain"), [(0.75, 0.25), (0.5, 0.5), (2.0, -1.0), (0.0, 1.0)])
def test_losses_a_factor_lower_are_that_gain_without_error(factor: float, gain: float) -> None:
    base = torch.rand(7, 3) + 0.1
    ours = paired_gain(factor * base, base)
    assert ours.value == pytest.approx(gain, abs=1e-6)
    assert ours.standard_error == pytest.approx(0, abs=1e-6)


def test_one_image_has_a_gain_but_no_standard_error() -> None:
    ours = paired_gain(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
    assert ours.value == 0.25
    assert np.isnan(ours.standard_error)
    assert str(ours) == "better than the base by 25.0 % on held-out images"


def test_many_small_losses_are_summed_in_float64() -> None:
    """fp32 sums of a million numbers lose more than the gain."""
    base = torch.full((1000, 1000), 0.1)
    assert paired_gain(base * (1 - 2**-20), base).value == pytest.approx(2**-20, rel=0.05)


# A run's history


def history_of(*val_gains: float, images: int = 40, noise: float = 0.01) -> list[Probe]:
    """Probes with about these gains over the base; the first is the untouched model's."""
    rng = np.random.default_rng(5)
    base = torch.from_numpy(rng.gamma(4, 0.05, (images, 4)))

    def probe(gain: float) -> Probe:
        share = 1 - gain + noise * torch.from_numpy(rng.standard_normal((images, 1))) * (gain != 0)
        return Probe(val=base * share, val_g1=base * share, train=base, base_val=base, base_train=base)

    return [probe(gain) for gain in val_gains]


def test_best_epoch_is_the_lowest_loss_and_never_the_start() -> None:
    assert best_epoch(history_of(0, 0.1, 0.3, 0.2)) == 2
    assert best_epoch(history_of(0, -0.1, -0.3)) == 1
    assert best_epoch(history_of(0)) == 0


def test_significant_best_moves_by_more_than_chance_only() -> None:
    steps = history_of(0, 0.10, 0.1001, 0.2, 0.19, 0.15)
    moved = [significant_best(steps[:count]).value for count in range(1, 7)]
    assert moved[0] == 0
    assert moved[1] == pytest.approx(0.10, abs=0.01)
    assert moved[2] == moved[1]  # 0.0001 better is within the error
    assert moved[3] == pytest.approx(0.2, abs=0.01)
    assert moved[5] == moved[4] == moved[3]


def test_significant_best_ignores_what_is_too_small_to_matter() -> None:
    """Steps of 0.14 points, ten standard errors each: with a threshold of 0.2 every second one counts."""
    steps = history_of(0, 0.3, 0.3014, 0.3028, 0.3042, noise=1e-4)
    every = [significant_best(steps[:count]).value for count in range(2, 6)]
    assert every == [probe.val_gain.value for probe in steps[1:]]
    some = [significant_best(steps[:count], least=0.002).value for count in range(2, 6)]
    assert some == [every[0], every[0], every[2], every[2]]
    assert significant_best(steps, least=0.5).value == 0


def test_gain_by_timestep_is_the_gain_of_each_part() -> None:
    base = torch.rand(9, 4) + 0.1
    ours = base * torch.tensor([1.0, 0.9, 0.5, 2.0])
    probe = Probe(val=ours, val_g1=ours, train=ours, base_val=base, base_train=base)
    assert [gain.value for gain in probe.gain_by_timestep] == pytest.approx([0, 0.1, 0.5, -1], abs=1e-6)


def test_expected_losses_follow_the_timestep() -> None:
    """A loss that falls with the timestep is recovered everywhere from scattered noisy items."""
    rng = np.random.default_rng(0)
    timesteps = torch.from_numpy(rng.integers(0, T, 800))
    truth = torch.linspace(1.0, 0.1, T)
    losses = truth[timesteps] * torch.from_numpy(1 + 0.1 * rng.standard_normal(800)).float()
    table = expected_losses(timesteps, losses, T)
    assert table.shape == (T,)
    assert (table - truth).abs().max() < 0.05
    few = expected_losses(torch.tensor([10, 900]), torch.tensor([0.8, 0.2]), T)
    assert torch.equal(few, torch.full((T,), 0.5))


def image(name: str, caption: str) -> CaptionedImage:
    return CaptionedImage(Path(name), caption, hashlib.sha256(name.encode()).hexdigest())


@pytest.mark.slow
@torch.no_grad()
def test_standard_error_is_the_spread_over_redrawn_images_and_items() -> None:
    """The `error` experiment of docs/loss_anomaly.py, small: sixteen times six new scenes with new items."""
    models = [load("demo"), load("demo")]
    apply.merge(models[1], resolve_path("demo/near"), 1.0)
    base, alphas_cumprod = models[0], make_scheduler("ddpm", models[0]).alphas_cumprod
    gains = []
    for seed in range(EVALUATION_SEEDS.start, EVALUATION_SEEDS.start + 96, 6):
        drawn = [np.asarray(draw(compose(seed + i), "drawn")) for i in range(6)]
        pixel_values = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
        posterior = base.vae.encode(pixel_values).latent_dist
        drawn = [image(str(seed + i), compose(seed + i).caption) for i in range(6)]
        input_ids = base.tokenize([p.caption for p in drawn])
        batches = make_items(
            drawn, Moments(posterior.mean, posterior.logvar), input_ids, items_per_image=2,
            num_train_timesteps=T, scaling_factor=base.vae.config.scaling_factor,
        )  # fmt: skip
        scores = [torch.stack([losses(model, b, alphas_cumprod) for b in batches]) for model in models]
        gains.append(paired_gain(scores[1], scores[0]))
    spread = np.std([gain.value for gain in gains], ddof=1)
    reported = np.mean([gain.standard_error for gain in gains])
    assert np.mean([gain.value for gain in gains]) > 0.2
    assert 0.6 < reported / spread < 1.7  # sixteen repeats estimate a spread to 18 %


def losses(model: BaseModel, batch: dict, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """(K,) losses of one image's items."""
    noisy_latents = add_noise(batch["latents"], batch["noise"], batch["timesteps"], alphas_cumprod)
    prompt_embeds = model.encode_prompts(batch["input_ids"])
    noise_pred = model.unet(noisy_latents, batch["timesteps"], prompt_embeds).sample
    return mse(noise_pred, batch["noise"])
