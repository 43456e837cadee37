"""Racing: its test against scipy's, false stops on simulated scores, and what a raced study leaves behind."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from helpers.commands import SMALL, python_sweep

from ghibli.config.schema import Config
from ghibli.evaluation.gain import Probe
from ghibli.runs.folder import RunDir
from ghibli.sweeps import grid, jobs, race
from ghibli.sweeps.trials import read_trials

IMAGES, ITEMS, EPOCHS = 50, 4, 5


def probe(losses: torch.Tensor, base: torch.Tensor) -> Probe:
    return Probe(val=losses, val_g1=losses, train=losses, base_val=base, base_train=base)


def study(quality: list[float], seed: int, spread: float = 0.1, epochs: int = EPOCHS) -> list[list[Probe]]:
    """Histories of trials with these true gains at every epoch, on shared images.

    Each trial has its own skewed luck with each image, most of it the same in all epochs, as in real runs.
    """
    draws = torch.Generator().manual_seed(seed)
    base = torch.rand(IMAGES, 1, generator=draws) + 0.5 + 0.2 * torch.rand(IMAGES, ITEMS, generator=draws)
    histories = []
    for gain in quality:
        lasting = torch.randn(IMAGES, 1, generator=draws).exp() - math.exp(0.5)  # of mean 0
        history = [probe(base, base)]
        for epoch in range(1, epochs + 1):
            luck = lasting + 0.3 * torch.randn(IMAGES, ITEMS, generator=draws)
            history.append(probe(base * (1 - gain * epoch / epochs) + spread * luck, base))
        histories.append(history)
    return histories


def stops(studies: list[list[list[Probe]]], chance: float | None) -> float:
    """Share of studies in which any trial is stopped."""
    return sum(bool(race.replay(one, chance)["stopped"]) for one in studies) / len(studies)


@pytest.mark.parametrize(("trials", "epochs"), [(8, 5), (16, 2)])
def test_false_stops_stay_below_the_stated_level(trials: int, epochs: int) -> None:
    """200 studies of which no trial is better: any stop is a false one.

    Counting looks alone is not enough: the rival is the best so far on these very images, the luckiest.
    """
    studies = [study([0.3] * trials, seed, epochs=epochs) for seed in range(200)]
    assert stops(studies, None) <= race.ALPHA
    looks = (trials - 1) * (epochs - 1)
    assert stops(studies, race.ALPHA / looks) > (0 if trials == 8 else 2 * race.ALPHA)
    assert stops(studies, race.ALPHA) > 2 * race.ALPHA


def test_the_winner_stays_and_half_of_the_steps_are_saved() -> None:
    """A good trial first or last among weak ones: the same winner as without a race."""
    for place in (0, 3, 7):
        quality = [0.1] * 8
        quality[place] = 0.6
        for seed in range(20):
            histories = study(quality, seed, spread=0.05)
            found = race.replay(histories)
            assert found["winner"] == place
            if place == 0:
                assert found["epochs"] <= EPOCHS * 8 / 2
                assert set(found["stopped"]) == set(range(1, 8))


def test_the_look_is_scipys_paired_t_test() -> None:
    draws = torch.Generator().manual_seed(0)
    for shift in (-0.1, 0.0, 0.02, 0.05, 0.2):
        ours, leaders = torch.randn(2, 20, 4, generator=draws)
        ours = ours + shift
        test = scipy.stats.ttest_rel(ours.double().mean(1), leaders.double().mean(1), alternative="greater")
        for chance in (0.4, 0.05, 0.001, test.pvalue * 0.99, min(test.pvalue * 1.01, 0.999)):
            assert race.behind(ours, leaders, chance) == (test.pvalue < chance)


@pytest.mark.parametrize(("points", "spread", "chance"), [(1, 8, 0.05), (3, 8, 0.001), (10, 5, 1e-4)])
def test_the_images_needed_have_the_power(points: float, spread: float, chance: float) -> None:
    """By scipy's noncentral t: enough with them and not with one fewer; and in 2000 simulated looks."""
    count = race.images_needed(points, spread, chance)
    power = [
        scipy.stats.nct.sf(scipy.stats.t.isf(chance, n - 1), n - 1, points / spread * n**0.5)
        for n in (count, count - 1)
    ]
    assert power[0] > race.POWER >= power[1]
    draws = np.random.default_rng(0).normal(points, spread, (2000, count))
    found = scipy.stats.ttest_1samp(draws, 0, axis=1, alternative="greater").pvalue < chance
    assert found.mean() == pytest.approx(power[0], abs=0.04)


def power_of(count: int, points: float, spread: float, chance: float) -> float:
    """Chance that a one-sided t-test finds the difference, integrated over the standard deviation it sees."""
    bound, shift = scipy.stats.t.isf(chance, count - 1), points / spread * count**0.5
    seen = scipy.stats.chi(count - 1, scale=(count - 1) ** -0.5)  # over the true one

    def found_by(share: float) -> float:
        return seen.pdf(share) * scipy.stats.norm.cdf(shift - bound * share)

    return scipy.integrate.quad(found_by, seen.ppf(1e-10), seen.isf(1e-10), limit=200)[0]


