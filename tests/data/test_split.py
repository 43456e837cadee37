"""Copies across the split: the same as comparing all with all, in a fraction of the time."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ghibli.data.folder import CaptionedImage
from ghibli.data.split import split_apart, split_by_content
from ghibli.images import duplicates
from ghibli.images.duplicates import DUPLICATE, SIDE, near_duplicates


def thumbnails(count: int, seed: int) -> np.ndarray:
    """Unit vectors (count, SIDE * SIDE) of zero mean, smooth as photographs are, some flat."""
    generator = np.random.default_rng(seed)
    coarse = generator.standard_normal((count, 4, 4)).repeat(SIDE // 4, axis=1).repeat(SIDE // 4, axis=2)
    rows = (coarse + generator.standard_normal((count, SIDE, SIDE)) / 4).reshape(count, -1)
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows[generator.random(count) < 0.02] = 0
    return rows.astype(np.float32)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), noise=st.floats(0, 0.02), train=st.integers(1, 60), held=st.integers(1, 40)
)
def test_every_copy_is_found_as_by_comparing_all(seed: int, noise: float, train: int, held: int) -> None:
    """Copies with noise of every strength around the threshold."""
    generator = np.random.default_rng(seed)
    left, right = thumbnails(train, seed), thumbnails(held, seed + 1)
    for row in range(0, held, 2):
        copy = left[generator.integers(train)] + noise * generator.standard_normal(SIDE * SIDE)
        right[row] = copy / (np.linalg.norm(copy) or 1)
    everything = right @ left.T
    expected = [(int(row.argmax()), place) for place, row in enumerate(everything) if row.max() >= DUPLICATE]
    assert [(t, v) for t, v, _ in near_duplicates(left, right)] == expected


def test_flat_images_alone_have_no_copies() -> None:
    flat = np.zeros((3, SIDE * SIDE), dtype=np.float32)
    assert near_duplicates(flat, flat) == []


@pytest.fixture(scope="module")
def many() -> tuple[list[CaptionedImage], dict[Path, np.ndarray]]:
    rows = thumbnails(20_000, 3)
    hashes = [hashlib.sha256(str(place).encode()).hexdigest() for place in range(len(rows))]
    images = [CaptionedImage(Path(f"{place}.png"), "x", content) for place, content in enumerate(hashes)]
    return images, {image.path: row for image, row in zip(images, rows, strict=True)}


def test_one_copy_among_twenty_thousand(many: tuple[list[CaptionedImage], dict[Path, np.ndarray]]) -> None:
    images, found = many
    train, held_out = split_by_content(images, 0.1)
    held = next(image for image in held_out if found[image.path].any())
    twin = next(image for image in train if found[image.path].any())
    found = found | {held.path: found[twin.path]}
    start = time.process_time()
    split = split_apart(images, found, 0.1)
    assert time.process_time() - start < 5  # comparing sets per image took 75 s
    assert split.moved == {held: twin}
    in_training = {*train, held}
    assert split.train == [image for image in images if image in in_training]
    assert split.held_out == [image for image in held_out if image != held]


def looked_at_in_a_chain(monkeypatch: pytest.MonkeyPatch, count: int) -> int:
    """Return how many images were looked up or compared, where each held-out one is like the one before."""
    looked_at = 0

    class Counting(duplicates.KDTree):
        def query_ball_point(self, rows: np.ndarray, reach: float) -> np.ndarray:
            nonlocal looked_at
            near = super().query_ball_point(rows, reach)
            looked_at += len(rows) + sum(map(len, near))
            return near

    monkeypatch.setattr(duplicates, "KDTree", Counting)
    generator, rows = np.random.default_rng(0), [np.zeros(SIDE * SIDE)]
    while (
        len(rows) <= count
    ):  # 8 degrees on, in a direction of its own: like its neighbours, and like no other
        step = generator.standard_normal(SIDE * SIDE)
        step -= step.mean() + (step @ rows[-1]) * rows[-1]
        angle = np.radians(8) if len(rows) > 1 else np.pi / 2
        rows.append(np.cos(angle) * rows[-1] + np.sin(angle) * step / np.linalg.norm(step))
    hashes = [hashlib.sha256(str(place).encode()).hexdigest() for place in range(4 * count)]
    images = [CaptionedImage(Path(f"{place}.png"), "x", content) for place, content in enumerate(hashes)]
    train, held_out = split_by_content(images, 0.5)
    chained = [train[0], *held_out[: count - 1]]
    rest = thumbnails(4 * count, 7)
    found = {image.path: row for image, row in zip(images, rest, strict=True)}
    found |= {image.path: row.astype(np.float32) for image, row in zip(chained, rows[1:], strict=True)}
    assert len(split_apart(images, found, 0.5).moved) == count - 1
    return looked_at


def test_a_chain_of_copies_takes_time_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever chooses the images can make one; comparing all again in every round took its square: 16."""
    short, long = (looked_at_in_a_chain(monkeypatch, count) for count in (100, 400))
    assert long < 7 * short


def test_a_copy_of_a_copy_moves_too() -> None:
    """b is like a, which is trained on, and c like b alone: all three end in training."""
    rows = thumbnails(40, 5)
    rows = rows[rows.any(axis=1)]
    chain = rows[0] + np.linspace(0, 0.2, 3)[:, None] * rows[1]
    chain /= np.linalg.norm(chain, axis=1, keepdims=True)
    chain = chain[[0, 1, 2]]
    images = [
        CaptionedImage(Path(f"{place}.png"), "x", hashlib.sha256(str(place).encode()).hexdigest())
        for place in range(len(rows) - 2)
    ]
    train, held_out = split_by_content(images, 0.5)
    found = {image.path: row for image, row in zip(images, rows[2:], strict=False)}
    found |= {image.path: rows[-1 - place] for place, image in enumerate(images[-2:])}
    for image, row in zip((train[0], held_out[0], held_out[1]), chain, strict=True):
        found[image.path] = row.astype(np.float32)
    assert chain[0] @ chain[2] < DUPLICATE <= min(chain[0] @ chain[1], chain[1] @ chain[2])
    split = split_apart(images, found, 0.5)
    assert split.moved == {held_out[0]: train[0], held_out[1]: held_out[0]}
