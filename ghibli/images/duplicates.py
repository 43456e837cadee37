"""Near-duplicates across the split: the gain on a held-out copy of a training image is memorisation."""

from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.spatial import KDTree

SIDE = 16  # px of a thumbnail
DUPLICATE = 0.985  # correlation of two thumbnails from which on they count as the same image
ROWS = 256  # images looked up at once
FREQUENCIES = 4  # per axis, in which images are looked up before they are compared
REACH = (2 - 2 * DUPLICATE) ** 0.5 + 1e-4  # distance of two unit vectors that correlate so; for rounding


def thumbnail(image: Image.Image) -> np.ndarray:
    """Reduce an image to a grey thumbnail: (SIDE * SIDE,) float32, zero mean, unit norm; zeros if flat."""
    small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3)  # faster for large images
    grey = np.asarray(small.convert("L"), dtype=np.float32).ravel()
    grey -= grey.mean()
    norm = np.linalg.norm(grey)
    return grey / norm if norm > SIDE else np.zeros_like(grey)  # SIDE: a contrast of about one grey level


def near_duplicates(train: np.ndarray, held_out: np.ndarray) -> list[tuple[int, int, float]]:
    """Find the held-out images that have a near-duplicate: (training row, held-out row, correlation).

    How the threshold was chosen: among 200 stills of many films, inspected by eye, no two are the same;
    the highest correlation is 0.855 (two heads before a dark background), and a 64-bit difference hash
    ranks other, equally unlike pairs first. Among 1000 drawn scenes, which share their layouts, the highest
    is 0.978 (two trains of one colour in one place, under different clouds), while that hash calls a girl in
    pink and another in yellow equal. The same stills saved again as a poor JPEG (quality 30) give at least
    0.994, at half the size 0.998, a fifth brighter 0.980. So this finds an image saved twice, but not a
    cropped (2 % off each side: 0.89 to 0.99) or a mirrored one.

    Args:
        train, held_out: (N, SIDE * SIDE) and (M, SIDE * SIDE), rows of `thumbnail`.
    """
    found = []
    for row, (places, similarity) in enumerate(Copies(train).of(held_out)):
        best = similarity.argmax() if len(places) else 0
        if len(places) and similarity[best] >= DUPLICATE:
            found.append((int(places[best]), row, float(similarity[best])))
    return found


class Copies:
    """Thumbnails to look up others in.

    Only images that are near each other in their coarsest patterns are compared, which misses none: unit
    vectors of correlation DUPLICATE are sqrt(2 - 2 * DUPLICATE) apart, and their projections at most that.
    """

    def __init__(self, thumbnails: np.ndarray):
        """Index rows of `thumbnail`: (N, SIDE * SIDE)."""
        self.thumbnails = thumbnails
        self.known = np.flatnonzero(thumbnails.any(axis=1))  # flat images have no copies
        self.tree = KDTree(lowest_frequencies(thumbnails)[self.known])

    def of(self, thumbnails: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterate over (rows that may be copies, their correlations) of each of (M, SIDE * SIDE) others."""
        for start in range(0, len(thumbnails), ROWS):
            rows = thumbnails[start : start + ROWS]
            near = self.tree.query_ball_point(lowest_frequencies(rows), REACH)
            for row, places in zip(rows, near, strict=True):
                columns = self.known[np.sort(places)] if places and row.any() else self.known[:0]
                yield columns, self.thumbnails[columns] @ row


def lowest_frequencies(thumbnails: np.ndarray) -> np.ndarray:
    """Project thumbnails (N, SIDE * SIDE) onto their coarsest patterns: (N, FREQUENCIES ** 2 - 1).

    The patterns are orthonormal, so no two projections are farther apart than the thumbnails are.
    """
    squares = thumbnails.reshape(-1, SIDE, SIDE)
    waves = dctn(squares, axes=(1, 2), norm="ortho")[:, :FREQUENCIES, :FREQUENCIES]
    return waves.reshape(len(thumbnails), -1)[:, 1:]  # the mean is zero
