"""Which model do people prefer: the Bradley-Terry model with a side effect, from votes on pairs of images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.special

from ghibli.evaluation.statistics import Estimate
from ghibli.runtime.errors import UserError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

STEPS = 100  # of Newton's method, at most; ten usually do
LONGEST_STEP = 2.0  # in log-odds
FEWEST_VOTERS = 5  # from which on what voters differ in can be told from chance
PEEKING = 0.05  # chance of ever calling equal models different, however often the votes are counted
TUNED_TO = 100  # votes at which `anytime_factor` is smallest


@dataclass(frozen=True)
class Votes:
    """N votes: which of two images, by two models or by one, was preferred."""

    left: Integers  # (N,) number of the model whose image stood on the left
    right: Integers  # (N,)
    item: Integers  # (N,) number of the pair of images; its votes are not independent
    voter: Integers  # (N,)
    outcome: Floats  # (N,) 1 = left, 0 = right, 0.5 = no difference

    def __len__(self) -> int:
        return len(self.outcome)


@dataclass(frozen=True)
class Preference:
    """How strongly each of K models is preferred, in log-odds, and how far the left side is."""

    strengths: Floats  # (K,), their mean is 0
    side: Estimate  # log-odds of choosing the left one of two equals
    covariance: Floats  # (K, K) of the strengths
    freedom: int  # degrees of freedom of the errors

    def over(self, one: int, other: int) -> Estimate:
        """Return the log-odds that an image of one model is preferred to another's, with its error."""
        contrast = np.zeros(len(self.strengths))
        contrast[one], contrast[other] = 1, -1
        return self._estimate(contrast)

    def over_others(self, one: int) -> Estimate:
        """Return the log-odds of a model against the mean of the others, with its error."""
        count = len(self.strengths)
        contrast = np.full(count, -1 / (count - 1))
        contrast[one] = 1
        return self._estimate(contrast)

    def _estimate(self, contrast: Floats) -> Estimate:
        variance = contrast @ self.covariance @ contrast
        return Estimate(float(contrast @ self.strengths), math.sqrt(variance), freedom=self.freedom)


def fit(votes: Votes, names: Sequence[str]) -> Preference:
    """Fit log-odds(left) = strength(left) - strength(right) + side (Bradley and Terry 1952, equation 1).

    A vote for no difference is half a vote for each. Firth's penalty (1993, section 3.3) keeps strengths
    finite where a model won every vote. Errors are clustered by pair of images, and from FEWEST_VOTERS voters
    on by voter as well (Cameron, Gelbach and Miller 2011, equation 2.11), with Student's t.

    Args:
        names: of the models, for messages.

    Raises:
        UserError: too few votes, or none that compare some model with the others.
    """
    design = design_of(votes, len(names))
    lone = [name for k, name in enumerate(names) if not np.any((votes.left == k) ^ (votes.right == k))]
    if lone:
        raise UserError(f"too few votes: none compare {lone[0]} with the others yet")
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise UserError("too few votes: more are needed to compare all models and to see a favoured side")
    found = newton(design, votes.outcome)
    spread = clustered(design, votes, found)
    items = len(np.unique(votes.item))
    voters = len(np.unique(votes.voter))
    freedom = min(items, voters) - 1 if voters >= FEWEST_VOTERS else items - 1
    if freedom < 2:
        raise UserError(f"too few votes: they are on {items} pairs, and at least 3 are needed")
    centre = np.eye(len(names)) - 1 / len(names)
    embed = np.vstack([np.zeros(len(names) - 1), np.eye(len(names) - 1)])  # the first strength is 0
    covariance = centre @ embed @ spread[:-1, :-1] @ embed.T @ centre
    side = Estimate(float(found[-1]), math.sqrt(spread[-1, -1]), freedom=freedom)
    return Preference(centre @ embed @ found[:-1], side, covariance, freedom)


def design_of(votes: Votes, models: int) -> Floats:
    """Return the design matrix (N, K): left minus right for all models but the first, then a 1, the side."""
    rows = np.zeros((len(votes), models))
    every = np.arange(len(votes))
    np.add.at(rows, (every, votes.left), 1.0)
    np.add.at(rows, (every, votes.right), -1.0)
    return np.hstack([rows[:, 1:], np.ones((len(votes), 1))])


def newton(design: Floats, outcome: Floats) -> Floats:
    """Maximise the penalised likelihood of a logistic regression; return its coefficients."""
    found = np.zeros(design.shape[1])
    for _ in range(STEPS):
        chance = scipy.special.expit(design @ found)
        weight = chance * (1 - chance)
        inverse = np.linalg.inv(design.T @ (weight[:, None] * design))
        leverage = weight * np.einsum("ni,ij,nj->n", design, inverse, design)
        step = inverse @ design.T @ (outcome - chance + leverage * (0.5 - chance))
        found = found + step * min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-9:
            break
    return found


def clustered(design: Floats, votes: Votes, found: Floats) -> Floats:
    """Return the covariance of the coefficients, clustered by item and, with enough voters, by voter."""
    chance = scipy.special.expit(design @ found)
    bread = np.linalg.inv(design.T @ ((chance * (1 - chance))[:, None] * design))
    scores = design * (votes.outcome - chance)[:, None]

    def sandwich(cluster: Integers) -> Floats:
        labels = np.unique(cluster, return_inverse=True)[1]
        sums = np.zeros((labels.max() + 1, scores.shape[1]))
        np.add.at(sums, labels, scores)
        count = len(sums)
        return bread @ (sums.T @ sums) @ bread * count / max(count - 1, 1)

    by_item = sandwich(votes.item)
    if len(np.unique(votes.voter)) < FEWEST_VOTERS:
        return by_item
    by_voter = sandwich(votes.voter)
    both = by_item + by_voter - sandwich(np.arange(len(votes)))
    larger = by_item if np.trace(by_item) > np.trace(by_voter) else by_voter
    return both if np.linalg.eigvalsh(both).min() > 0 else larger


def anytime_factor(count: int) -> float:
    """Return how many standard errors tell two models apart, however often the votes are counted.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (2024, theorem 2.2),
    which holds at all times at once but with a chance of PEEKING.

    Args:
        count: votes so far.
    """
    tightest = -2 * math.log(PEEKING) + math.log(1 - 2 * math.log(PEEKING))
    scale = count * tightest / TUNED_TO
    return math.sqrt((1 + 1 / scale) * math.log((1 + scale) / PEEKING**2))


def votes_needed(difference: Estimate, count: int) -> int:
    """Return how many votes in all would tell two models apart if their difference is as it seems now."""
    ratio = anytime_factor(count) * difference.standard_error / max(abs(difference.value), 1e-12)
    return math.ceil(count * min(ratio**2, 1e6))
