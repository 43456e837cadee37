"""Preferences from votes: against scipy's optimiser, and intervals that hold what they promise."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from ghibli.jury.preference import Preference, Votes, anytime_factor, design_of, fit, votes_needed
from ghibli.runtime.errors import UserError

STRENGTHS = np.array([0.6, 0.1, -0.7])
SIDE = 0.3


def cast(
    strengths: np.ndarray, voters: int, pairs: int, seed: int, side: float = 0.0, ties: float = 0.1
) -> Votes:
    """Let voters vote on pairs of images as the model says, each pair with its left image at random."""
    draws = np.random.default_rng(seed)
    count = voters * pairs
    one = draws.integers(len(strengths), size=pairs)
    other = (one + draws.integers(1, max(len(strengths), 2), size=pairs)) % len(strengths)
    item, voter = np.tile(np.arange(pairs), voters), np.repeat(np.arange(voters), pairs)
    flip = draws.random(count) < 0.5
    left, right = np.where(flip, one[item], other[item]), np.where(flip, other[item], one[item])
    chance = scipy.special.expit(strengths[left] - strengths[right] + side)
    outcome = (draws.random(count) < chance).astype(float)
    tied = draws.random(count) < ties
    outcome[tied] = 0.5
    return Votes(left, right, item, voter, outcome)


def fitted(votes: Votes, models: int = 3) -> Preference:
    return fit(votes, [f"run {k}" for k in range(models)])


def test_strengths_maximise_the_likelihood_with_jeffreys_prior() -> None:
    """Firth's correction is the posterior's maximum under that prior; scipy finds it without gradients."""
    votes = cast(STRENGTHS, 2, 30, seed=1, side=SIDE)
    design = design_of(votes, 3)

    def loss(x: np.ndarray) -> float:
        line = design @ x
        chance = scipy.special.expit(line)
        information = design.T @ ((chance * (1 - chance))[:, None] * design)
        likelihood = votes.outcome @ line - np.logaddexp(0, line).sum()
        return -likelihood - 0.5 * np.linalg.slogdet(information)[1]

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 5000}
    best = scipy.optimize.minimize(loss, np.zeros(3), method="Nelder-Mead", options=options).x
    found = fitted(votes)
    assert found.strengths - found.strengths[0] == pytest.approx([0, best[0], best[1]], abs=1e-6)
    assert found.side.value == pytest.approx(best[2], abs=1e-6)
    assert found.strengths.sum() == pytest.approx(0, abs=1e-12)


def test_errors_are_the_textbooks_where_every_vote_is_independent() -> None:
    """One vote a pair of images: near the inverse of Fisher's information, for many votes."""
    votes = cast(STRENGTHS, 1, 20_000, seed=2, ties=0)
    design = design_of(votes, 3)
    chance = scipy.special.expit(design @ np.array([-0.5, -1.3, 0.0]))
    wanted = np.linalg.inv(design.T @ ((chance * (1 - chance))[:, None] * design))
    assert fitted(votes).over(1, 0).standard_error == pytest.approx(math.sqrt(wanted[0, 0]), rel=0.02)
    assert fitted(votes).side.standard_error == pytest.approx(math.sqrt(wanted[2, 2]), rel=0.02)


@pytest.mark.parametrize(("voters", "pairs"), [(1, 60), (3, 40), (12, 40)])
def test_intervals_hold_the_truth_as_often_as_they_say(voters: int, pairs: int) -> None:
    """95 % intervals of a difference and of the side, 200 repeats; without ties, which shrink strengths."""
    hits = {"difference": 0, "side": 0}
    for seed in range(200):
        found = fitted(cast(STRENGTHS, voters, pairs, seed, SIDE, ties=0))
        difference = found.over(0, 2)
        hits["difference"] += difference.low <= STRENGTHS[0] - STRENGTHS[2] <= difference.high
        hits["side"] += found.side.low <= SIDE <= found.side.high
    assert all(180 <= hit <= 198 for hit in hits.values()), hits


def test_votes_that_depend_on_the_pair_of_images_do_not_shrink_the_error() -> None:
    """20 voters who all say the same of a pair are one vote: the error is that of the pairs."""
    one = cast(STRENGTHS, 1, 60, seed=3, ties=0)
    many = Votes(*(np.tile(part, 4) for part in (one.left, one.right, one.item)), np.repeat(range(4), 60),
                 np.tile(one.outcome, 4))  # fmt: skip
    single, repeated = (fitted(votes).over(0, 1).standard_error for votes in (one, many))
    assert repeated == pytest.approx(single, rel=0.1)


def test_one_model_twice_has_no_winner_and_a_side_is_found() -> None:
    """A/A: equals are told apart in 5 % of ballots at most by the bound that allows for repeated counting."""
    wrong, sided = 0, 0
    for seed in range(200):
        votes = cast(np.zeros(2), 3, 60, seed, side=0.8)
        found = fitted(votes, 2)
        difference = found.over(0, 1)
        wrong += abs(difference.value) > anytime_factor(len(votes)) * difference.standard_error
        sided += found.side.low > 0
    assert wrong <= 10 and sided >= 190


def test_a_side_does_not_look_like_a_preference() -> None:
    """A voter who always takes the left image prefers no model; who wins every vote has a finite strength."""
    votes = cast(np.zeros(2), 1, 80, seed=4)
    stubborn = Votes(votes.left, votes.right, votes.item, votes.voter, np.ones(80))
    found = fitted(stubborn, 2)
    assert abs(found.over(0, 1).value) < 0.2 and found.side.value > 3
    winner = Votes(votes.left, votes.right, votes.item, votes.voter, (votes.left == 0).astype(float))
    assert 3 < fitted(winner, 2).over(0, 1).value < 20


def test_few_votes_are_refused_in_one_line() -> None:
    votes = cast(np.zeros(2), 1, 10, seed=5)
    with pytest.raises(UserError, match="none compare run 2 with the others yet"):
        fitted(votes, 3)
    first = Votes(*(part[:1] for part in vars(votes).values()))
    with pytest.raises(UserError, match="more are needed to compare all models"):
        fitted(first, 2)
    left = np.array([0, 1])
    two = Votes(left, 1 - left, left, np.zeros(2, int), np.array([1.0, 0.0]))
    with pytest.raises(UserError, match="they are on 2 pairs, and at least 3 are needed"):
        fitted(two, 2)


def test_the_bound_for_repeated_counting_holds_at_every_count() -> None:
    """A mean of normal numbers leaves it at some count from 10 to 1000 in at most 5 % of 1000 walks."""
    draws = np.random.default_rng(0).standard_normal((1000, 1000)).cumsum(1)
    counts = np.arange(1, 1001)
    bounds = np.array([anytime_factor(int(n)) for n in counts]) * np.sqrt(counts)
    crossed = (np.abs(draws[:, 9:]) > bounds[9:]).any(1).mean()
    assert 0.005 < crossed <= 0.05
    assert anytime_factor(100) < 3.1


def test_the_votes_that_are_needed_grow_as_the_error_shrinks() -> None:
    found = fitted(cast(STRENGTHS, 1, 40, seed=6)).over(1, 2)
    ratio = anytime_factor(40) * found.standard_error / abs(found.value)
    assert votes_needed(found, 40) == math.ceil(40 * ratio**2)
