"""Count the votes on a ballot: read the files that voters sent back, and say in words what they decided."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from ghibli.evaluation.statistics import Estimate
from ghibli.jury.preference import Preference, Votes, anytime_factor, fit, votes_needed
from ghibli.runs.folder import RunDir
from ghibli.runtime.errors import UserError
from ghibli.runtime.files import read_plain
from ghibli.runtime.wording import number_of

LARGEST = 2**22  # bytes of a file of votes, or of a key
OUTCOMES = {"left": 1.0, "right": 0.0, "same": 0.5}
FAR = 10  # times as many votes as there are, from which on two models are called alike


@dataclass(frozen=True)
class Key:
    """What a ballot's page does not say: which models drew the images of each pair."""

    ballot: str
    models: list[str]
    pairs: list[tuple[tuple[int, int], tuple[int, int]]]  # (models, items), each of image a and image b


@dataclass(frozen=True)
class Ballots:
    """All votes on one ballot."""

    votes: Votes
    voters: int
    notes: list[str]  # on files that were not counted


def read_object(file: Path, what: str) -> dict[str, Any]:
    """Read a JSON object from a file of somebody else's.

    Raises:
        UserError: there is no such file, or it is no object.
    """
    try:
        content = json.loads(read_plain(file, LARGEST))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not {what}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not {what}")
    return content


def read_key(file: Path) -> Key:
    """Read the key that `ghibli jury` wrote beside a ballot.

    Raises:
        UserError: it is missing or damaged.
    """
    content = read_object(file, "the key of a ballot")
    try:
        pairs = [
            (tuple(map(int, pair["models"])), tuple(map(int, pair["items"]))) for pair in content["pairs"]
        ]
        key = Key(str(content["ballot"]), [str(name) for name in content["models"]], pairs)  # type: ignore[arg-type]
        known = range(len(key.models))
        whole = all(len(m) == len(i) == 2 and set(m) <= set(known) for m, i in key.pairs)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not the key of a ballot") from error
    if not whole or not pairs or len(key.models) < 2:
        raise UserError(f"{file} is not the key of a ballot")
    return key


def ballot_of(file: Path) -> str:
    """Return which ballot a file of votes belongs to.

    Raises:
        UserError: it is no file of votes.
    """
    return str(read_object(file, "a file of votes").get("ballot"))


def read_votes(files: Sequence[Path], key: Key) -> Ballots:
    """Read files of votes; of several by one voter, the one with most votes counts, of equals the newest.

    Raises:
        UserError: a file of another ballot, a damaged one, or no vote at all.
    """
    by_voter: dict[str, tuple[Path, list[tuple[int, str, str]]]] = {}
    notes = []
    for file in files:
        voter, cast = votes_in(file, key)
        sent = [*([by_voter[voter]] if voter in by_voter else []), (file, cast)]
        *others, by_voter[voter] = sorted(sent, key=lambda one: (len(one[1]), one[0].stat().st_mtime_ns))
        notes += [f"{one.name} is not counted: the same voter sent another file" for one, _ in others]
    rows = [
        (*placed(key, pair, left), number, OUTCOMES[choice])
        for number, (_, cast) in enumerate(by_voter.values())
        for pair, left, choice in cast
    ]
    if not rows:
        raise UserError("there is no vote in these files yet")
    left, right, item, voters, outcome = (np.array(column) for column in zip(*rows, strict=True))
    return Ballots(Votes(left, right, item, voters, outcome.astype(float)), len(by_voter), notes)


def votes_in(file: Path, key: Key) -> tuple[str, list[tuple[int, str, str]]]:
    """Read one file: its voter, and (pair, image on the left, choice) of each vote.

    Raises:
        UserError: it is of another ballot, or damaged.
    """
    content = read_object(file, "a file of votes")
    if str(content.get("ballot")) != key.ballot:
        raise UserError(f"{file} holds votes on ballot {content.get('ballot')}, not on {key.ballot}")
    cast: dict[int, tuple[int, str, str]] = {}
    try:
        for vote in content["votes"]:
            pair, left, choice = vote["pair"], vote["left"], vote["choice"]
            known = type(pair) is int and 0 <= pair < len(key.pairs) and left in ("a", "b")
            if not known or choice not in OUTCOMES:
                raise ValueError(vote)
            cast[pair] = (pair, left, choice)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged: a vote in it cannot be read ({str(error)[:60]})") from error
    return str(content.get("voter")), list(cast.values())


