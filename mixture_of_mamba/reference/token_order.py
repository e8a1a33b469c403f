# SPDX-License-Identifier: Apache-2.0
"""How the convolution and the scan walk the tokens of a batch.

=========  ==========================================================================================
time       flat position ``b * length + t`` of a token; batch 2, length 3: times 0 1 2 | 3 4 5
row        where the token's channels lie; modality ids 1 0 0 | 0 -1 1 sort to ``rows`` 3 0 1 | 2 5 4
modality   ``offsets`` 0 3 5: rows 0 .. 2 are modality 0, rows 3 and 4 modality 1, row 5 is padding
sequence   a run of times that starts from its own initial state; ``cu_seqlens`` 0 2 6: two of them
=========  ==========================================================================================
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["modality_of_rows", "rows_of_sequences"]


def modality_of_rows(offsets: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """Modality of every row, int64 ``[tokens]``; the number of modalities itself means padding."""
    row = torch.arange(tokens, device=device)
    if offsets is None:
        return torch.zeros_like(row)
    return (row[:, None] >= offsets[None, 1:]).sum(1)


def rows_of_sequences(
    activation: Tensor, rows: Tensor | None, offsets: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """For every sequence the rows of its tokens in time order, without padding."""
    batch, length, _ = activation.shape
    tokens = batch * length
    row_of_time = torch.arange(tokens, device=activation.device) if rows is None else rows.long()
    boundaries = [b * length for b in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    real = torch.ones_like(row_of_time, dtype=torch.bool) if offsets is None else row_of_time < offsets[-1]
    return [row_of_time[begin:end][real[begin:end]] for begin, end in itertools.pairwise(boundaries)]
