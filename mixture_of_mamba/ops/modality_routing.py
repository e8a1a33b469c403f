# SPDX-License-Identifier: Apache-2.0
"""Sorting tokens by modality."""

from __future__ import annotations

import torch
from torch import Tensor

from mixture_of_mamba.ops._registration import register_fake

__all__ = ["modality_routing"]


def modality_routing(ids: Tensor, num_modalities: int, *, checked: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of tokens by modality, padding last.

    Args:
        ids: integer tensor of any shape; 0 .. num_modalities - 1, or -1 for padding.
        num_modalities: 1 .. 1024.
        checked: refuse ids out of range. Ids on a GPU are never read on the host: there, as with
            ``checked=False``, an id out of range is padding.

    Returns:
        ``rows`` int32 ``[tokens]``, time -> sorted row; ``order`` int32 ``[tokens]``, its inverse; ``offsets``
        int32 ``[num_modalities + 1]``, where modality m owns rows ``offsets[m] .. offsets[m + 1]``.

    Raises:
        RuntimeError: ids that are not integers or out of range, or num_modalities out of range.
    """
    return torch.ops.mixture_of_mamba.modality_routing.default(ids, num_modalities, checked)


@register_fake("modality_routing")
def _fake(ids: Tensor, num_modalities: int, checked: bool) -> tuple[Tensor, Tensor, Tensor]:
    tokens = ids.numel()
    rows = ids.new_empty(tokens, dtype=torch.int32)
    offsets = ids.new_empty(num_modalities + 1, dtype=torch.int32)
    return rows, torch.empty_like(rows), offsets
