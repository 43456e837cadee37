"""Distances between two sets of images, computed from their features, with standard errors where possible.

The Frechet distance is what the literature reports, but it has no interval, and with few images it is
mostly bias; so it is always shown beside the distance between two real sets of the same size. The kernel
distance is unbiased at every size and has a standard error, so models are ordered by it.
"""

import torch

from ghibli.evaluation.statistics import Estimate, jackknife


def frechet_distance(features: torch.Tensor, others: torch.Tensor) -> float:
    """Compute |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 (Heusel et al. 2017, equation 6).

    Args:
        features, others: (N, D) and (M, D), at least two rows each. With fewer than D + 1 rows a
            covariance is singular; the distance is still defined, but biased upwards.
    """
    means, covariances, roots = [], [], []
    for rows in (features.double(), others.double()):
        covariance = torch.cov(rows.T).reshape(rows.shape[1], rows.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        means.append(rows.mean(0))
        covariances.append(covariance)
        roots.append(vectors * values.clamp(min=0).sqrt() @ vectors.T)
    # the trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2)
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * cross
    return max(distance.item(), 0.0)


def kernel_distance(
    features: torch.Tensor, reference: torch.Tensor, groups: torch.Tensor | None = None
) -> Estimate:
    """Estimate the squared maximum mean discrepancy, unbiased and with its standard error.

    The kernel is k(x, y) = (x . y / D + 1)^3 (Binkowski et al. 2018, equation 4 and section 4); called KID
    if the features are Inception's. Two sets from one distribution have a distance around 0, by chance
    also below.

    Args:
        features, reference: (N, D) and (M, D), at least three rows each.
        groups: (N,) int64, the row of the reference whose caption each row of features was drawn from. These
            are not independent: images are then compared with those of other captions only, and the
            standard error leaves out a caption at a time, with all its images. None = all rows are.
    """
    return jackknife(*leave_out(features, reference, groups))


def kernel_difference(
    features: torch.Tensor, others: torch.Tensor, reference: torch.Tensor, groups: torch.Tensor | None = None
) -> Estimate:
    """Estimate kernel_distance(features) - kernel_distance(others), paired.

    Args:
        features, others: (N, D) of two models' images from the same N prompts and start noises.
        reference: (M, D) of real images.
        groups: as for kernel_distance.
    """
    ours, ours_without = leave_out(features, reference, groups)
    theirs, theirs_without = leave_out(others, reference, groups)
    without = [a - b for a, b in zip(ours_without, theirs_without, strict=True)]
    return jackknife(ours - theirs, without)


def leave_out(
    x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor | None
) -> tuple[float, list[torch.Tensor]]:
    """Compute the kernel distance and its jackknife values, over rows or over groups of them."""
    return leave_one_out(x, y) if groups is None else leave_group_out(x, y, groups)


def leave_group_out(
    x: torch.Tensor, y: torch.Tensor, groups: torch.Tensor
) -> tuple[float, list[torch.Tensor]]:
    """Compute the kernel distance of x (N, D) and y (M, D) by groups, and the values without each group.

    Group g is row g of y and the rows of x that `groups` (N,) gives to it. Only pairs of different groups
    are averaged: rows of one group are alike, so their pairs would bias the distance, downwards between x
    and y. Groups that have rows of x and groups that have none are two samples.
    """
    n, m = len(x), len(y)
    xx, yy, xy = off_diagonal(kernel(x, x)), off_diagonal(kernel(y, y)), kernel(x, y)
    member = torch.nn.functional.one_hot(groups, m).double()  # (N, M)
    size = member.sum(0)
    same_xx, same_xy = (member * (xx @ member)).sum(0), (member * xy).sum(0)  # sums of pairs within a group
    total_xx, pairs_xx = xx.sum() - same_xx.sum(), n * n - size.square().sum()
    total_xy, pairs_xy = xy.sum() - same_xy.sum(), n * (m - 1)
    value = total_xx / pairs_xx + yy.sum() / (m * (m - 1)) - 2 * total_xy / pairs_xy
    left_xx = total_xx - 2 * (member.T @ xx.sum(1) - same_xx)
    left_xy = total_xy - (member.T @ xy.sum(1) - same_xy) - (xy.sum(0) - same_xy)
    without = left_xx / (pairs_xx - 2 * size * (n - size))
    without = without + (yy.sum() - 2 * yy.sum(1)) / ((m - 1) * (m - 2))
    without = without - 2 * left_xy / ((n - size) * (m - 2))
    parts = without[size > 0], without[size == 0]
    return value.item(), [part for part in parts if len(part) > 0]


def leave_one_out(x: torch.Tensor, y: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
    """Compute the kernel distance of x (N, D) and y (M, D), and its jackknife values.

    These are the distances without each row of x (N,) and without each row of y (M,).
    """
    n, m = len(x), len(y)
    xx, yy, xy = off_diagonal(kernel(x, x)), off_diagonal(kernel(y, y)), kernel(x, y)
    within_x, within_y, between = xx.sum() / (n * (n - 1)), yy.sum() / (m * (m - 1)), xy.mean()
    value = within_x + within_y - 2 * between
    no_x = (xx.sum() - 2 * xx.sum(1)) / ((n - 1) * (n - 2)) + within_y
    no_x = no_x - 2 * (xy.sum() - xy.sum(1)) / ((n - 1) * m)
    no_y = within_x + (yy.sum() - 2 * yy.sum(1)) / ((m - 1) * (m - 2))
    no_y = no_y - 2 * (xy.sum() - xy.sum(0)) / (n * (m - 1))
    return value.item(), [no_x, no_y]


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Compute (x . y / D + 1)^3 for all pairs of rows of x (N, D) and y (M, D): (N, M) float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return a copy of a square matrix with zeros on its diagonal."""
    return matrix - torch.diag(matrix.diagonal())


def precision_recall(features: torch.Tensor, reference: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Compute the share of images that look like the reference, and of the reference that they cover.

    Kynkaanniemi et al. 2019, equations 1 and 2: a row is covered if it is nearer to some row of the other
    set than that row is to its own k-th nearest neighbour, or to its farthest in a set of fewer than k + 1.

    Args:
        features, reference: (N, D) and (M, D).
    """
    features, reference = features.double(), reference.double()
    between = torch.cdist(features, reference)
    radius, reference_radius = (
        torch.cdist(rows, rows).kthvalue(min(k + 1, len(rows)), dim=1).values
        for rows in (features, reference)
    )
    precision = (between <= reference_radius).any(1).double().mean()
    recall = (between <= radius[:, None]).any(0).double().mean()
    return precision.item(), recall.item()
