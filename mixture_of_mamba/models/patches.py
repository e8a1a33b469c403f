# SPDX-License-Identifier: Apache-2.0
"""Latents into tokens and back: linear patches, and a U-Net whose middle is the decoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LinearPatches", "TimeEmbedding", "UNetPatches"]

Grid = tuple[int, ...]
FREQUENCIES = 128


def waves(positions: Tensor, channels: int, longest: float = 10_000.0) -> Tensor:
    """Cosines and sines of wavelengths from 2 pi to 2 pi ``longest``: ``[..]`` -> float32 ``[.., channels]``."""
    half = channels // 2
    steps = torch.arange(half, device=positions.device, dtype=torch.float32) / max(half, 1)
    angles = positions.float().unsqueeze(-1) * torch.exp(-math.log(longest) * steps)
    return F.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, channels - 2 * half))


class TimeEmbedding(nn.Sequential):
    """Diffusion times ``[n]`` in 0 .. 1 -> ``[n, d_model]``: waves of 1000 t, then an MLP (DiT, arXiv 2212.09748)."""

    def __init__(self, d_model: int, **place: Any) -> None:
        super().__init__(nn.Linear(2 * FREQUENCIES, d_model, **place), nn.SiLU(), nn.Linear(d_model, d_model, **place))

    def forward(self, times: Tensor) -> Tensor:
        return super().forward(waves(1000 * times, 2 * FREQUENCIES).to(next(self.parameters()).dtype))


def grid_waves(grid: Grid, d_model: int, device: torch.device) -> Tensor:
    """Where each token is: ``[tokens, d_model]``, an equal share of channels for each dimension of the grid."""
    share = d_model // len(grid)
    places = torch.meshgrid(*[torch.arange(size, device=device) for size in grid], indexing="ij")
    table = torch.cat([waves(place.flatten(), share) for place in places], -1)
    return F.pad(table, (0, d_model - table.shape[-1]))


class LinearPatches(nn.Module):
    """A patch of ``patch_size`` latents along every dimension of the grid is one token, by one linear map each way.

    Args:
        d_model: width of tokens.
        dim_latent: channels of a latent.
        patch_size: latents along each side of a patch; sides of a grid are multiples of it.
    """

    def __init__(self, d_model: int, dim_latent: int, patch_size: int, dimensions: int, **place: Any) -> None:
        super().__init__()
        self.dim_latent, self.patch_size = dim_latent, patch_size
        size = patch_size**dimensions * dim_latent
        self.encoder = nn.Linear(size, d_model, **place)
        self.decoder = nn.Linear(d_model, size, **place)

    def encode(self, latents: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[n, *grid, dim_latent]``, ``[n, d_model]`` -> tokens ``[n, tokens, d_model]``, and what decoding needs."""
        del time
        n, *grid, channels = latents.shape
        k = self.patch_size
        cut = latents.reshape(n, *[part for side in grid for part in (side // k, k)], channels)
        dims = len(grid)
        order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
        return self.encoder(cut.permute(order).flatten(1 + dims).flatten(1, dims)), []

    def decode(self, tokens: Tensor, skipped: list[Tensor], grid: Grid, time: Tensor) -> Tensor:
        """The inverse way: ``[n, tokens, d_model]`` -> ``[n, *grid, dim_latent]``."""
        del skipped, time
        k, dims = self.patch_size, len(grid)
        coarse = [side // k for side in grid]
        patches = self.decoder(tokens).reshape(len(tokens), *coarse, *[k] * dims, self.dim_latent)
        order = [0, *[part for i in range(dims) for part in (1 + i, 1 + dims + i)], 1 + 2 * dims]
        return patches.permute(order).reshape(len(tokens), *grid, self.dim_latent)


def _group_norm(channels: int, **place: Any) -> nn.GroupNorm:
    """As many as 32 groups, of four channels at least where there are four."""
    return nn.GroupNorm(math.gcd(max(channels // 4, 1), 32), channels, **place)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice; the time scales and shifts the second norm (arXiv 2105.05233)."""

    def __init__(self, inputs: int, outputs: int, d_model: int, **place: Any) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs, **place)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, **place)
        self.time = nn.Linear(d_model, 2 * outputs, **place)
        self.norm2 = _group_norm(outputs, **place)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, **place)
        self.skip = nn.Conv2d(inputs, outputs, 1, **place) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(time))[:, :, None, None].chunk(2, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(y))


class UNetPatches(nn.Module):
    """Down blocks before the decoder, up blocks after it, with skips around it (Transfusion, arXiv 2408.11039).

    A token is ``patch_size x patch_size`` latents, a power of two: one halving for each factor of two.

    Args:
        d_model, dim_latent, patch_size: as in :class:`LinearPatches`.
        channels: of the first level; each next one has twice as many.
    """

    def __init__(self, d_model: int, dim_latent: int, patch_size: int, channels: int, **place: Any) -> None:
        super().__init__()
        levels = patch_size.bit_length() - 1
        widths = [channels << level for level in range(levels + 1)]
        self.conv_in = nn.Conv2d(dim_latent, channels, 3, padding=1, **place)
        self.down_blocks = nn.ModuleList(ResidualBlock(width, width, d_model, **place) for width in widths)
        self.downs = nn.ModuleList(
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, **place) for width in widths[:-1]
        )
        self.encoder = nn.Linear(widths[-1], d_model, **place)
        self.decoder = nn.Linear(d_model, widths[-1], **place)
        self.up_blocks = nn.ModuleList(ResidualBlock(2 * width, width, d_model, **place) for width in widths)
        self.ups = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1, **place) for width in widths[:-1])
        self.norm_out = _group_norm(channels, **place)
        self.conv_out = nn.Conv2d(channels, dim_latent, 3, padding=1, **place)

    def encode(self, latents: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``[n, height, width, dim_latent]``, ``[n, d_model]`` -> tokens ``[n, tokens, d_model]``, skips."""
        x = self.conv_in(latents.permute(0, 3, 1, 2))
        skipped = []
        for level, block in enumerate(self.down_blocks):
            x = block(x, time)
            skipped.append(x)
            if level < len(self.downs):
                x = self.downs[level](x)
        return self.encoder(x.flatten(2).transpose(1, 2)), skipped

    def decode(self, tokens: Tensor, skipped: list[Tensor], grid: Grid, time: Tensor) -> Tensor:
        """The way back: ``[n, tokens, d_model]`` -> ``[n, height, width, dim_latent]``."""
        del grid
        x = self.decoder(tokens).transpose(1, 2).reshape(skipped[-1].shape)
        for level in reversed(range(len(self.up_blocks))):
            if level < len(self.ups):
                x = self.ups[level](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.up_blocks[level](torch.cat((x, skipped[level].to(x.dtype)), 1), time)
        return self.conv_out(F.silu(self.norm_out(x))).permute(0, 2, 3, 1)
