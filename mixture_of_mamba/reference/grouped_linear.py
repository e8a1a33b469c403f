# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.grouped_linear`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    offsets: Tensor,
    host_offsets: Tensor | None = None,
) -> Tensor:
    """``y[rows of m] = x[rows of m] @ weight[m].T + bias[m]``; padding rows are 0.

    ``host_offsets`` is the operator's way to know ``offsets`` without asking the device; here it is not needed.
    """
    flat = x.flatten(0, -2)
    boundaries = offsets.tolist()
    parts = [
        F.linear(
            flat[boundaries[m] : boundaries[m + 1]],
            weight[m].to(x.dtype),
            None if not bias else bias[m].to(x.dtype),
        )
        for m in range(len(weight))
    ]
    padding = flat.new_zeros(flat.shape[0] - boundaries[-1], weight[0].shape[0])
    return torch.cat([*parts, padding]).reshape(*x.shape[:-1], weight[0].shape[0])
