"""Effects of settings and of the seed, on trials whose losses are made by hand."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch

from ghibli.evaluation.gain import Gain, Probe, paired_gain
from ghibli.runs.folder import RunDir
from ghibli.sweeps import effects, plots, ranking
from ghibli.sweeps.effects import seed_noise
from ghibli.sweeps.trials import Trial, varied


def make_trial(path: Path, rank: int, dropout: float, losses: torch.Tensor, base: torch.Tensor) -> Trial:
    probe = Probe(val=losses, val_g1=losses, train=losses, base_val=base, base_train=base)
    settings = {"lora.rank": rank, "lora.alpha": 2.0 * rank, "lora.dropout": dropout}
    return Trial(RunDir(path), settings, {}, probe)


def with_settings(one: Trial, **settings: object) -> Trial:
    """The trial with further settings; `lora_alpha` is lora.alpha."""
    more = {key.replace("_", ".", 1): value for key, value in settings.items()}
    return replace(one, settings=one.settings | more)


def test_effects_of_a_grid_are_what_was_put_in(tmp_path: Path) -> None:
    """Rank 32 lowers every loss by 0.1, dropout changes nothing: only the first matters."""
    draws = torch.Generator().manual_seed(0)
    base = 1 + 0.2 * torch.rand(40, 4, generator=draws)
    trials = [
        make_trial(
            tmp_path, rank, dropout,
            base - (0.3 if rank == 32 else 0.2) + 0.01 * torch.randn(40, 4, generator=draws), base,
        )
        for rank in (16, 32)
        for dropout in (0, 0.1)
    ]  # fmt: skip
    first, second = effects.effects(trials)
    assert (first.key, first.pairs, first.matters) == ("lora.rank", 2, True)  # alpha follows: not named
    assert first.difference.value == pytest.approx(0.1 / 1.1, abs=3 * first.difference.standard_error)
    assert second.key == "lora.dropout"
    assert second.difference.value == pytest.approx(0, abs=4 * second.difference.standard_error)
    nothing = effects.Effect("lora.dropout", 0, 0.1, 1, Gain(0.01, 0.02))
    assert not nothing.matters
    assert str(nothing).endswith("95 % -2.92 .. +4.92, 1 pair (indistinguishable from zero)")
    (line, *_) = csv.DictReader(io.StringIO(ranking.effects_csv(trials)))
    assert (line["key"], line["low"], line["high"], line["pairs"]) == ("lora.rank", "16", "32", "2")
    assert float(line["low95"]) == pytest.approx(100 * first.difference.low, abs=1e-4)
    one = paired_gain(trials[2].best.val, base).value - paired_gain(trials[0].best.val, base).value
    two = paired_gain(trials[3].best.val, base).value - paired_gain(trials[1].best.val, base).value
    assert first.difference.value == pytest.approx((one + two) / 2)
    assert first.each == pytest.approx((one, two))
    assert first.error_over_pairs == pytest.approx(scipy.stats.sem([one, two]))
    assert float(line["se_pairs"]) == pytest.approx(100 * scipy.stats.sem([one, two]), abs=1e-4)
    assert (float(line["least"]), float(line["most"])) == pytest.approx(
        (100 * min(one, two), 100 * max(one, two)), abs=1e-4
    )
    assert f"2 pairs from {100 * min(one, two):+.2f} to {100 * max(one, two):+.2f} (mean +- " in str(first)


def test_alpha_that_is_chosen_apart_from_rank_is_a_setting(tmp_path: Path) -> None:
    base = torch.ones(3, 2)
    trials = [make_trial(tmp_path, rank, 0, base - 0.01 * rank, base) for rank in (4, 8)]
    assert varied(trials) == ["lora.rank"]
    free = [with_settings(trial, lora_alpha=alpha) for trial in trials for alpha in (8.0, 16.0)]
    assert varied(free) == ["lora.rank", "lora.alpha"]
    assert {effect.key: effect.pairs for effect in effects.effects(free)} == {"lora.rank": 2, "lora.alpha": 2}


def test_the_fixed_alpha_of_rslora_is_no_setting_of_its_own(tmp_path: Path) -> None:
    """2 x rank for LoRA, 16 at every rank for rslora: both follow from rank and variant."""
    base = torch.ones(3, 2)
    plain = [make_trial(tmp_path, rank, 0, base - 0.01 * rank, base) for rank in (4, 8)]
    trials = [with_settings(trial, lora_variant="lora") for trial in plain]
    trials += [with_settings(trial, lora_variant="rslora", lora_alpha=16.0) for trial in plain]
    assert varied(trials) == ["lora.rank", "lora.variant"]
    assert {effect.key: effect.pairs for effect in effects.effects(trials)} == {
        "lora.rank": 2, "lora.variant": 2,
    }  # fmt: skip
    changed = [*trials, with_settings(trials[-1], lora_alpha=8.0)]
    assert "lora.alpha" in varied(changed)


def test_the_same_trial_in_two_folders_is_one(tmp_path: Path) -> None:
    base = torch.ones(3, 2)
    first, again, other = (
        with_settings(make_trial(tmp_path, rank, 0, base - gain, base), seed=0)
        for rank, gain in ((4, 0.1), (4, 0.3), (8, 0.2))
    )
    assert effects.seed_noise([first, again, other]) is None
    (effect,) = effects.effects([first, again, other])
    assert effect.pairs == 1 and effect.difference.value == pytest.approx(0.1)


def test_an_effect_over_two_bases_and_over_lists(tmp_path: Path) -> None:
    """One base is scored on two items, the other on four: the mean of their effects, 0.1 and 0.3."""
    trials = [
        with_settings(
            make_trial(tmp_path, 4, 0, base * (1 - (len(targets) == 1) * share), base),
            lora_targets=targets, validation_items_per_image=base.shape[1],
        )
        for base, share in ((torch.ones(3, 2), 0.1), (2 * torch.ones(3, 4), 0.3))
        for targets in (["to_q"], ["to_q", "to_k"])
    ]  # fmt: skip
    (effect,) = effects.effects(trials)
    both, one = ["to_q", "to_k"], ["to_q"]
    assert (effect.key, effect.low, effect.high, effect.pairs) == ("lora.targets", both, one, 2)
    assert effect.difference.value == pytest.approx(0.2)
    assert plots.write_plot(tmp_path, trials).exists()


def test_seed_noise_is_the_pooled_deviation(tmp_path: Path) -> None:
    """Against numbers by hand: (0.1, 0.3) and (0.2, 0.6) have variances 0.02 and 0.08, pooled 0.05."""

    def seeded_trial(rank: int, seed: int, gain: float) -> Trial:
        base = torch.ones(3, 2)
        probe = Probe(val=base - gain, val_g1=base, train=base, base_val=base, base_train=base)
        return Trial(RunDir(tmp_path), {"lora.rank": rank, "seed": seed}, {}, probe)

    trials = [seeded_trial(*one) for one in ((2, 0, 0.1), (2, 1, 0.3), (4, 0, 0.2), (4, 1, 0.6))]
    noise = seed_noise(trials)
    assert noise.deviation == pytest.approx(0.05**0.5, rel=1e-5)
    assert (noise.freedom, noise.settings) == (2, 2)
    assert noise.band == pytest.approx(4.3027 * 2**0.5 * noise.deviation, rel=1e-4)  # t table, 2 degrees
    assert seed_noise(trials[::2]) is None
