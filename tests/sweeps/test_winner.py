"""The winner of a study on images that did not choose it: the curse, and that it is lifted."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ghibli.evaluation.gain import Probe, paired_gain
from ghibli.runs.folder import RunDir
from ghibli.runs.repeats import repetition
from ghibli.sweeps.repeats import missing_for_order
from ghibli.sweeps.trials import Trial
from ghibli.sweeps.winner import by_settings, close_second, is_close, order, seeded, winner


@pytest.fixture(autouse=True)
def first_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of `a`, which `a+seed=1` repeats."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a", "config.yaml").touch()


def trials_of(base: torch.Tensor, losses: list[torch.Tensor]) -> list[Trial]:
    probes = [Probe(val=one, val_g1=one, train=one, base_val=base, base_train=base) for one in losses]
    return [Trial(RunDir(Path()), {"lora.rank": rank}, {}, probe) for rank, probe in enumerate(probes)]


def test_the_half_that_did_not_choose_shows_no_luck() -> None:
    """300 studies of 16 trials, all of the same true gain of 30 %: the largest gain is above it, always."""
    shown, fresh, covered = [], [], 0
    for seed in range(300):
        draws = torch.Generator().manual_seed(seed)
        base = 1 + 0.2 * torch.rand(40, 4, generator=draws)
        found = winner(
            trials_of(base, [base * (0.7 + 0.1 * torch.randn(40, 4, generator=draws)) for _ in range(16)])
        )
        shown.append(found.shown.value)
        fresh.append(found.fresh.value)
        covered += found.fresh.low <= 0.3 <= found.fresh.high
    error = np.std(fresh) / 300**0.5
    assert abs(np.mean(fresh) - 0.3) < 3 * error
    assert np.mean(shown) > 0.3 + 10 * error
    assert 0.9 < covered / 300 < 0.99


def test_it_is_the_gain_of_the_halves_winners_by_hand() -> None:
    base = torch.ones(8, 2)
    one, other = base.clone(), base.clone()
    one[0::2], one[1::2] = 0.2, 0.8  # the best on the even half
    other[0::2], other[1::2] = 0.6, 0.7  # the best on the odd half
    found = winner(trials_of(base, [one, other, base]))
    assert found.trials == 3
    assert found.shown == paired_gain(one, base)
    mixed = torch.stack([other[0], one[1]] * 4)  # each half's losses are of the other half's winner
    assert found.fresh == paired_gain(mixed, base)
    assert "50.0 % +- " in str(found) and "chosen among 3 trials" in str(found)


def test_nothing_is_said_of_one_trial_or_too_few_images() -> None:
    base = torch.ones(8, 2)
    assert winner([]) is None
    assert winner(trials_of(base, [base])) is None
    assert winner(trials_of(base[:6], [base[:6], 0.5 * base[:6]])) is None


def repeated(
    base: torch.Tensor, seeds: list[torch.Tensor], chosen: torch.Tensor, rank: int = 8
) -> list[Trial]:
    """A trial that was chosen, with seed 0, and its repeats with other seeds."""
    trials = []
    for seed, losses in enumerate([chosen, *seeds]):
        probe = Probe(val=losses, val_g1=losses, train=losses, base_val=base, base_train=base)
        path = Path(f"a+seed={seed}" if seed else "a")
        trials.append(Trial(RunDir(path), {"lora.rank": rank, "seed": seed}, {}, probe))
    return trials


def test_the_interval_over_images_and_seeds_holds_the_true_gain() -> None:
    """300 studies of a winner with three other seeds: luck of images, of seeds and of both, 30 % in truth."""
    covered, images_alone = 0, 0
    for number in range(300):
        draws = torch.Generator().manual_seed(number)
        base = torch.ones(40, 4)
        of_image = 0.1 * torch.randn(40, 1, generator=draws)  # shared by the seeds
        seeds = [
            base * (0.7 + 0.03 * torch.randn(1, generator=draws))
            + of_image + 0.05 * torch.randn(40, 4, generator=draws)
            for _ in range(3)
        ]  # fmt: skip
        (found,) = seeded(repeated(base, seeds, chosen=seeds[0] - 0.2))
        assert found.seeds == 3
        covered += found.gain.low <= 0.3 <= found.gain.high
        alone = paired_gain(torch.stack(seeds).mean(0), base)
        images_alone += alone.low <= 0.3 <= alone.high
    assert 0.9 < covered / 300 < 0.995
    assert images_alone < covered - 15


def test_the_seed_that_was_chosen_is_left_out() -> None:
    base = torch.ones(8, 2)
    others = [base - 0.2 - 0.01 * torch.arange(8)[:, None] for _ in range(2)]
    (found,) = seeded(repeated(base, others, chosen=base - 0.9))
    assert found.gain.value == paired_gain(others[0], base).value
    assert "with 2 other seeds" in str(found)
    assert "the best trial's settings with 2 other seeds" in str(found)
    assert seeded(repeated(base, others[:1], chosen=base - 0.9)) == []
    assert seeded([]) == []


def test_a_second_within_two_errors_asks_for_repeats() -> None:
    draws = torch.Generator().manual_seed(0)
    base = torch.ones(40, 2)
    best = base - 0.5 + 0.1 * torch.randn(40, 2, generator=draws)
    near = best + 0.1 * torch.randn(40, 2, generator=draws)
    assert "sweep.repeats=3" in close_second(trials_of(base, [best, near]))
    assert close_second(trials_of(base, [best, best + 0.1])) is None
    assert close_second(trials_of(base, [best])) is None


def test_the_order_of_the_best_two_is_that_of_the_seeds_that_chose_neither() -> None:
    """Here the second trial's settings are the better ones, by the same with every seed."""
    draws = torch.Generator().manual_seed(0)
    base = torch.ones(40, 2)
    seeds = [0.1 * torch.randn(40, 2, generator=draws) for _ in range(3)]
    first = repeated(base, [base - 0.48 + one for one in seeds], chosen=base - 0.501)
    second = repeated(base, [base - 0.52 + one for one in seeds], chosen=base - 0.5, rank=4)
    found = order([*second, *first])
    assert found.seeds == 3
    assert found.ahead.value == pytest.approx(-0.04, abs=1e-6)
    assert "with 3 other seeds in pairs: -4.00" in str(found) and "the second is better" in str(found)
    assert [one.place for one in seeded([*second, *first])] == [1, 2]
    assert winner([*second, *first]).trials == 2  # not among the repeats
    assert order([*second, *first[:2]]) is None


