# SPDX-License-Identifier: Apache-2.0
"""A whole Mixture-of-Mamba block of plain projections, as one operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixture_of_mamba.ops._registration import (
    cast_floating,
    forbid_double_backward,
    given,
    lower_precision_autocast,
    num_sequences,
    vmap_by_loop,
)
from mixture_of_mamba.ops.selective_scan import CHECKPOINT_INTERVAL

__all__ = ["mamba_block"]

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
    and of ``x_proj``, the scan's output and its checkpoints; when ``lean``, only the first three.

    Args:
        x: ``[batch, length, d_model]``, rows in sorted order when ``rows`` is given.
        in_weight, x_weight, dt_weight, out_weight: lists of one matrix for all rows or one per modality:
            ``[2 * d_inner, d_model]``, ``[dt_rank + 2 * d_state, d_inner]``, ``[d_inner, dt_rank]``,
            ``[d_model, d_inner]``; cast to the dtype of ``x``.
        in_bias, dt_bias, out_bias: as many vectors, or an empty list.
        conv_weight, conv_bias: ``[d_inner, width]``, ``[d_inner]``.
        A_log, D: ``[d_inner, d_state]``, ``[d_inner]``.
        rows, offsets, host_offsets: of a ``Routing``. With ``offsets`` on a GPU, ``host_offsets`` is needed.
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
    arguments = (
        x,
        list(in_weight),
        list(in_bias),
        conv_weight,
        conv_bias,
        list(x_weight),
        list(dt_weight),
        list(dt_bias),
        A_log,
        D,
        list(out_weight),
        list(out_bias),
        rows,
        offsets,
        host_offsets,
        cu_seqlens,
        conv_state,
        ssm_state,
    )
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in _flat(arguments))
    y, new_conv_state, new_ssm_state, *_ = torch.ops.mixture_of_mamba.mamba_block.default(*arguments, lean, keep)
    return y, new_conv_state, new_ssm_state


def _flat(arguments: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            flat.append(argument)
        elif isinstance(argument, (list, tuple)):
            flat.extend(argument)
    return flat


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("mixture_of_mamba::mamba_block")
def _fake(
    x: Tensor,
    in_weight: list[Tensor],
    in_bias: list[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    dt_bias: list[Tensor],
    A_log: Tensor,
    D: Tensor,
    out_weight: list[Tensor],
    out_bias: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor | None,
    host_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    lean: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    acc = _accumulation_dtype(x)
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


@torch.library.register_fake("mixture_of_mamba::mamba_block_backward")
def _fake_backward(
    grad_y: Tensor,
    grad_conv_state: Tensor | None,
    grad_ssm_state: Tensor | None,
    x: Tensor,
    in_weight: list[Tensor],
    in_bias: list[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    dt_bias: list[Tensor],
    A_log: Tensor,
    D: Tensor,
    out_weight: list[Tensor],
    out_bias: list[Tensor],
    rows: Tensor | None,
    offsets: Tensor | None,
    host_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    xz: Tensor,
    x_dbl: Tensor,
    gated: Tensor,
    checkpoints: Tensor,
    needs: int,
) -> tuple[Any, ...]:
    acc = _accumulation_dtype(x)

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


def _any(need: Any) -> bool:
    return need if isinstance(need, bool) else any(need)


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_conv_state: Tensor | None, grad_ssm_state: Tensor | None, *_: Any
) -> tuple[Any, ...]:
    arguments, kept = _saved_arguments(ctx)
    x, in_weight, in_bias, _, conv_bias, x_weight, dt_weight, dt_bias, _, _, out_weight, out_bias = arguments[:12]
    conv_state, ssm_state = arguments[16:18]
    if grad_y is None:
        grad_y = x.new_zeros((*x.shape[:2], out_weight[0].shape[0]))
    wanted = ctx.needs_input_grad
    bits = ((0, NEEDS_X), (1, NEEDS_IN), (5, NEEDS_X_PROJ), (6, NEEDS_DT_PROJ), (10, NEEDS_OUT))
    needs = sum(bit for i, bit in bits if _any(wanted[i]))
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


torch.library.register_autograd("mixture_of_mamba::mamba_block", _backward, setup_context=_setup_context)
forbid_double_backward("mamba_block_backward")
vmap_by_loop("mamba_block")


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


def _block_flops(x_shape: Any, weights: Sequence[Any], conv_shape: Any, A_shape: Any) -> tuple[int, int, int]:
    """Of the projections, the convolution and the scan. Every row meets one matrix of each projection."""
    tokens = x_shape[0] * x_shape[1]
    projections = sum(2 * tokens * shapes[0][0] * shapes[0][1] for shapes in weights)
    return projections, 2 * tokens * conv_shape[0] * conv_shape[1], 9 * tokens * A_shape[0] * A_shape[1]


@register_flop_formula(torch.ops.mixture_of_mamba.mamba_block)
def _flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    weights = [shapes[i] for i in (1, 5, 6, 10)]
    return sum(_block_flops(shapes[0], weights, shapes[3], shapes[8]))


@register_flop_formula(torch.ops.mixture_of_mamba.mamba_block_backward)
def _backward_flops(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Twice the forward of everything; and u and dt again, and the scan where it was not kept."""
    arguments, checkpoints = shapes[3:21], shapes[24]
    weights = [arguments[i] for i in (1, 5, 6, 10)]
    projections, conv, scan = _block_flops(arguments[0], weights, arguments[3], arguments[8])
    dt_proj, *_ = _block_flops(arguments[0], [arguments[6]], arguments[3], arguments[8])
    lean = checkpoints is None or 0 in checkpoints
    return 2 * projections + dt_proj + (3 + 1) * conv + (3 if lean else 2) * scan
