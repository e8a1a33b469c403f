# SPDX-License-Identifier: Apache-2.0
"""k-means, fitted on the spot in seconds: the codebooks of the tokenisers."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fit_codebook", "nearest_code"]

ITERATIONS = 15


def fit_codebook(points: Tensor, weights: Tensor, codes: int, random: torch.Generator, rows: int = 8192) -> Tensor:
    """Centres of distinct ``points [count, size]`` in the metric of their space.

    Points count alike, however frequent they are, so that what is most common does not take most of the codebook.
    Where a code comes to lie among its points is decided at the end by their ``weights [count]``. Sums over clusters
    are float64 on the CPU, in one order: the same codebook every time.
    """
    if len(points) < codes:
        raise ValueError(f"codes must be at most the number of distinct pieces, {len(points)}, got {codes}")
    centres = points[torch.randperm(len(points), generator=random)[:codes]].clone()
    exact = points.double()
    for iteration in range(ITERATIONS):
        importance = weights.double() if iteration == ITERATIONS - 1 else torch.ones_like(weights, dtype=torch.float64)
        nearest = torch.cat([nearest_code(part, centres) for part in points.split(rows)])
        sums = torch.zeros(codes, points.shape[1], dtype=torch.float64)
        sums.index_add_(0, nearest, importance[:, None] * exact)
        counts = torch.bincount(nearest, importance, minlength=codes)
        used = counts > 0
        centres[used] = (sums[used] / counts[used, None]).float()
        centres[~used] = points[torch.randperm(len(points), generator=random)[: int((~used).sum())]]
    return centres


def nearest_code(points: Tensor, centres: Tensor) -> Tensor:
    """``[count, size]``, ``[codes, size]`` -> int64 ``[count]``."""
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)
