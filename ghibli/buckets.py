"""Shapes of training pictures: one square, or a few of about its area, each batch of one shape."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

WIDEST = 2.0  # longer side / shorter side
Size = tuple[int, int]  # width, height in px


def sizes(resolution: int) -> list[Size]:
    """All shapes with at most the square's area: for each width the largest height, in steps of 1/8 side.

    At 512 px those are 384 x 640, 448 x 576, 512 x 512, 576 x 448 and 640 x 384.
    """
    step = max(8, resolution // 64 * 8)
    found = []
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) / min(width, height) <= WIDEST:
            found.append((width, height))
    return found


def size_for(picture: Size, resolution: int, resize: str) -> Size:
    """What a picture of this size is scaled and cut to; with `bucket` the shape nearest to its own."""
    if resize != "bucket":
        return resolution, resolution
    own = math.log(picture[0] / picture[1])
    return min(sizes(resolution), key=lambda size: (abs(math.log(size[0] / size[1]) - own), size))


def batches_in(shapes: Sequence[Size], together: int) -> int:
    """Full batches of one shape each in an epoch of these pictures."""
    return sum(count // together for count in Counter(shapes).values())


def left_out(shapes: Sequence[Size], together: int) -> int:
    """Pictures whose shape has too few of them for any batch."""
    return sum(count for count in Counter(shapes).values() if count < together)


def in_batches(order: np.ndarray, shapes: Sequence[Size], together: int) -> list[int]:
    """The same order, laid so that each `together` pictures in a row have one shape.

    Pictures are dealt to their shape in turn, and a batch follows as soon as it is full; what is left
    at the end is left out. With a single shape the order stays as it is.
    """
    waiting: dict[Size, list[int]] = {}
    laid: list[int] = []
    for picture in order:
        batch = waiting.setdefault(shapes[picture], [])
        batch.append(int(picture))
        if len(batch) == together:
            laid += batch
            batch.clear()
    return laid
