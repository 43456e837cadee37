"""The size at which an image is trained, and the image as a tensor of that size."""

import math

import numpy as np
import torch
from PIL import Image, ImageOps

from ghibli.images.read import Size

WIDEST = 2.0  # longer side / shorter side, at most


def bucket_sizes(resolution: int) -> list[Size]:
    """List the bucket sizes: per width the largest height within the square's area, in steps of side / 8.

    At 512 px: 384 x 640, 448 x 576, 512 x 512, 576 x 448 and 640 x 384.
    """
    step = max(8, resolution // 64 * 8)
    found = []
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width, height) / min(width, height) <= WIDEST:
            found.append((width, height))
    return found


def size_for(image: Size, resolution: int, resize: str) -> Size:
    """Choose the size to which an image is scaled and cropped; with `bucket` the nearest aspect ratio.

    Args:
        image: size of the whole image, upright, as `read.decode` returns it; not of a reduced copy, whose
            aspect ratio is rounded.
    """
    if resize != "bucket":
        return resolution, resolution
    own = math.log(image[0] / image[1])
    return min(bucket_sizes(resolution), key=lambda size: (abs(math.log(size[0] / size[1]) - own), size))


def preprocess(image: Image.Image, resolution: int, resize: str) -> torch.Tensor:
    """Convert an RGB image to pixel_values (3, height, width), float32 in -1 .. 1.

    `squash` scales both sides to the square, ignoring the aspect ratio, as the reference study does
    (Resize((512, 512))); `center_crop` scales to cover the square and crops the middle; `bucket` does the
    same with the size from bucket_sizes that is nearest in aspect ratio. Lanczos, antialiased.
    """
    size = size_for(image.size, resolution, resize)
    if resize == "squash":
        scaled = image.resize(size, Image.Resampling.LANCZOS)
    else:
        scaled = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    values = np.asarray(scaled, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()
