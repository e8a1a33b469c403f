# SPDX-License-Identifier: Apache-2.0
"""One linear map per modality, over contiguous row ranges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixture_of_mamba.ops._autograd import forbid_double_backward, register_autograd
from mixture_of_mamba.ops._registration import (
    cast_floating,
    lower_precision_autocast,
    register_fake,
    vmap_by_loop,
)

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    offsets: Tensor,
    host_offsets: Tensor | None = None,
) -> Tensor:
    """``y[rows of m] = x[rows of m] @ weight[m].T + bias[m]``; padding rows are 0.

    Args:
        x: ``[..., in_features]``; rows in sorted order.
        weight: one ``[out_features, in_features]`` per modality, cast to the dtype of ``x``.
        bias: one ``[out_features]`` per modality, or None.
        offsets: int32 ``[modalities + 1]``, on the device of ``x``; rows beyond the last are padding.
        host_offsets: int64 ``[modalities + 1]`` on the CPU, the same values. With it the op may be a
            loop of plain GEMMs; without, on a GPU, everything stays on the device. In 16 bits on compute capability
            9.0 all modalities are one kernel either way.

    Returns:
        ``[..., out_features]``, contiguous, in the dtype of ``x``. Gradients of a modality without rows are 0.

    Raises:
        RuntimeError: naming the argument, what was required, and what came.
    """
    return torch.ops.mixture_of_mamba.grouped_linear.default(
        x, list(weight), [] if bias is None else list(bias), offsets, host_offsets
    )


@register_fake("grouped_linear")
def _fake(x: Tensor, weight: list[Tensor], bias: list[Tensor], offsets: Tensor, host_offsets: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[0].shape[0]))


@register_fake("grouped_linear_backward")
def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: list[Tensor],
    offsets: Tensor,
    host_offsets: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    grad_x = x.new_empty(x.shape) if needs_x else x.new_empty(0)
    grad_weight = [w.new_empty(w.shape) for w in weight] if needs_weight else []
    grad_bias = [w.new_empty(w.shape[0]) for w in weight] if needs_bias else []
    return grad_x, grad_weight, grad_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, offsets, host_offsets = inputs
    ctx.modalities = len(weight)
    ctx.bias_dtypes = [b.dtype for b in bias]
    ctx.has_host_offsets = host_offsets is not None
    hosts = [host_offsets] if ctx.has_host_offsets else []
    ctx.save_for_backward(x, *weight, offsets, *hosts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    weight, offsets = rest[: ctx.modalities], rest[ctx.modalities]
    host_offsets = rest[ctx.modalities + 1] if ctx.has_host_offsets else None
    needs = ctx.needs_input_grad
    needs_weight, needs_bias = any(needs[1]), any(needs[2])
    grad_x, grad_weight, grad_bias = torch.ops.mixture_of_mamba.grouped_linear_backward.default(
        grad, x, weight, offsets, host_offsets, needs[0], needs_weight, needs_bias
    )
    return (
        grad_x if needs[0] else None,
        grad_weight if needs_weight else [None] * ctx.modalities,
        [g.to(d) for g, d in zip(grad_bias, ctx.bias_dtypes, strict=True)]
        if needs_bias
        else [None] * len(ctx.bias_dtypes),
        None,
        None,
    )


register_autograd("grouped_linear", _backward, _setup_context)
forbid_double_backward("grouped_linear_backward")
vmap_by_loop("grouped_linear")
vmap_by_loop("grouped_linear_backward")  # torch's own fallback does not take lists


def _cast(dtype: torch.dtype, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    x, weight, bias, offsets, host_offsets = arguments
    return (
        cast_floating(x, dtype),
        [cast_floating(w, dtype) for w in weight],
        [cast_floating(b, dtype) for b in bias],
        offsets,
        host_offsets,
    )


lower_precision_autocast("grouped_linear", _cast)


def _matrix_flops(x_shape: Sequence[int], weight_shapes: Sequence[Sequence[int]]) -> int:
    """Multiplications and additions of all rows through one matrix (every row meets just one)."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    out_features, in_features = weight_shapes[0]
    return 2 * rows * in_features * out_features


@register_flop_formula(torch.ops.mixture_of_mamba.grouped_linear)
def _flops(x_shape: Any, weight_shapes: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _matrix_flops(x_shape, weight_shapes)


@register_flop_formula(torch.ops.mixture_of_mamba.grouped_linear_backward)
def _backward_flops(
    grad_shape: Any,
    x_shape: Any,
    weight_shapes: Any,
    offsets: Any,
    host_offsets: Any,
    needs_x: bool,
    needs_weight: bool,
    *args: Any,
    **kwargs: Any,
) -> int:
    return (bool(needs_x) + bool(needs_weight)) * _matrix_flops(x_shape, weight_shapes)
