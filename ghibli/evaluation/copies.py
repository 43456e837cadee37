"""Whether samples are copies of training images: how many are nearer to one than unseen images ever are.

Images are compared as thumbnails, as they are and mirrored, with the training images and with parts of
them. A copy is near in one of these; the median over all samples would hide a fifth of them.
"""

from dataclasses import dataclass
from typing import Any

import scipy.stats
import torch
from torch.nn.functional import adaptive_avg_pool2d

THUMBNAIL = 16  # px
CROPS = (0.9, 0.8)  # sides of the parts of a training image, over its own: centre and four corners each
UNSEEN_BELOW = 0.01  # share of unseen real images that are nearer than the threshold
QUANTILES = (0.01, 0.05, 0.5)
CHUNK = 64  # samples compared at a time


def thumbnails_of(images: torch.Tensor) -> torch.Tensor:
    """Shrink images (N, 3, H, W) in 0 .. 1 to THUMBNAIL px and flatten them: (N, 768)."""
    return adaptive_avg_pool2d(images, THUMBNAIL).flatten(1)


def crops_of(image: torch.Tensor) -> torch.Tensor:
    """Return the thumbnails of an image's parts, (V, 768) of (3, H, W) in 0 .. 1."""
    height, width = image.shape[1:]
    found = []
    for side in CROPS:
        h, w = int(side * height), int(side * width)
        for top, left in ((0, 0), (0, 2), (2, 0), (2, 2), (1, 1)):  # halves of the space that is left
            y, x = top * (height - h) // 2, left * (width - w) // 2
            found.append(thumbnails_of(image[None, :, y : y + h, x : x + w]))
    return torch.cat(found)


@dataclass(frozen=True)
class TrainingThumbnails:
    """Thumbnails of all training images, to search for copies."""

    whole: torch.Tensor  # (N, 768)
    crops: torch.Tensor  # (N, V, 768)

    def nearest(self, thumbnails: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the training image that each thumbnail (M, 768), as it is or mirrored, comes nearest to.

        Returns:
            Its distance to that image or a part of it, (M,), and the image's row, (M,) int64.
        """
        views, parts = torch.cat([self.whole, self.crops.flatten(0, 1)]), self.crops.shape[1]
        mirrored = thumbnails.view(-1, 3, THUMBNAIL, THUMBNAIL).flip(-1).flatten(1)
        found = [
            torch.cdist(part, views).min(1) for both in (thumbnails, mirrored) for part in both.split(CHUNK)
        ]
        distances, at = (torch.cat(rows).view(2, -1) for rows in zip(*found, strict=True))
        distances, side = distances.min(0)
        view = at.gather(0, side[None])[0]
        return distances, torch.where(view < len(self.whole), view, (view - len(self.whole)) // parts)

    def distances(self, thumbnails: torch.Tensor) -> torch.Tensor:
        """Return the distance of each thumbnail (M, 768) to the nearest training image or part of one."""
        return self.nearest(thumbnails)[0]


def copies_among(samples: torch.Tensor, unseen: torch.Tensor) -> dict[str, Any]:
    """Count samples nearer to a training image than all but UNSEEN_BELOW of unseen real images, for JSON.

    Args:
        samples, unseen: (N,) and (M,) distances of drawn and of unseen real images.

    Returns:
        `below` of `samples`; `expected` if samples were like unseen images; `threshold`, a distance over the
        median of unseen images; `p`, the chance of so many more if they were (Fisher's exact test, one side);
        `quantiles` of the samples over those of unseen images, by share.
    """
    threshold = unseen.quantile(UNSEEN_BELOW)
    below, usual = int((samples < threshold).sum()), int((unseen < threshold).sum())
    table = [[below, len(samples) - below], [usual, len(unseen) - usual]]
    shares = torch.tensor(QUANTILES, dtype=samples.dtype)
    ratios = samples.quantile(shares) / unseen.quantile(shares)
    return {
        "below": below, "samples": len(samples), "expected": round(usual / len(unseen) * len(samples), 2),
        "threshold": (threshold / unseen.median()).item(),
        "p": float(scipy.stats.fisher_exact(table, alternative="greater").pvalue),
        "quantiles": {f"{share:g}": ratio for share, ratio in zip(QUANTILES, ratios.tolist(), strict=True)},
    }  # fmt: skip
