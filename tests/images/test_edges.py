"""Canny's edges against OpenCV's."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from ghibli.images.edges import canny

RNG = np.random.default_rng(0)
BLOCKS = np.kron(RNG.integers(0, 256, (16, 20, 3)), np.ones((6, 6, 1), int))
NOISE = RNG.integers(0, 256, (97, 131, 3))
RAMP = np.add.outer(np.arange(64) * 3, np.arange(80) * 5)[:, :, None] * np.array([1, 2, 3]) % 256


@pytest.mark.parametrize(
    ("pixels", "count", "digest"),  # of cv2.Canny(pixels, 100, 200), opencv-python-headless 5.0.0
    [
        (BLOCKS, 3060, "16cfee812ff3538a6852fee1a76aa3f3694412f2c3d6286f9a392795c2a9f388"),
        (NOISE, 4570, "215443e8d0a1973e3a008b2f75daf71317cccd13384c710d467f1ec4d2653e21"),
        (RAMP, 477, "3c209bd0114f9a001f83c1fa8d74a86a3e825fa6eb10aa772ab834b86ae6c30a"),
    ],
    ids=["blocks", "noise", "ramp"],
)
def test_edges_are_opencvs(pixels: np.ndarray, count: int, digest: str) -> None:
    edges = canny(Image.fromarray(pixels.astype(np.uint8)))
    assert edges.mode == "RGB" and edges.size == (pixels.shape[1], pixels.shape[0])
    grey = np.array(edges)[:, :, 0]
    assert (grey > 0).sum() == count
    assert hashlib.sha256(grey.tobytes()).hexdigest() == digest


def test_an_even_image_has_none() -> None:
    assert not np.array(canny(Image.new("RGB", (16, 8), "red"))).any()
