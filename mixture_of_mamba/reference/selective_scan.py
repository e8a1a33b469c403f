# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.selective_scan`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.reference.token_order import modality_of_rows, rows_of_sequences

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    softplus: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """For every sequence over its tokens in time order (against it when ``reverse``)::

        delta = softplus(dt + dt_bias[modality])
        h     = exp(delta * A) * h + delta * u * B
        out   = (dot(C, h) + D * u) * silu(z)

    Padding tokens are passed over: ``h`` stays, ``out`` is 0. All arithmetic is float32, or float64 when an
    activation is.
    """
    activations = [x for x in (u, dt, B, C, z) if x is not None]
    acc = torch.float64 if any(x.dtype == torch.float64 for x in activations) else torch.float32
    tokens = u.shape[0] * u.shape[1]
    flat_u, flat_dt, flat_B, flat_C = (x.flatten(0, 1).to(acc) for x in (u, dt, B, C))
    A = A.to(acc)
    bias = None if dt_bias is None else torch.atleast_2d(dt_bias.to(acc))
    per_modality = bias is not None and bias.shape[0] > 1
    modality = modality_of_rows(offsets if per_modality else None, tokens, u.device)

    sequences = rows_of_sequences(u, rows, offsets, cu_seqlens)
    outputs, final_states, walks = [], [], []
    for s, sequence_rows in enumerate(sequences):
        walk = sequence_rows.flip(0) if reverse else sequence_rows
        u_t, dt_t, B_t, C_t = (flat_x[walk] for flat_x in (flat_u, flat_dt, flat_B, flat_C))
        delta = dt_t if bias is None else dt_t + bias[modality[walk]]
        if softplus:
            delta = F.softplus(delta)
        decay = torch.exp(delta[:, :, None] * A)  # [tokens of the sequence, channels, states]
        drive = (delta * u_t)[:, :, None] * B_t[:, None, :]
        h = u.new_zeros(A.shape, dtype=acc) if initial_state is None else initial_state[s].to(acc)
        dots = []
        for t in range(len(walk)):
            h = decay[t] * h + drive[t]
            dots.append(h @ C_t[t])
        y = torch.stack(dots) if dots else torch.zeros_like(u_t)
        if D is not None:
            y = y + D.to(acc) * u_t
        if z is not None:
            y = y * F.silu(z.flatten(0, 1)[walk].to(acc))
        outputs.append(y)
        final_states.append(h)
        walks.append(walk)
    if not sequences:
        return torch.zeros_like(u), u.new_zeros(0, *A.shape, dtype=acc)
    out = torch.zeros_like(flat_u).index_put((torch.cat(walks),), torch.cat(outputs))
    return out.reshape(u.shape).to(u.dtype), torch.stack(final_states)


@torch.no_grad()
def selective_scan_step(
    u: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    softplus: bool = True,
) -> Tensor:
    """:func:`selective_scan` that updates ``state [batch, channels, states]`` in place."""
    out, final_state = selective_scan(
        u, dt, A, B, C, D, z, dt_bias, rows=rows, offsets=offsets, initial_state=state, softplus=softplus
    )
    state.copy_(final_state)
    return out