def placed(key: Key, pair: int, left: str) -> tuple[int, int, int]:
    """Return the models on the left and on the right of a vote, and the number of its pair of images."""
    models = key.pairs[pair][0]
    return (*(models if left == "a" else models[::-1]), pair)


def count(files: Sequence[Path], key: Key) -> list[str]:
    """Return what the votes say, line by line.

    Raises:
        UserError: as read_votes, or too few votes.
    """
    ballots = read_votes(files, key)
    votes, found = ballots.votes, fit(ballots.votes, key.models)
    pairs = len(np.unique(votes.item))
    lines = [
        *ballots.notes,
        f"{number_of(len(votes), 'vote')} of {number_of(ballots.voters, 'voter')} on "
        f"{number_of(pairs, 'pair')}",
        "",
    ]
    order = np.argsort(-found.strengths)
    lines += [f"{share_text(found.over_others(k))}  {key.models[k]}" for k in order]
    lines += ["", *comparisons(found, key.models, order, len(votes)), side_line(found.side)]
    return lines + agreement(found, key.models, order, len(votes))


def share_text(log_odds: Estimate) -> str:
    """Format log-odds as the share of pairs in which a model is preferred, with its 95 % interval."""
    value, low, high = (100 * scipy.special.expit(x) for x in (log_odds.value, log_odds.low, log_odds.high))
    return f"preferred in {value:3.0f} % ({low:.0f} to {high:.0f} %)"


def decided(difference: Estimate, votes: int) -> bool:
    """Return whether two models can be told apart, however often the votes were counted before."""
    return abs(difference.value) > anytime_factor(votes) * difference.standard_error


def comparisons(found: Preference, names: Sequence[str], order: np.ndarray, votes: int) -> list[str]:
    """Say of each two neighbours in the ranking whether the votes tell them apart, or how many more would."""
    lines = []
    for better, worse in zip(order, order[1:], strict=False):
        difference = found.over(better, worse)
        pair = f"{names[better]} over {names[worse]}: {share_text(difference)}"
        needed = votes_needed(difference, votes)
        if decided(difference, votes):
            lines.append(f"{pair}: enough votes, it is preferred")
        elif needed > FAR * votes:
            lines.append(f"{pair}: no difference is seen, and {FAR} times as many votes may show none")
        else:
            lines.append(f"{pair}: not enough votes yet, about {needed} in all if this share holds")
    return lines


def side_line(side: Estimate) -> str:
    """Say whether the voters choose a side; the comparison of models has it taken out."""
    text = share_text(side).removeprefix("preferred in").strip()
    if side.low <= 0 <= side.high:
        return f"no side is favoured: of equal images the left one is chosen in {text}"
    return f"the {'left' if side.value > 0 else 'right'} side is favoured: the left one of equals in {text}"


def agreement(found: Preference, names: Sequence[str], order: np.ndarray, votes: int) -> list[str]:
    """Say whether the measured distance orders the models as the eye does, where both tell them apart."""
    distances = {k: distance for k in order if (distance := measured_distance(Path(names[k]))) is not None}
    told = [
        (one, other) for one, other in combinations(distances, 2) if decided(found.over(one, other), votes)
    ]
    if not told:
        return []
    same = sum(distances[one] < distances[other] for one, other in told)  # in the order of preference
    return [
        f"the distance of `ghibli evaluate` and the eye agree on {same} of {len(told)} pairs of models that "
        "the votes tell apart: " + ", ".join(f"{names[k]} {distances[k]:.2f}" for k in distances)
    ]


def measured_distance(folder: Path) -> float | None:
    """Return the smallest kernel distance of a run's evaluation, if there is one of its present weights."""
    run = RunDir(folder)
    try:
        found = run.load_evaluation()
        if found["weights"] != run.weights:
            return None
        return float(min(row["kernel"][0] for row in found["models"]["run"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
