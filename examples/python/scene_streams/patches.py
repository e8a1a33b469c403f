# SPDX-License-Identifier: Apache-2.0
"""Pictures as small square patches: codes of a k-means codebook, or latents of a linear map; both fitted in seconds."""

from __future__ import annotations

import torch
from torch import Tensor
from training_kit.codebook import fit_codebook, nearest_code

__all__ = ["PATCH", "PatchLatents", "PatchTokeniser"]

PATCH = 4
CHANNELS = 3 * PATCH * PATCH
MAX_PATCHES = 40_000
COLOUR_WEIGHT = 1.5  # the eye forgives a wrong texture sooner than a wrong hue


class PatchTokeniser:
    """Pictures <-> codes: the nearest of ``codebook [codes, 3 * PATCH * PATCH]`` for every patch, row by row."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook
        self._seen = as_seen(codebook)

    @staticmethod
    def fit(pictures: Tensor, codes: int, seed: int) -> PatchTokeniser:
        """Fit to ``pictures [count, 3, height, width]`` in 0 .. 1.

        Flat background would otherwise take most of the codebook; it is drawn flat because the last step counts it.
        """
        patches = to_patches(pictures).reshape(-1, CHANNELS).cpu()
        patches, frequencies = (patches * 255).round().unique(dim=0, return_counts=True)
        random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(patches), generator=random)
        order = order[frequencies[order].argsort(descending=True, stable=True)[:MAX_PATCHES]]
        centres = fit_codebook(as_seen(patches[order] / 255), frequencies[order], codes, random)
        return PatchTokeniser(as_drawn(centres).to(pictures.device))

    @property
    def codes(self) -> int:
        return len(self.codebook)

    def encode(self, pictures: Tensor) -> Tensor:
        """``[count, 3, height, width]`` -> int64 ``[count, patches]``."""
        patches = to_patches(pictures)
        return nearest_code(as_seen(patches.reshape(-1, CHANNELS)), self._seen).reshape(patches.shape[:2])

    def decode(self, codes: Tensor) -> Tensor:
        """int64 ``[count, patches]`` -> square pictures ``[count, 3, side, side]``."""
        return to_pictures(self.codebook[codes])


class PatchLatents:
    """Pictures <-> latents of zero mean and unit variance: the principal components of patches, row by row.

    Args:
        mean: ``[3 * PATCH * PATCH]``.
        basis: ``[latents, 3 * PATCH * PATCH]``, principal directions times the deviation along each.
    """

    def __init__(self, mean: Tensor, basis: Tensor) -> None:
        self.mean, self.basis = mean, basis
        self._analysis = (basis / basis.square().sum(1, keepdim=True)).T

    @staticmethod
    def fit(pictures: Tensor, latents: int) -> PatchLatents:
        """Fit to ``pictures [count, 3, height, width]`` in 0 .. 1."""
        if latents > CHANNELS:
            raise ValueError(f"latents must be at most {CHANNELS}, the values of a patch, got {latents}")
        patches = to_patches(pictures).reshape(-1, CHANNELS).cpu().double()
        mean = patches.mean(0)
        variances, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis = (directions * variances.clamp_min(1e-12).sqrt()).T.flip(0)[:latents]
        return PatchLatents(mean.float().to(pictures.device), basis.float().to(pictures.device))

    def encode(self, pictures: Tensor) -> Tensor:
        """``[count, 3, height, width]`` -> ``[count, patches, latents]``."""
        return (to_patches(pictures) - self.mean) @ self._analysis

    def decode(self, latents: Tensor) -> Tensor:
        """``[count, patches, latents]`` -> square pictures ``[count, 3, side, side]``."""
        return to_pictures(latents @ self.basis + self.mean)


def to_patches(pictures: Tensor) -> Tensor:
    """``[count, 3, height, width]`` -> ``[count, patches, 3 * PATCH * PATCH]``."""
    count, channels, height, width = pictures.shape
    cut = pictures.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * PATCH * PATCH)


def to_pictures(patches: Tensor) -> Tensor:
    """``[count, patches, 3 * PATCH * PATCH]`` -> square pictures ``[count, 3, side, side]``."""
    count, side = len(patches), round(patches.shape[1] ** 0.5)
    pixels = patches.reshape(count, side, side, 3, PATCH, PATCH)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, side * PATCH, side * PATCH)


def as_seen(patches: Tensor) -> Tensor:
    """Patches with their hues and their mean colours weighted up; linear, and :func:`as_drawn` undoes it."""
    colours = patches.unflatten(-1, (3, PATCH * PATCH))
    grey = colours.mean(-2, keepdim=True)
    seen = grey + COLOUR_WEIGHT * (colours - grey)
    return (seen + (COLOUR_WEIGHT - 1) * seen.mean(-1, keepdim=True)).flatten(-2)


def as_drawn(seen: Tensor) -> Tensor:
    colours = seen.unflatten(-1, (3, PATCH * PATCH))
    colours = colours - (1 - 1 / COLOUR_WEIGHT) * colours.mean(-1, keepdim=True)
    grey = colours.mean(-2, keepdim=True)
    return (grey + (colours - grey) / COLOUR_WEIGHT).flatten(-2)