@pytest.mark.parametrize(
    ("points", "spread", "chance"),
    [
        (3, 10, 0.0025), (1, 13.4, 0.0025), (0.5, 20, 1e-3), (3, 10, 1e-5), (1, 8, 0.05), (10, 5, 1e-4),
        (30, 3, 0.0025), (1, 60, 1e-4),
    ],
)  # fmt: skip
def test_the_images_needed_are_the_fewest_however_many(points: float, spread: float, chance: float) -> None:
    """By integration, where scipy's noncentral t is NaN for counts far above: 15755 was said for 152."""
    count = race.images_needed(points, spread, chance)
    assert power_of(count, points, spread, chance) >= race.POWER - 1e-6
    assert count == 3 or power_of(count - 1, points, spread, chance) < race.POWER + 1e-6
    quantiles = scipy.stats.norm.isf(chance) + scipy.stats.norm.ppf(race.POWER)
    assert count == pytest.approx((quantiles * spread / points) ** 2, rel=0.01, abs=10)


def test_the_spread_is_that_of_the_differences_in_points() -> None:
    base = torch.full((4, 2), 2.0)
    ours, theirs = base.clone(), base.clone()
    ours[:, 0] -= torch.tensor([0.0, 0.2, 0.4, 0.6])
    wanted = 100 / 2 * (ours - theirs).mean(1).std().item()
    assert race.spread_of([[probe(base, base)], [probe(ours, base)]]) is not None
    assert race.spread_of([[probe(ours, base)], [probe(theirs, base)]]) == pytest.approx(wanted)
    assert race.spread_of([[probe(ours, base)], [probe(theirs, 2 * base)]]) is None
    assert race.spread_of([[probe(ours, base)]]) is None
    assert race.spread_of([[probe(ours, base)]] * 2) is None  # two runs of the same settings


def test_a_trial_is_compared_with_its_like_only() -> None:
    """Not with one of other length, of other items, or with itself before its first epoch."""
    good, bad = study([0.6, 0.1], seed=0)
    named = race.Runner("lora.rank=8", EPOCHS, good)
    judge = race.judge_by([named], EPOCHS, 0.01)
    assert judge(bad[:1]) is None
    assert "points of gain behind lora.rank=8" in str(judge(bad[:3]))
    assert "after epoch 2" in str(judge(bad[:3]))
    assert race.judge_by([], EPOCHS, 0.01)(bad[:3]) is None
    assert race.judge_by([race.Runner("x", EPOCHS - 1, good)], EPOCHS, 0.01)(bad[:3]) is None
    other = [probe(one.val, one.base_val + 1) for one in good]
    assert race.judge_by([race.Runner("x", EPOCHS, other)], EPOCHS, 0.01)(bad[:3]) is None
    early = race.Runner("x", EPOCHS, good[:3])  # stopped early: its last epoch stands for later ones
    assert race.judge_by([early], EPOCHS, 0.01)(bad[:5]) is not None


def test_what_is_said_before_a_study() -> None:
    lines = race.announcement([5] * 4, study([0.3, 0.3], seed=0))
    assert "4 trials, 20 epochs at most; up to 24 comparisons, each at a chance of 0.0021" in lines[0]
    assert "those runs had 50" in lines[1] and " for 1 point and " in lines[1]
    assert "is known after two runs" in race.announcement([5] * 4, [])[1]


def test_a_race_says_how_long_the_rest_takes(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first trial takes 5 minutes, the second is stopped after one: 3 on average."""
    config, clock, said = make_config(), [0.0], list[str]()
    monkeypatch.setattr(jobs, "timed", [])
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(race, "settings_and_folder", lambda words: (config, RunDir(tmp_path / words[0])))
    monkeypatch.setattr(race, "past_histories", lambda config: [])
    monkeypatch.setattr(race, "logger", SimpleNamespace(info=said.append))
    minutes = iter([5, 1, 0])

    def train(config: Config, run: RunDir, judge: race.Judge) -> float:
        clock[0] += 60 * next(minutes)
        return 0.5

    race.race([["seed=0"], ["seed=1"], ["seed=2"]], train)
    assert [line for line in said if line.startswith("trial ")] == [
        "trial 1 of 3: seed=0",
        "trial 2 of 3, about 10 min left: seed=1",
        "trial 3 of 3, about 3 min left: seed=2",
    ]


@pytest.mark.slow
def test_a_raced_study_stops_the_hopeless_and_the_plain_grid_resumes_them_to_the_bit(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [
        *SMALL, f"data.root={images}", "data.draw=null", "data.val_fraction=0.5", "trainer.max_epochs=3",
        "early_stopping.patience=null", "optimizer.lr=2e-3,1e-7",
    ]  # fmt: skip
    raced = [*words, f"hydra.sweep.dir={tmp_path / 'study'}"]
    for _ in range(2):  # the second time nothing is trained
        python_sweep(*raced, "sweep.race=true")
        said = " ".join(capsys.readouterr().out.split())
        best, dropped = read_trials(tmp_path / "study")
        assert (best.run.status.state, dropped.run.status.state) == ("finished", "interrupted")
        assert best.settings["optimizer.lr"] == 2e-3
        assert dropped.gain is None
        assert "stopped by sweep.race after epoch 1" in dropped.verdict
        assert dropped.verdict.endswith("points of gain behind optimizer.lr=0.002")
        assert "raced: 1 of 2 trials stopped, 4 of 6 epochs trained" in said
    python_sweep(*raced)
    python_sweep(*words, f"hydra.sweep.dir={tmp_path / 'plain'}")
    adapter = Path("adapter") / "pytorch_lora_weights.safetensors"
    pairs = zip(read_trials(tmp_path / "study"), read_trials(tmp_path / "plain"), strict=True)
    for resumed, straight in pairs:
        assert resumed.run.status.state == "finished"
        assert (resumed.run.path / adapter).read_bytes() == (straight.run.path / adapter).read_bytes()
    assert grid.studies


def test_the_history_of_a_damaged_checkpoint_is_empty(tmp_path: Path) -> None:
    assert race.history_of(RunDir(tmp_path)) == []
