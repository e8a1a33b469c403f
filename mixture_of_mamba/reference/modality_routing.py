# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.modality_routing`."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["modality_routing"]


def modality_routing(ids: Tensor, num_modalities: int, *, checked: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """``rows``, ``order`` and ``offsets`` of a stable sort by modality, padding last.

    Raises:
        RuntimeError: ids out of range, when ``checked`` and on the CPU.
    """
    ids = ids.flatten().long()
    in_range = (ids >= 0) & (ids < num_modalities)
    if checked and ids.device.type == "cpu" and not bool((in_range | (ids == -1)).all()):
        raise RuntimeError(f"ids must lie in -1 .. {num_modalities - 1}, got {ids.tolist()}")
    key = torch.where(in_range, ids, num_modalities)
    order = key.argsort(stable=True)
    rows = order.argsort()
    counts = torch.bincount(key, minlength=num_modalities + 1)[:num_modalities]
    offsets = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    return rows.int(), order.int(), offsets.int()
