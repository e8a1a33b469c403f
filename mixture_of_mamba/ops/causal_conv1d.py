# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution in time order, over rows in sorted order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixture_of_mamba.ops._autograd import forbid_double_backward, register_autograd
from mixture_of_mamba.ops._registration import (
    accumulation_dtype,
    cast_floating,
    forbid_gradients,
    given,
    lower_precision_autocast,
    mark_written,
    num_sequences,
    register_fake,
    vmap_by_loop,
)

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
    """Depthwise causal convolution, optionally followed by SiLU.

    Args:
        x: ``[batch, length, channels]``; its flat rows are in sorted order when ``rows`` is given.
        weight: ``[channels, width]``, any width >= 1.
        bias: ``[channels]``.
        rows: int32 ``[batch * length]``, time -> row (``Routing.rows``).
        offsets: int32 ``[modalities + 1]`` (``Routing.offsets``); rows beyond the last are padding: the window
            reaches over them, their output and gradient are 0.
        cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed sequences in flat time order.
        initial_state: ``[sequences, width - 1, channels]``, inputs before the first token, oldest first.
        silu: apply SiLU.

    Returns:
        ``y`` with the shape of ``x``, and the final state ``[sequences, width - 1, channels]``; both contiguous,
        in the dtype of ``x``, and differentiable.

    Raises:
        RuntimeError: naming the argument, what was required, and what came.
    """
    return torch.ops.mixture_of_mamba.causal_conv1d.default(
        x, weight, bias, rows, offsets, cu_seqlens, initial_state, silu
    )


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
    """:func:`causal_conv1d` of one or a few tokens that updates ``state [batch, width - 1, channels]`` in place.

    For inference only. ``state`` must be contiguous and have the dtype of ``x``.
    """
    forbid_gradients("causal_conv1d_step", x, state, weight, bias)
    y = torch.ops.mixture_of_mamba.causal_conv1d_step.default(x, state, weight, bias, rows, offsets, silu)
    mark_written(state)
    return y


@register_fake("causal_conv1d")
def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    state_shape = (num_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    return x.new_empty(x.shape), x.new_empty(state_shape)


@register_fake("causal_conv1d_backward")
def _fake_backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(x)
    grad_bias = x.new_empty(0, dtype=acc) if bias is None else bias.new_empty(bias.shape)
    grad_state = x.new_empty(0) if initial_state is None else initial_state.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_bias, grad_state


@register_fake("causal_conv1d_step")
def _fake_step(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    silu: bool,
) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _backward(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, bias, rows, offsets, cu_seqlens, initial_state = ctx.saved_tensors
    if grad_y is None:
        grad_y = x.new_zeros(x.shape)
    grad_x, grad_weight, grad_bias, grad_initial = torch.ops.mixture_of_mamba.causal_conv1d_backward.default(
        grad_y, grad_final_state, x, weight, bias, rows, offsets, cu_seqlens, initial_state, ctx.silu
    )
    return grad_x, grad_weight, given(grad_bias, bias), None, None, None, given(grad_initial, initial_state), None


register_autograd("causal_conv1d", _backward, _setup_context)
forbid_double_backward("causal_conv1d_backward")
vmap_by_loop("causal_conv1d")


def _cast(dtype: torch.dtype, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(cast_floating(argument, dtype) for argument in arguments)


lower_precision_autocast("causal_conv1d", _cast)


@register_flop_formula(torch.ops.mixture_of_mamba.causal_conv1d)
def _flops(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    batch, length, channels = x_shape
    return 2 * batch * length * channels * weight_shape[1]


@register_flop_formula(torch.ops.mixture_of_mamba.causal_conv1d_backward)
def _backward_flops(grad: Any, grad_state: Any, x_shape: Any, weight_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 3 * _flops(x_shape, weight_shape)  # the pre-activation again, grad_x, grad_weight
