# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.permute_rows`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["permute_rows"]


def permute_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``out[i] = x[index[i]]`` over the rows of ``x [..., channels]``; rows with an index out of range are 0.

    ``inverse`` is what the operator's gradient needs; autograd derives this one from ``index``.
    """
    flat = x.flatten(0, -2)
    picked = index.long()
    in_range = (picked >= 0) & (picked < flat.shape[0])
    if flat.shape[0] == 0:
        return x.clone()
    gathered = flat[torch.where(in_range, picked, 0)]
    return torch.where(in_range[:, None], gathered, torch.zeros_like(gathered)).reshape(x.shape)
