# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.causal_conv1d`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.reference.token_order import rows_of_sequences

__all__ = ["causal_conv1d", "causal_conv1d_step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    silu: bool = True,
) -> tuple[Tensor, Tensor]:
    """``y[t] = silu(bias + sum_k weight[k] * x[t - (width - 1) + k])`` over the tokens of each sequence.

    Padding tokens are taken out before the convolution and put back as zeros. Returns ``y`` and the last
    ``width - 1`` inputs of every sequence.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[1]
    flat = x.flatten(0, 1)
    sequences = rows_of_sequences(x, rows, offsets, cu_seqlens)
    outputs, final_states = [], []
    for s, sequence_rows in enumerate(sequences):
        before = flat.new_zeros(width - 1, x.shape[2]) if initial_state is None else initial_state[s].to(x.dtype)
        history = torch.cat((before, flat[sequence_rows]))
        tokens = len(sequence_rows)
        taps = [weight[:, k].to(acc) * history[k : k + tokens].to(acc) for k in range(width)]
        pre = torch.stack(taps).sum(0)
        if bias is not None:
            pre = pre + bias.to(acc)
        outputs.append(F.silu(pre) if silu else pre)
        final_states.append(history[tokens:])
    if not sequences:
        return torch.zeros_like(x), x.new_zeros(0, width - 1, x.shape[2])
    y = torch.zeros_like(flat, dtype=acc).index_put((torch.cat(sequences),), torch.cat(outputs))
    return y.reshape(x.shape).to(x.dtype), torch.stack(final_states)


@torch.no_grad()
def causal_conv1d_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """:func:`causal_conv1d` that updates ``state [batch, width - 1, channels]`` in place."""
    y, final_state = causal_conv1d(x, weight, bias, rows=rows, offsets=offsets, initial_state=state, silu=silu)
    state.copy_(final_state)
    return y
