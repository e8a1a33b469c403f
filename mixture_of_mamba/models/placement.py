# SPDX-License-Identifier: Apache-2.0
"""Pictures of a batch beside its tokens: which tokens belong to which latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.models.checks import first_outside
from mixture_of_mamba.routing_forms import kind_of

__all__ = ["Group", "Latents", "Placement", "Positions", "sequence_of_tokens"]

Latents = Tensor | Sequence[Tensor]
Positions = Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Group:
    """Pictures of one size.

    Attributes:
        pictures: int64 ``[n]``, their numbers in the batch.
        latents: ``[n, *grid, dim_latent]``.
        tokens_grid: tokens along each dimension of the grid.
        places: int64 ``[n, tokens]``, flat time of their tokens.
    """

    pictures: Tensor
    latents: Tensor
    tokens_grid: tuple[int, ...]
    places: Tensor

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.latents.shape[1:-1])


@dataclass(frozen=True)
class Placement:
    """All pictures of a batch.

    Attributes:
        groups: by size. A batch without pictures has one group of none, so that all parameters take part.
        begin, lengths: int64 ``[pictures]``, flat time of the first token of each, and how many tokens it has.
    """

    groups: list[Group]
    begin: Tensor
    lengths: Tensor

    @property
    def count(self) -> int:
        return self.begin.shape[0]

    @staticmethod
    def of(
        shape: torch.Size,
        device: torch.device,
        latents: Latents,
        positions: Positions,
        dim_latent: int,
        patch_size: int,
        dimensions: int,
        name: str = "latents",
    ) -> Placement:
        """From what a model's call is given; ``shape`` and ``device`` are the tokens', ``name`` is the latents'."""
        _require_floating(latents, name)
        where = torch.as_tensor(positions)
        if where.numel() and where.is_floating_point():
            raise ValueError(f"positions must be integers (row, offset), got {where.dtype}")
        where = where.to(torch.int64).reshape(-1, 2)
        count = len(latents)
        if where.shape[0] != count:
            raise ValueError(f"positions must have one (row, offset) for each of {count} {name}, got {where.shape[0]}")
        if isinstance(latents, Tensor):
            members = {tuple(latents.shape[1:]): list(range(count))}
        else:
            members = {}
            for i, one in enumerate(latents):
                members.setdefault(tuple(one.shape), []).append(i)
        if not members:
            members = {(*[patch_size] * dimensions, dim_latent): []}
        sizes = [0] * count
        for size, numbers in members.items():
            tokens = math.prod(_tokens_grid(size, dim_latent, patch_size, dimensions, name))
            for i in numbers:
                sizes[i] = tokens
        _require_room(where, sizes, shape)
        where = where.to(device, non_blocking=True)
        begin = where[:, 0] * shape[1] + where[:, 1]
        groups = []
        for size, numbers in members.items():
            pictures = torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
            if isinstance(latents, Tensor):
                values = latents
            else:
                values = torch.stack([latents[i] for i in numbers]) if numbers else torch.empty(0, *size, device=device)
            tokens_grid = _tokens_grid(size, dim_latent, patch_size, dimensions, name)
            places = begin[pictures][:, None] + torch.arange(math.prod(tokens_grid), device=device)
            groups.append(Group(pictures, values, tokens_grid, places))
        lengths = torch.tensor(sizes, dtype=torch.int64).to(device, non_blocking=True)
        return Placement(groups, begin, lengths)

    def modality(self, tokens: Tensor) -> Tensor:
        """Ids of tokens ``[batch, length]``: 1 in pictures, else -1 where the token is negative, 0 otherwise."""
        return self.filled(torch.where(tokens < 0, -1, 0), 1)

    def require_in_documents(self, cu_seqlens: Tensor | None) -> None:
        """Raise ValueError for a picture that goes from one packed document into the next."""
        if cu_seqlens is None:
            return
        first, last = (interval_of(at, cu_seqlens) for at in (self.begin, self.begin + self.lengths - 1))
        i = first_outside(last - first, 0, 0)
        if i is not None:
            begin = int(self.begin[i])
            raise ValueError(
                f"positions[{i}] must lie in one document of cu_seqlens, got tokens {begin} .. "
                f"{begin + int(self.lengths[i]) - 1} of batch * length"
            )

    def filled(self, tokens: Tensor, value: int) -> Tensor:
        """``tokens``, but ``value`` in pictures."""
        flat = tokens.flatten()
        for group in self.groups:
            flat = flat.index_fill(0, group.places.flatten(), value)
        return flat.view(tokens.shape)


def sequence_of_tokens(shape: torch.Size, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, int]:
    """Which sequence each token is in, int64 ``[batch * length]``, and how many there are."""
    time = torch.arange(shape.numel(), device=device)
    if cu_seqlens is None:
        return time // max(shape[1], 1), shape[0]
    return interval_of(time, cu_seqlens), cu_seqlens.shape[0] - 1


def _require_floating(latents: Latents, name: str) -> None:
    named = {name: latents} if isinstance(latents, Tensor) else {f"{name}[{i}]": one for i, one in enumerate(latents)}
    for here, one in named.items():
        if not isinstance(one, Tensor) or not one.is_floating_point():
            raise ValueError(f"{here} must be a tensor of a floating type, got {kind_of(one)}")


def _tokens_grid(
    size: tuple[int, ...], dim_latent: int, patch_size: int, dimensions: int, name: str
) -> tuple[int, ...]:
    *grid, channels = size
    if len(grid) != dimensions or channels != dim_latent or any(side % patch_size or side < 1 for side in grid):
        raise ValueError(
            f"{name} must have {dimensions} dimensions that are multiples of patch_size = {patch_size}, and "
            f"dim_latent = {dim_latent} channels, got {list(size)}"
        )
    return tuple(side // patch_size for side in grid)


def _require_room(where: Tensor, sizes: list[int], shape: torch.Size) -> None:
    """For each picture, inside of its row and beside the others."""
    if where.device.type != "cpu" or torch.compiler.is_compiling():
        return
    batch, length = shape
    spans = []
    for i, ((row, offset), size) in enumerate(zip(where.tolist(), sizes, strict=True)):
        if not (0 <= row < batch and offset >= 0 and offset + size <= length):
            raise ValueError(
                f"positions[{i}] must leave room for {size} tokens in tokens of shape {list(shape)}, "
                f"got row {row}, offset {offset}"
            )
        spans.append((row, offset, offset + size, i))
    spans.sort()
    for (row, _, end, i), (next_row, begin, _, j) in pairwise(spans):
        if row == next_row and begin < end:
            raise ValueError(f"positions must not overlap, got token {begin} of row {row} in pictures {i} and {j}")
