# SPDX-License-Identifier: Apache-2.0
"""Which of the intervals between boundaries a position is in: a token's packed sequence, a sorted row's modality."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["interval_of"]


def interval_of(positions: Tensor, boundaries: Tensor) -> Tensor:
    """The i with ``boundaries[i] <= position < boundaries[i + 1]``, int64 of the positions' shape.

    Positions before all boundaries are in the first interval, positions after them in the last.

    Args:
        positions: integer ``[..]``.
        boundaries: integer ``[intervals + 1]``, not decreasing; an interval may be empty.
    """
    if torch.compiler.is_compiling():
        # Inductor's search reads a view from the start of its storage (CUDA, torch 2.11). Of this it makes one loop.
        return (positions.unsqueeze(-1) >= boundaries[1:-1]).sum(-1)
    found = torch.searchsorted(boundaries.contiguous(), positions.to(boundaries.dtype), right=True)
    return (found - 1).clamp(0, boundaries.shape[0] - 2)
