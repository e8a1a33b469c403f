# SPDX-License-Identifier: Apache-2.0
"""A whole Mixture-of-Mamba block of plain projections, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixture_of_mamba.ops._autograd import forbid_double_backward, past_autograd, register_autograd
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
from mixture_of_mamba.ops.selective_scan import CHECKPOINT_INTERVAL

__all__ = ["mamba_block", "mamba_block_step"]

Weights = Sequence[Tensor]

# Positions of the operator's arguments, as forward and backward share them.
LISTS = (1, 2, 5, 6, 7, 10, 11)
NUM_TENSOR_ARGUMENTS = 18
NEEDS_X, NEEDS_IN, NEEDS_X_PROJ, NEEDS_DT_PROJ, NEEDS_OUT = (1 << bit for bit in range(5))


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
    """The Mamba block (arXiv 2312.00752, figure 3) with projections per modality (arXiv 2501.16295).

    What ``grouped_linear``, ``causal_conv1d`` and ``selective_scan`` compute one after the other, without the copies
    between them and with one call from the host. Of the activations, backward keeps ``x``, the output of ``in_proj``
    and of ``x_proj``, the convolution's output and the scan's checkpoints; when ``lean``, only the first three.

    Args:
        x: ``[batch, length, d_model]``, rows in sorted order when ``rows`` is given.
        in_weight, x_weight, dt_weight, out_weight: lists of one matrix for all rows or one per modality:
            ``[2 * d_inner, d_model]``, ``[dt_rank + 2 * d_state, d_inner]``, ``[d_inner, dt_rank]``,
            ``[d_model, d_inner]``; cast to the dtype of ``x``.
        in_bias, dt_bias, out_bias: as many vectors, or an empty list.
        conv_weight, conv_bias: ``[d_inner, width]``, ``[d_inner]``.
        A_log, D: ``[d_inner, d_state]``, ``[d_inner]``.
        rows, offsets, host_offsets: of a ``Routing``. With ``offsets`` on a GPU and no ``host_offsets`` the host does
            not know who owns which rows, and every list must hold one tensor per modality.
        cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed sequences in flat time order.
        conv_state, ssm_state: ``[sequences, width - 1, d_inner]``, ``[sequences, d_inner, d_state]``, where each
            sequence starts from.
        lean: keep less for backward and compute it again there.

    Returns:
        ``y [batch, length, d_model]`` and the two states after the last token; all differentiable. Padding rows of
        ``y`` are 0.

    Raises:
        RuntimeError: naming the argument, what was required, and what came.
    """
    arguments = _with_lists(
        x, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias
    )
    arguments += [rows, offsets, host_offsets, cu_seqlens, conv_state, ssm_state]
    keep = False  # where a derivative is wanted, _for_derivative says otherwise
    y, new_conv_state, new_ssm_state, *_ = torch.ops.mixture_of_mamba.mamba_block.default(*arguments, lean, keep)
    return y, new_conv_state, new_ssm_state


def mamba_block_step(
    x: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
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
) -> Tensor:
    """:func:`mamba_block` of one or a few tokens that updates both states in place.

    For inference only. The states must be contiguous: ``conv_state [batch, width - 1, d_inner]`` in the dtype of ``x``,
    ``ssm_state [batch, d_inner, d_state]`` in float32 (float64 for float64), or in the dtype of a 16-bit ``x``, rounded
    once per call.
    """
    arguments = _with_lists(
        x, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D, out_weight, out_bias
    )
    arguments += [rows, offsets, host_offsets, conv_state, ssm_state]
    forbid_gradients("mamba_block_step", *_flat(arguments))
    y = torch.ops.mixture_of_mamba.mamba_block_step.default(*arguments)
    mark_written(conv_state, ssm_state)
    return y


def _with_lists(*arguments: Any) -> list[Any]:
    return [list(argument) if i in LISTS else argument for i, argument in enumerate(arguments)]


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flat.append(argument)
        elif isinstance(argument, (list, tuple)):
            flat.extend(argument)
    return flat


@register_fake("mamba_block")
def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *arguments, lean, keep = inputs
    x, _, _, conv_weight, _, _, dt_weight, _, A_log, _, out_weight, *_, cu_seqlens, _, _ = arguments
    acc = accumulation_dtype(x)
    batch, length, _ = x.shape
    tokens, sequences = batch * length, num_sequences(x, cu_seqlens)
    inner, width = conv_weight.shape
    states = A_log.shape[1]
    full = keep and not lean
    slots = tokens // CHECKPOINT_INTERVAL + sequences
    return (
        x.new_empty((batch, length, out_weight[0].shape[0])),
        x.new_empty((sequences, width - 1, inner)),
        x.new_empty((sequences, inner, states), dtype=acc),
        x.new_empty((tokens, 2 * inner) if keep else (0,)),
        x.new_empty((tokens, dt_weight[0].shape[1] + 2 * states) if keep else (0,)),
        x.new_empty((tokens, inner) if full else (0,)),
        x.new_empty((slots, inner, states) if full else (0,), dtype=acc),
    )


@register_fake("mamba_block_step")
def _fake_step(x: Tensor, *inputs: Any) -> Tensor:
    out_weight = inputs[9]
    return x.new_empty((x.shape[0], x.shape[1], out_weight[0].shape[0]))


@register_fake("mamba_block_backward")
def _fake_backward(*inputs: Any) -> tuple[Any, ...]:
    arguments, needs = inputs[3 : 3 + NUM_TENSOR_ARGUMENTS], inputs[-1]
    x, in_weight, in_bias, conv_weight, conv_bias, x_weight, dt_weight, dt_bias, A_log, D = arguments[:10]
    out_weight, out_bias, *_, conv_state, ssm_state = arguments[10:]
    acc = accumulation_dtype(x)

    def like(value: Tensor | None, absent: torch.dtype) -> Tensor:
        return x.new_empty(0, dtype=absent) if value is None else value.new_empty(value.shape)

    def all_like(values: list[Tensor], wanted: int = 1) -> list[Tensor]:
        return [value.new_empty(value.shape) for value in values] if wanted else []

    return (
        x.new_empty(x.shape) if needs & NEEDS_X else x.new_empty(0),
        all_like(in_weight, needs & NEEDS_IN),
        all_like(in_bias),
        like(conv_weight, acc),
        like(conv_bias, acc),
        all_like(x_weight, needs & NEEDS_X_PROJ),
        all_like(dt_weight, needs & NEEDS_DT_PROJ),
        all_like(dt_bias),
        like(A_log, acc),
        like(D, acc),
        all_like(out_weight, needs & NEEDS_OUT),
        all_like(out_bias),
        like(conv_state, x.dtype),
        like(ssm_state, acc),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *arguments, _, _ = inputs
    _, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    ctx.list_sizes = {i: len(arguments[i]) for i in LISTS}
    ctx.given = [argument is not None for argument in arguments]
    ctx.save_for_backward(*_flat(arguments), *kept)


def _saved_arguments(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The operator's arguments as they came, and what forward kept."""
    saved = list(ctx.saved_tensors)
    arguments: list[Any] = []
    for i in range(NUM_TENSOR_ARGUMENTS):
        if i in LISTS:
            size = ctx.list_sizes[i]
            arguments.append(saved[:size])
            saved = saved[size:]
        else:
            arguments.append(saved.pop(0) if ctx.given[i] else None)
    return arguments, saved


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_conv_state: Tensor | None, grad_ssm_state: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    arguments, kept = _saved_arguments(ctx)
    x, in_weight, in_bias, _, conv_bias, x_weight, dt_weight, dt_bias, _, _, out_weight, out_bias = arguments[:12]
    conv_state, ssm_state = arguments[16:18]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:2], out_weight[0].shape[0]))
    wanted = ctx.needs_input_grad
    bits = ((1, NEEDS_IN), (5, NEEDS_X_PROJ), (6, NEEDS_DT_PROJ), (10, NEEDS_OUT))
    needs = NEEDS_X * wanted[0] + sum(bit for i, bit in bits if any(wanted[i]))
    with past_autograd():
        gradients = torch.ops.mixture_of_mamba.mamba_block_backward.default(
            grad_y, grad_conv_state, grad_ssm_state, *arguments, *kept, needs
        )

    def listed(gradient: list[Tensor], values: list[Tensor]) -> list[Tensor | None]:
        return list(gradient) if gradient else [None] * len(values)

    return (
        gradients[0] if needs & NEEDS_X else None,
        listed(gradients[1], in_weight),
        listed(gradients[2], in_bias),
        gradients[3],
        given(gradients[4], conv_bias),
        listed(gradients[5], x_weight),
        listed(gradients[6], dt_weight),
        listed(gradients[7], dt_bias),
        gradients[8],
        gradients[9],
        listed(gradients[10], out_weight),
        listed(gradients[11], out_bias),
        None,
        None,
        None,
        None,
        given(gradients[12], conv_state),
        given(gradients[13], ssm_state),
        None,
        None,
    )


def _for_derivative(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With ``keep``: only autograd knows, where a call is traced first and differentiated later, or vmapped."""
    return *arguments[:-1], True


register_autograd("mamba_block", _backward, _setup_context, _for_derivative)
forbid_double_backward("mamba_block_backward")
vmap_by_loop("mamba_block")
vmap_by_loop("mamba_block_backward")  # torch's own fallback does not take lists


# What autocast leaves alone: biases of dt, A_log, D, and the state of the scan.
WIDE_ARGUMENTS = (7, 8, 9, 17)


def _cast(dtype: torch.dtype, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    def cast(value: Any) -> Any:
        return (
            [cast_floating(v, dtype) for v in value]
            if isinstance(value, (list, tuple))
            else cast_floating(value, dtype)
        )

    return tuple(value if i in WIDE_ARGUMENTS else cast(value) for i, value in enumerate(arguments))


lower_precision_autocast("mamba_block", _cast)
