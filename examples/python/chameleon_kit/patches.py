# SPDX-License-Identifier: Apache-2.0
"""The image tokeniser: k-means of small square patches, fitted on the spot in seconds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PATCH", "PatchTokeniser"]

PATCH = 4
ITERATIONS = 15
MAX_PATCHES = 40_000
COLOUR_WEIGHT = 1.5  # the eye forgives a wrong texture sooner than a wrong hue


class PatchTokeniser:
    """Pictures <-> codes: the nearest of ``codebook [codes, 3 * PATCH * PATCH]`` for every patch, row by row."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook

    @staticmethod
    def fit(pictures: Tensor, codes: int, seed: int) -> PatchTokeniser:
        """Fit to ``pictures [count, 3, height, width]`` in 0 .. 1.

        Only distinct patches count: flat background would otherwise take most of the codebook. Where a code comes to
        lie among its patches is then decided by how frequent they are, so that flat background is drawn flat.
        """
        # Sums over clusters are float64 on the CPU, in one order: the same codebook every time.
        patches = _patches(pictures).reshape(-1, 3 * PATCH * PATCH).cpu()
        patches, frequencies = (patches * 255).round().unique(dim=0, return_counts=True)
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(patches), generator=random)
        order = order[frequencies[order].argsort(descending=True, stable=True)[:MAX_PATCHES]]
        patches, frequencies = patches[order] / 255, frequencies[order].double()
        if len(patches) < codes:
            raise ValueError(f"codes must be at most the number of distinct patches, {len(patches)}, got {codes}")
        centres = patches[torch.randperm(len(patches), generator=random)[:codes]]
        for iteration in range(ITERATIONS):
            weights = frequencies if iteration == ITERATIONS - 1 else torch.ones_like(frequencies)
            nearest = _nearest(patches, centres)
            sums = torch.zeros(codes, patches.shape[1], dtype=torch.float64)
            sums.index_add_(0, nearest, weights[:, None] * patches.double())
            counts = torch.bincount(nearest, weights, minlength=codes)
            used = counts > 0
            centres[used] = (sums[used] / counts[used, None]).float()
            spare = torch.randperm(len(patches), generator=random)[: int((~used).sum())]
            centres[~used] = patches[spare]
        return PatchTokeniser(centres.to(pictures.device))

    @property
    def codes(self) -> int:
        return len(self.codebook)

    def encode(self, pictures: Tensor) -> Tensor:
        """``[count, 3, height, width]`` -> int64 ``[count, patches]``."""
        patches = _patches(pictures)
        return _nearest(patches.reshape(-1, patches.shape[-1]), self.codebook).reshape(patches.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """int64 ``[count, patches]`` -> square pictures ``[count, 3, side, side]``."""
        count, patches = codes.shape
        side = round(patches**0.5)
        pixels = self.codebook[codes].reshape(count, side, side, 3, PATCH, PATCH)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, side * PATCH, side * PATCH)


def _patches(pictures: Tensor) -> Tensor:
    """``[count, 3, height, width]`` -> ``[count, patches, 3 * PATCH * PATCH]``."""
    count, channels, height, width = pictures.shape
    cut = pictures.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH * PATCH)


def _nearest(patches: Tensor, centres: Tensor) -> Tensor:
    patches, centres = _as_seen(patches), _as_seen(centres)
    distances = centres.square().sum(1) - 2 * patches @ centres.T
    return distances.argmin(1)


def _as_seen(patches: Tensor) -> Tensor:
    """Patches with their hues and their mean colours weighted up.

    The map is linear, so the mean of a cluster is its centre in these terms too, and the codebook can stay in RGB.
    """
    colours = patches.unflatten(-1, (3, PATCH * PATCH))
    grey = colours.mean(-2, keepdim=True)
    seen = grey + COLOUR_WEIGHT * (colours - grey)
    return (seen + (COLOUR_WEIGHT - 1) * seen.mean(-1, keepdim=True)).flatten(-2)
