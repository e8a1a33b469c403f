# SPDX-License-Identifier: Apache-2.0
"""The functions of Dao-AILab/causal-conv1d: its signatures, layouts ``[batch, channels, length]`` and semantics.

Beyond the original: any device, any width, any strides, and ``seq_idx`` together with states. The operators
are token-major, so channel-last inputs (``x.stride(1) == 1``) are used as they are and others are copied.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixture_of_mamba.ops import causal_conv1d

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "causal_conv1d_varlen_states"]

Activation = Literal["silu", "swish"]


def _use_silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f'activation must be None, "silu" or "swish", got {activation!r}')
    return activation is not None


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: Activation | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution.

    Args:
        x: ``[batch, channels, length]``.
        weight: ``[channels, width]``.
        bias: ``[channels]``.
        seq_idx: integer ``[batch, length]``; a change of value starts a new sequence, -1 is padding (output 0).
            Finding the boundaries waits for the device once; ``mixture_of_mamba.causal_conv1d`` with
            ``cu_seqlens`` does not.
        initial_states: ``[batch, channels, width - 1]``, what came before each batch row.
        return_final_states: also return ``[batch, channels, width - 1]``.
        final_states_out: where to write the final states.
        activation: None, "silu" or "swish".

    Returns:
        ``out [batch, channels, length]``, or ``(out, final_states)``.
    """
    silu = _use_silu(activation)
    if x.dim() != 3:
        raise ValueError(f"x must have shape [batch, channels, length], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"weight must have shape [channels, width] = [{x.shape[1]}, width] beside x [batch, channels, length], "
            f"got {list(weight.shape)}"
        )
    initial = None if initial_states is None else initial_states.transpose(1, 2)
    tokens = x.transpose(1, 2)
    if seq_idx is None or seq_idx.numel() == 0:
        y, final = causal_conv1d(tokens, weight, bias, initial_state=initial, silu=silu)
    else:
        batch, length = seq_idx.shape
        starts = torch.ones_like(seq_idx, dtype=torch.bool)
        starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
        begins = starts.flatten().nonzero().flatten().to(torch.int32)
        cu_seqlens = torch.cat((begins, begins.new_tensor([batch * length])))
        rows = torch.arange(batch + 1, device=begins.device, dtype=torch.int32) * length
        first_sequence = torch.searchsorted(begins, rows)
        if initial is not None:
            every = initial.new_zeros(begins.shape[0], *initial.shape[1:])
            initial = every.index_copy(0, first_sequence[:-1], initial)
        y, final = causal_conv1d(tokens, weight, bias, cu_seqlens=cu_seqlens, initial_state=initial, silu=silu)
        y = torch.where(seq_idx.unsqueeze(-1) < 0, torch.zeros((), dtype=y.dtype, device=y.device), y)
        final = final.index_select(0, first_sequence[1:] - 1)
    out = y.transpose(1, 2)
    if not return_final_states:
        return out
    final = final.transpose(1, 2)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """One or a few tokens; ``conv_state`` is updated in place.

    Args:
        x: ``[batch, channels]`` or ``[batch, channels, length]``.
        conv_state: ``[entries, channels, state_length]``, state_length >= width - 1.
        weight, bias, activation: as in :func:`causal_conv1d_fn`.
        cache_seqlens: int ``[batch]``; the state is then a ring, and new tokens go to these positions modulo
            its length.
        conv_state_indices: int ``[batch]``, the entry of each batch row; -1 gives output 0 and touches nothing.

    Returns:
        ``out`` with the shape of ``x``.
    """
    silu = _use_silu(activation)
    if x.dim() == 2:
        step = causal_conv1d_update(
            x.unsqueeze(-1), conv_state, weight, bias, activation, cache_seqlens, conv_state_indices
        )
        return step.squeeze(-1)
    width, state_length, length = weight.shape[1], conv_state.shape[-1], x.shape[-1]
    if state_length < width - 1:
        raise ValueError(f"conv_state must hold at least width - 1 = {width - 1} inputs, got {state_length}")
    entries = conv_state_indices
    state = conv_state
    if entries is not None:
        entries = entries.long()
        state = conv_state[entries.clamp(min=0)]
    if cache_seqlens is None:
        window = state[..., state_length - (width - 1) :]
        updated = torch.cat((state, x), dim=-1)[..., -state_length:]
    else:
        position = cache_seqlens.long().unsqueeze(1)

        def ring(first: int, last: int) -> Tensor:
            index = torch.arange(first, last, device=x.device) + position
            return index.remainder(state_length).unsqueeze(1).expand(-1, x.shape[1], -1)

        window = state.gather(2, ring(1 - width, 0))
        kept = min(length, state_length)  # a later token overwrites an earlier one in the same slot
        updated = state.scatter(2, ring(length - kept, length), x[..., length - kept :])
    y, _ = causal_conv1d(x.transpose(1, 2), weight, bias, initial_state=window.transpose(1, 2), silu=silu)
    out = y.transpose(1, 2)
    if entries is None:
        conv_state.copy_(updated)
        return out
    valid = (entries >= 0).view(-1, 1, 1)
    # Padding rows must leave entry 0 alone, which a real row may be writing: write real rows only.
    conv_state[entries[entries >= 0]] = updated[entries >= 0]
    return torch.where(valid, out, torch.zeros((), dtype=out.dtype, device=out.device))


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last ``state_len`` inputs of each packed sequence, zeros before a shorter one (no gradient).

    Args:
        x: ``[tokens, channels]``.
        cu_seqlens: int ``[sequences + 1]``.
        state_len: inputs to keep.

    Returns:
        ``[sequences, channels, state_len]``.
    """
    weight = x.new_zeros(x.shape[1], state_len + 1, dtype=torch.float32)
    with torch.no_grad():
        _, final = causal_conv1d(x.unsqueeze(0), weight, cu_seqlens=cu_seqlens, silu=False)
    return final.transpose(1, 2)