def test_repeats_are_asked_for_until_both_have_them() -> None:
    """A command that was stopped halfway goes on; two seeds of the same settings have no order."""
    base = torch.ones(40, 2)
    best = base - 0.5 + 0.1 * torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    near = best + 0.001 * torch.arange(40)[:, None].cos()
    first, second = repeated(base, [best, near], best), repeated(base, [best, near], near, rank=4)
    assert is_close([first[0], second[0]])
    assert is_close([*first, *second[:2]])
    assert not is_close([*first, *second])
    swept = [Trial(RunDir(Path(str(seed))), first[seed].settings, {}, first[seed].best) for seed in range(3)]
    assert not is_close(swept)
    assert [len(group) for group in by_settings([*swept, second[0]])] == [3, 1]
    assert not by_settings([*swept, second[0]])[0][0].repeats


def of_seeds(rank: int, gains: list[float]) -> list[Trial]:
    """Trials of the same settings with the seeds 0, 1, ..., swept, and these gains."""
    base, losses = torch.ones(8, 2), list[torch.Tensor]()
    for seed, gain in enumerate(gains):
        luck = torch.randn(8, 2, generator=torch.Generator().manual_seed(10 * rank + seed))
        losses.append(base * (1 - gain) + 0.1 * (luck - luck.mean()))
    probes = [Probe(val=one, val_g1=one, train=one, base_val=base, base_train=base) for one in losses]
    return [
        Trial(RunDir(Path(f"{rank}-{seed}")), {"lora.rank": rank, "seed": seed}, {}, probe)
        for seed, probe in enumerate(probes)
    ]


def repeat_of(trial: Trial, seed: int) -> Trial:
    """The same settings with another seed, a little worse."""
    worse = trial.scores.val + 0.05 + 0.01 * torch.rand(8, 2, generator=torch.Generator().manual_seed(seed))
    settings = trial.settings | {"seed": seed}
    return replace(
        trial, run=repetition(trial.run, seed), settings=settings, best=replace(trial.scores, val=worse)
    )


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        (([0.5], [0.49]), [(8, 1), (4, 1), (8, 2), (4, 2)]),
        (([0.5, 0.3], [0.3, 0.49]), [(8, 2), (4, 2), (8, 3), (4, 3)]),  # 1 chose one of them, 0 the other
        (([0.5, 0.3, 0.3], [0.3, 0.49, 0.3]), [(8, 3), (4, 3)]),  # three seeds each, but one in common
        (([0.5, 0.3, 0.3], [0.49]), [(4, 1), (4, 2)]),
        (([0.5, 0.3, 0.3], [0.49, 0.3, 0.3]), []),
    ],
)
def test_the_best_two_are_repeated_until_they_share_seeds_that_chose_neither(
    gains: tuple[list[float], list[float]], wanted: list[tuple[int, int]]
) -> None:
    trials = [*of_seeds(8, gains[0]), *of_seeds(4, gains[1])]
    repeats = missing_for_order(by_settings(trials))
    assert [(trial.settings["lora.rank"], seed) for trial, seed in repeats] == wanted
    assert is_close(trials) == (wanted != []) and (order(trials) is None) == (wanted != [])
    done = [repeat_of(trial, seed) for trial, seed in repeats]
    assert order([*trials, *done]).seeds == 2 and not is_close([*trials, *done])


def test_a_repeat_never_stands_for_settings_whose_own_trial_is_gone() -> None:
    """Its first trial has failed: with the best gain of all among the repeats, the settings have no place."""
    base = torch.ones(40, 2)
    first = repeated(base, [base - 0.9, base - 0.8], chosen=base - 0.85)[1:]
    second = repeated(base, [base - 0.3, base - 0.2], chosen=base - 0.25, rank=4)
    assert [[trial.repeats for trial in group] for group in by_settings([*first, *second])] == [
        [trial.repeats for trial in second[:1]] + [first[0].repeats] * 2
    ]
    assert [one.place for one in seeded([*first, *second])] == [1]
    assert seeded([*first, *second])[0].gain.value == pytest.approx(0.25, abs=1e-6)
    assert order([*first, *second]) is None
