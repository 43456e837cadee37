"""The size an image is trained at, and the image as a tensor of that size."""

import math

import numpy as np
import torch
from PIL import Image, ImageOps

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


def size_for(image: Size, resolution: int, resize: str) -> Size:
    """What an image of this size is scaled and cut to; with `bucket` the shape nearest to its own."""
    if resize != "bucket":
        return resolution, resolution
    own = math.log(image[0] / image[1])
    return min(sizes(resolution), key=lambda size: (abs(math.log(size[0] / size[1]) - own), size))


def preprocess(image: Image.Image, resolution: int, resize: str) -> torch.Tensor:
    """RGB image -> pixel_values (3, resolution, resolution), float32 in -1 .. 1.

    `squash` scales both sides to the square as the slides' Resize((512, 512)) does; `center_crop`
    covers the square and cuts the middle; `bucket` covers the shape of about the square's area that
    is nearest to the image's own, (3, height, width). Lanczos, antialiased.
    """
    size = size_for(image.size, resolution, resize)
    if resize == "squash":
        scaled = image.resize(size, Image.Resampling.LANCZOS)
    else:
        scaled = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    values = np.asarray(scaled, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
