# SPDX-License-Identifier: Apache-2.0
"""What ``torch.utils.flop_counter`` counts for the operators of a whole block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from mixture_of_mamba.ops.mamba_block import (
    NEEDS_DT_PROJ,
    NEEDS_IN,
    NEEDS_OUT,
    NEEDS_X,
    NEEDS_X_PROJ,
    NUM_TENSOR_ARGUMENTS,
)


def _flops_of_steps(arguments: Sequence[Any]) -> tuple[list[int], int, int]:
    """Of the four projections, the convolution and the scan. Every row meets one matrix of each projection."""
    (batch, length, _), (inner, width), (_, states) = arguments[0], arguments[3], arguments[8]
    tokens = batch * length
    projections = [2 * tokens * arguments[i][0][0] * arguments[i][0][1] for i in (1, 5, 6, 10)]
    return projections, 2 * tokens * inner * width, 9 * tokens * inner * states


@register_flop_formula([torch.ops.mixture_of_mamba.mamba_block, torch.ops.mixture_of_mamba.mamba_block_step])
def _flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    projections, conv, scan = _flops_of_steps(shapes)
    return sum(projections) + conv + scan


@register_flop_formula(torch.ops.mixture_of_mamba.mamba_block_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Every gradient that is computed, at the price of forward; and dt again, and u and the scan where not kept."""
    checkpoints, needs = shapes[-2], shapes[-1]
    projections, conv, scan = _flops_of_steps(shapes[3 : 3 + NUM_TENSOR_ARGUMENTS])
    in_proj, x_proj, dt_proj, out_proj = projections
    weights = zip((NEEDS_IN, NEEDS_X_PROJ, NEEDS_DT_PROJ, NEEDS_OUT), projections, strict=True)
    of_weights = sum(flops for bit, flops in weights if needs & bit)
    of_inputs = x_proj + dt_proj + out_proj + (in_proj if needs & NEEDS_X else 0)
    recomputed = dt_proj + (conv + scan if 0 in checkpoints else 0)
    return of_weights + of_inputs + 3 * conv + 2 * scan + recomputed
