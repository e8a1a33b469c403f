# SPDX-License-Identifier: Apache-2.0
"""The selective scan with an A per modality, out of the operator, whose A is one for all tokens.

Every pair of channel c and state n becomes a channel with one state, and A moves from the operator's decay into its
delta and its input, which are per token::

    delta'[c, n] = -delta[c] A_m[c, n]     u'[c, n] = -u[c] B[n] / A_m[c, n]     A' = -1, B' = C' = 1
    h[c, n]      = exp(delta' A') h[c, n] + delta' u' = exp(delta[c] A_m[c, n]) h[c, n] + delta[c] u[c] B[n]

That is the state itself, whose product with C follows. It is kept for every token, in float32 (float64 beside float64).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.nn.per_row import of_rows, with_bias
from mixture_of_mamba.ops import selective_scan, selective_scan_step
from mixture_of_mamba.routing import Routing

__all__ = ["scan_of_pairs", "scan_of_pairs_step"]


def scan_of_pairs(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    dt_bias: Tensor | None,
    *,
    routing: Routing,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """``ops.selective_scan`` without skip, and with A ``[modalities, channels, states]``; rows in sorted order.

    The gated output is float32 (float64 beside float64 activations).
    """
    if initial_state is not None:
        initial_state = _pairs_of_state(initial_state, A)
    u, delta, decay, ones = _pairs(u, dt, A, B, dt_bias, routing)
    h, last = selective_scan(
        u,
        delta,
        decay,
        ones,
        ones,
        rows=routing.rows,
        offsets=routing.offsets,
        cu_seqlens=cu_seqlens,
        initial_state=initial_state,
        softplus=False,
        reverse=reverse,
    )
    return _gated_output(h, C, z), last.view(last.shape[0], *A.shape[1:])


def scan_of_pairs_step(
    u: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor,
    dt_bias: Tensor | None,
    *,
    routing: Routing,
) -> Tensor:
    """:func:`scan_of_pairs` of one or a few tokens that updates ``state [batch, channels, states]`` in place.

    A state in a 16-bit dtype of ``u`` is computed in a copy, since the operator's activations are wide here.
    """
    pairs = _pairs_of_state(state, A)
    u, delta, decay, ones = _pairs(u, dt, A, B, dt_bias, routing)
    wide = pairs.to(u.dtype)
    h = selective_scan_step(
        u, wide, delta, decay, ones, ones, rows=routing.rows, offsets=routing.offsets, softplus=False
    )
    if pairs.dtype != wide.dtype:
        pairs.copy_(wide)
    return _gated_output(h, C, z)


def _pairs(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, routing: Routing
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """u', delta', A', and the ones that are B' and C'."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    A = of_rows(A.to(dtype).flatten(1), routing).view(*u.shape, B.shape[-1])
    delta = F.softplus(with_bias(dt.to(dtype), dt_bias, routing))
    deltas = -delta.unsqueeze(-1) * A
    inputs = -u.to(dtype).unsqueeze(-1) * B.to(dtype).unsqueeze(-2) / A
    ones = inputs.new_ones(*u.shape[:2], 1)
    inputs, deltas = inputs.flatten(2), deltas.flatten(2)
    return inputs, deltas, inputs.new_full((inputs.shape[2], 1), -1.0), ones


def _pairs_of_state(state: Tensor, A: Tensor) -> Tensor:
    if state.dim() != 3 or state.shape[1:] != A.shape[1:]:
        raise ValueError(
            f"state.ssm must have shape [sequences, d_inner = {A.shape[1]}, d_state = {A.shape[2]}], "
            f"got {list(state.shape)}"
        )
    return state.reshape(state.shape[0], A.shape[1] * A.shape[2], 1)


def _gated_output(h: Tensor, C: Tensor, z: Tensor) -> Tensor:
    """Not a matrix product: autocast would round it to 16 bits."""
    y = (h.view(*z.shape, C.shape[-1]) * C.to(h.dtype).unsqueeze(-2)).sum(-1)
    return y * F.silu(z.to(h.dtype))
