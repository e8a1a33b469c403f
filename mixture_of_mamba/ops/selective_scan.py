# SPDX-License-Identifier: Apache-2.0
"""The modality-masked fused selective scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mixture_of_mamba.ops._autograd import forbid_double_backward, register_autograd
from mixture_of_mamba.ops._registration import (
    accumulation_dtype,
    forbid_gradients,
    given,
    mark_written,
    num_sequences,
    register_fake,
    vmap_by_loop,
)

__all__ = ["CHECKPOINT_INTERVAL", "selective_scan", "selective_scan_step"]

# Tokens between the states that forward keeps for backward (kCheckpointInterval in the kernels).
CHECKPOINT_INTERVAL = 16


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
    """Selective scan (Mamba, arXiv 2312.00752, algorithm 2), fused with dt bias, softplus, skip and gate.

    For every sequence and channel, over its tokens in time order (against it when ``reverse``)::

        delta = softplus(dt + dt_bias[modality])
        h     = exp(delta * A) * h + delta * u * B
        out   = (dot(C, h) + D * u) * silu(z)

    Args:
        u, dt, z: ``[batch, length, channels]``; flat rows in sorted order when ``rows`` is given.
        A: ``[channels, states]``.
        B, C: ``[batch, length, states]``.
        D: ``[channels]``.
        dt_bias: ``[channels]``, or ``[modalities, channels]``, which needs ``offsets``.
        rows: int32 ``[batch * length]``, time -> row (``Routing.rows``).
        offsets: int32 ``[modalities + 1]`` (``Routing.offsets``); rows beyond the last are padding: the state
            passes over them, their output and gradients are 0.
        cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed sequences in flat time order.
        initial_state: ``[sequences, channels, states]``.
        softplus: apply softplus to ``dt + dt_bias``.
        reverse: walk each sequence from its last token to its first.

    Returns:
        ``out`` with the shape and dtype of ``u``, and the final state ``[sequences, channels, states]``; both
        contiguous and differentiable. A, D, dt_bias, states and all arithmetic are float32 (float64 when an
        activation is float64, CPU only). Activations of different dtypes are promoted to the widest.

    Raises:
        RuntimeError: naming the argument, what was required, and what came.
    """
    inputs = (u, dt, A, B, C, D, z, dt_bias, initial_state)
    checkpoint = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    out, final_state, _ = torch.ops.mixture_of_mamba.selective_scan.default(
        u, dt, A, B, C, D, z, dt_bias, rows, offsets, cu_seqlens, initial_state, softplus, reverse, checkpoint
    )
    return out, final_state


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
    """:func:`selective_scan` of one or a few tokens that updates ``state [batch, channels, states]`` in place.

    For inference only. ``state`` must be contiguous: float32 (float64 beside float64 activations), or the dtype of a
    16-bit ``u``. The latter is computed in float32 too, and rounded to nearest once per call, so it drifts from what
    float32 holds.
    """
    forbid_gradients("selective_scan_step", u, state, dt, A, B, C, D, z, dt_bias)
    y = torch.ops.mixture_of_mamba.selective_scan_step.default(
        u, state, dt, A, B, C, D, z, dt_bias, rows, offsets, softplus
    )
    mark_written(state)
    return y


@register_fake("selective_scan")
def _fake(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    softplus: bool,
    reverse: bool,
    checkpoint: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(u, dt, B, C, z)
    sequences = num_sequences(u, cu_seqlens)
    channels, states = A.shape
    slots = u.shape[0] * u.shape[1] // CHECKPOINT_INTERVAL + sequences
    final_state = u.new_empty((sequences, channels, states), dtype=acc)
    checkpoints = u.new_empty((slots, channels, states) if checkpoint else (0,), dtype=acc)
    return u.new_empty(u.shape), final_state, checkpoints


@register_fake("selective_scan_backward")
def _fake_backward(
    grad_out: Tensor,
    grad_final_state: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor | None,
    softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    acc = accumulation_dtype(u, dt, B, C, z)
    io = acc if acc == torch.float64 else torch.promote_types(u.dtype, dt.dtype)
    for activation in (B, C, z):
        io = io if activation is None else torch.promote_types(io, activation.dtype)

    def like(x: Tensor | None, absent: torch.dtype) -> Tensor:
        return u.new_empty(0, dtype=absent) if x is None else x.new_empty(x.shape)

    return (
        like(u, io),
        like(dt, io),
        like(A, acc),
        like(B, io),
        like(C, io),
        like(D, acc),
        like(z, io),
        like(dt_bias, acc),
        like(initial_state, acc),
    )


@register_fake("selective_scan_step")
def _fake_step(
    u: Tensor,
    state: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor | None,
    offsets: Tensor | None,
    softplus: bool,
) -> Tensor:
    return u.new_empty(u.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, softplus, reverse, _ = inputs
    _, _, checkpoints = output
    ctx.set_materialize_grads(False)  # zeros for the checkpoints would be the largest tensor of all
    ctx.mark_non_differentiable(checkpoints)
    ctx.save_for_backward(*tensors, checkpoints)
    ctx.softplus, ctx.reverse = softplus, reverse


def _backward(
    ctx: Any, grad_out: Tensor | None, grad_final_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    u, _, _, _, _, D, z, dt_bias, _, _, _, initial_state = tensors
    if grad_out is None:
        grad_out = u.new_zeros(u.shape)
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_dt_bias, grad_initial = (
        torch.ops.mixture_of_mamba.selective_scan_backward.default(
            grad_out, grad_final_state, *tensors, checkpoints, ctx.softplus, ctx.reverse
        )
    )
    return (
        grad_u,
        grad_dt,
        grad_A,
        grad_B,
        grad_C,
        given(grad_D, D),
        given(grad_z, z),
        given(grad_dt_bias, dt_bias),
        None,
        None,
        None,
        given(grad_initial, initial_state),
        None,
        None,
        None,
    )


register_autograd("selective_scan", _backward, _setup_context)
forbid_double_backward("selective_scan_backward")
vmap_by_loop("selective_scan")

# Autocast: the scan belongs to the ops that run in the widest type of their inputs. The operator promotes by
# itself, so the dispatcher's fallthrough is the right rule: A, D, dt_bias, states, and a float32 dt, stay float32.


@register_flop_formula(torch.ops.mixture_of_mamba.selective_scan)
def _flops(u_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """9 per token, channel and state, the count that Mamba's authors use."""
    batch, length, channels = u_shape
    return 9 * batch * length * channels * A_shape[1]


@register_flop_formula(torch.ops.mixture_of_mamba.selective_scan_backward)
def _backward_flops(
    grad: Any, grad_state: Any, u_shape: Any, dt_shape: Any, A_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(u_shape, dt_shape, A_shape)
