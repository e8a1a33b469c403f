# SPDX-License-Identifier: Apache-2.0
"""Definition of :func:`mixture_of_mamba.mamba_block`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixture_of_mamba.reference.causal_conv1d import causal_conv1d
from mixture_of_mamba.reference.grouped_linear import grouped_linear
from mixture_of_mamba.reference.selective_scan import selective_scan

__all__ = ["mamba_block"]

Weights = Sequence[Tensor]


def mamba_block(
    x: Tensor,
    in_weight: Weights,
    in_bias: Weights,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: Weights,
    dt_weight: Weights,
    dt_bias: Weights,
    A_log: Tensor,
    D: Tensor,
    out_weight: Weights,
    out_bias: Weights,
    *,
    rows: Tensor | None = None,
    offsets: Tensor | None = None,
    host_offsets: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    lean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block, step by step::

        x, z     = in_proj(x)
        u        = silu(causal_conv1d(x))
        dt, B, C = x_proj(u)
        y        = selective_scan(u, dt_proj(dt), -exp(A_log), B, C, D, z, dt_bias)
        out_proj(y)

    A projection with one matrix meets all rows but padding; one with several is per modality. ``host_offsets`` and
    ``lean`` say how the operator shall work, not what it computes.
    """
    acc = torch.promote_types(x.dtype, torch.float32)
    if offsets is None:
        offsets = torch.tensor([0, x.shape[0] * x.shape[1]], device=x.device)
    ends = offsets[[0, -1]]
    time: dict[str, Any] = {"rows": rows, "offsets": offsets, "cu_seqlens": cu_seqlens}

    def project(x: Tensor, weight: Weights, bias: Weights = ()) -> Tensor:
        return grouped_linear(x, weight, bias, ends if len(weight) == 1 else offsets)

    x, z = project(x, in_weight, in_bias).chunk(2, dim=-1)
    u, new_conv_state = causal_conv1d(x, conv_weight, conv_bias, initial_state=conv_state, **time)
    rank, states = dt_weight[0].shape[1], A_log.shape[1]
    dt, B, C = project(u, x_weight).split([rank, states, states], dim=-1)
    biases = torch.stack(list(dt_bias)) if dt_bias else None
    A = -torch.exp(A_log.to(acc))
    y, new_ssm_state = selective_scan(u, project(dt, dt_weight), A, B, C, D, z, biases, initial_state=ssm_state, **time)
    return project(y, out_weight, out_bias), new_conv_state, new_ssm_state
