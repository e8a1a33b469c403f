# SPDX-License-Identifier: Apache-2.0
"""The Mamba-1 functions of state-spaces/mamba: its signatures, layouts ``[batch, channels, length]``, semantics.

Beyond the original: any device, gradients through the last state, any number of states. The operators are
token-major; inputs whose channels are contiguous (``u.stride(1) == 1``) are used as they are, others are copied.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.ops import causal_conv1d, selective_scan, selective_scan_step
from mixture_of_mamba.ops._registration import accumulation_dtype

__all__ = ["mamba_inner_fn", "selective_scan_fn", "selective_state_update"]

_Named = dict[str, Tensor | None]


def _check_shapes(u: Tensor, A: Tensor, like_u: _Named, of_channels: _Named, matrices: _Named) -> None:
    """In this interface's layout; the operators would speak of their own."""

    def require(fits: bool, name: str, rule: str, value: Tensor) -> None:
        if not fits:
            raise ValueError(f"{name} must have shape {rule}, got {list(value.shape)}")

    require(u.dim() == 3, "u", "[batch, channels, length]", u)
    batch, channels, length = u.shape
    require(A.dim() == 2 and A.shape[0] == channels, "A", f"[channels, states] = [{channels}, states]", A)
    states = A.shape[1]
    for name, value in like_u.items():
        if value is not None:
            require(value.shape == u.shape, name, f"[batch, channels, length] = {list(u.shape)}", value)
    for name, value in of_channels.items():
        if value is not None:
            require(tuple(value.shape) == (channels,), name, f"[channels] = [{channels}]", value)
    rule = (
        f"[batch, states, length] = [{batch}, {states}, {length}], [batch, groups, states, length] or "
        f"[channels, states] = [{channels}, {states}]"
    )
    for name, value in matrices.items():
        assert value is not None
        shape = tuple(value.shape)
        if value.dim() == 2:
            require(shape == (channels, states), name, rule, value)
        else:
            require(value.dim() in (3, 4) and shape[:1] + shape[-2:] == (batch, states, length), name, rule, value)


def _tokens(matrix: Tensor, u: Tensor, name: str) -> Tensor:
    """B or C as ``[batch, groups, length, states]``."""
    if matrix.is_complex():
        raise NotImplementedError(f"{name} must be real-valued, got {matrix.dtype}")
    return matrix.transpose(1, 2).unsqueeze(1) if matrix.dim() == 3 else matrix.transpose(2, 3)


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan.

    Args:
        u, delta, z: ``[batch, channels, length]``.
        A: ``[channels, states]``, real.
        B, C: ``[batch, states, length]``, ``[batch, groups, states, length]``, or constant in time
            ``[channels, states]``.
        D, delta_bias: ``[channels]``.
        delta_softplus: whether delta goes through softplus.
        return_last_state: also return ``[batch, channels, states]``; unlike the original, differentiable.

    Returns:
        ``out [batch, channels, length]``, or ``(out, last_state)``.
    """
    if A.is_complex():
        raise NotImplementedError(f"A must be real-valued, got {A.dtype}")
    _check_shapes(u, A, {"delta": delta, "z": z}, {"D": D, "delta_bias": delta_bias}, {"B": B, "C": C})
    if B.dim() == 2 or C.dim() == 2:
        return _constant_matrices(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
    B, C = _tokens(B, u, "B"), _tokens(C, u, "C")
    groups = max(B.shape[1], C.shape[1])
    channels = u.shape[1]
    if not groups or channels % groups or any(m.shape[1] not in (1, groups) for m in (B, C)):
        raise ValueError(
            f"B and C must have groups that divide the {channels} channels, got {B.shape[1]}, {C.shape[1]}"
        )
    size = channels // groups
    outs, states = [], []
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        out, state = selective_scan(
            u[:, part].transpose(1, 2),
            delta[:, part].transpose(1, 2),
            A[part],
            B[:, min(group, B.shape[1] - 1)],
            C[:, min(group, C.shape[1] - 1)],
            None if D is None else D[part],
            None if z is None else z[:, part].transpose(1, 2),
            None if delta_bias is None else delta_bias[part],
            softplus=delta_softplus,
        )
        outs.append(out)
        states.append(state)
    out = (outs[0] if groups == 1 else torch.cat(outs, dim=-1)).transpose(1, 2)
    if not return_last_state:
        return out
    return out, states[0] if groups == 1 else torch.cat(states, dim=1)


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One token of the scan; ``state`` is updated in place (no gradient).

    Args:
        state: ``[batch, channels, states]``. Contiguous float32 (float64 beside float64 inputs), or a 16-bit dtype of
            x, is updated where it lies; another dtype or layout goes through a copy.
        x, dt, z: ``[batch, channels]``.
        A: ``[channels, states]``, real.
        B, C: ``[batch, states]``.
        D, dt_bias: ``[channels]``.
        dt_softplus: whether dt goes through softplus.

    Returns:
        ``out [batch, channels]`` in the dtype of x.
    """
    if A.is_complex():
        raise NotImplementedError(f"A must be real-valued, got {A.dtype}")
    for name, tensor, dims in (("state", state, 3), ("x", x, 2), ("dt", dt, 2), ("B", B, 2), ("C", C, 2), ("z", z, 2)):
        if tensor is not None and tensor.dim() != dims:
            raise ValueError(
                f"{name} must have {dims} dimensions (Mamba-1, without heads or groups), got {list(tensor.shape)}"
            )
    as_it_is = state.dtype == x.dtype and state.element_size() == 2
    updated = (state if as_it_is else state.to(accumulation_dtype(x, dt, B, C, z))).contiguous()
    out = selective_scan_step(
        x.unsqueeze(1),
        updated,
        dt.unsqueeze(1),
        A,
        B.unsqueeze(1),
        C.unsqueeze(1),
        D,
        None if z is None else z.unsqueeze(1),
        dt_bias,
        softplus=dt_softplus,
    )
    if updated is not state:
        state.copy_(updated)
    return out.squeeze(1).to(x.dtype)


def _constant_matrices(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    return_last_state: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """B or C that depend on the channel and not on time (S4's form).

    The operator shares B and C among channels, so every channel and state becomes a scan of its own with one
    state: channels * states of them, B = 1 or B_t, the factors applied outside. Memory grows with the states;
    this form is kept for compatibility, not for speed.
    """
    batch, channels, length = u.shape
    states = A.shape[1]

    def spread(x: Tensor) -> Tensor:  # [batch, channels, length] -> [batch, length, channels * states]
        return x.transpose(1, 2).repeat_interleave(states, dim=-1)

    def along_states(matrix: Tensor, name: str) -> Tensor:  # -> [batch, length, channels * states], broadcastable
        if matrix.is_complex():
            raise NotImplementedError(f"{name} must be real-valued, got {matrix.dtype}")
        if matrix.dim() == 2:
            return matrix.reshape(1, 1, channels * states)
        grouped = _tokens(matrix, u, name)
        per_channel = grouped.repeat_interleave(channels // grouped.shape[1], dim=1)
        return per_channel.permute(0, 2, 1, 3).reshape(batch, length, channels * states)

    dtype = torch.promote_types(u.dtype, torch.float32)
    factors_B, factors_C = along_states(B, "B").to(dtype), along_states(C, "C").to(dtype)
    ones = torch.ones(batch, length, 1, device=u.device, dtype=dtype)
    bias = None if delta_bias is None else delta_bias.repeat_interleave(states)
    h, last = selective_scan(
        spread(u.to(dtype)) * factors_B,
        spread(delta.to(dtype)),
        A.reshape(-1, 1),
        ones,
        ones,
        dt_bias=bias,
        softplus=delta_softplus,
    )
    y = (h * factors_C).reshape(batch, length, channels, states).sum(-1).transpose(1, 2)
    if D is not None:
        y = y + u * D.unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    out = y.to(u.dtype)
    return (out, last.reshape(batch, channels, states)) if return_last_state else out


def _normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _read(matrix: Tensor, bias: Tensor | None, rms_weight: Tensor | None, eps: float) -> Tensor:
    """B or C, read off x_proj as ``[batch, length, states]``, in the layout of :func:`selective_scan_fn`."""
    if bias is not None:
        matrix = matrix + bias.to(matrix.dtype)
    return _normalised(matrix, rms_weight, eps).transpose(1, 2)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """Everything of a Mamba block after ``in_proj``.

    Args:
        xz: ``[batch, 2 * channels, length]``.
        conv1d_weight: ``[channels, 1, width]``; conv1d_bias, D, delta_bias: ``[channels]``.
        x_proj_weight: ``[dt_rank + (states where B is None) + (states where C is None), channels]``.
        delta_proj_weight: ``[channels, dt_rank]``; out_proj_weight: ``[d_model, channels]``.
        A: ``[channels, states]``, real. B, C: ``[channels, states]``, or None: read off x_proj.
        B_proj_bias, C_proj_bias: ``[states]``, added to a B or C that is read off x_proj.
        checkpoint_lvl: 0 or 1, accepted and without effect: what is kept for backward is the same.
        b_rms_weight, c_rms_weight: ``[states]``, dt_rms_weight: ``[channels]``; RMS norm of what is read off x_proj,
            after the biases, and of delta before its bias. Unlike the original, the gradients are those of the norm,
            and the weights have gradients too.

    Returns:
        ``[batch, length, d_model]``.
    """
    if A.is_complex():
        raise NotImplementedError(f"A must be real-valued, got {A.dtype}")
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl must be 0 or 1, got {checkpoint_lvl}")
    if (B is not None and b_rms_weight is not None) or (C is not None and c_rms_weight is not None):
        raise ValueError("b_rms_weight and c_rms_weight are for a B and C that are read off x_proj, got constant ones")
    x, z = xz.transpose(1, 2).chunk(2, dim=-1)
    x, _ = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, silu=True)
    states = A.shape[1]
    rank = delta_proj_weight.shape[1]
    sizes = [rank] + [states] * ((B is None) + (C is None))
    low, *variable = F.linear(x, x_proj_weight).split(sizes, dim=-1)
    delta = _normalised(F.linear(low, delta_proj_weight), dt_rms_weight, b_c_dt_rms_eps)
    if B is None:
        B = _read(variable.pop(0), B_proj_bias, b_rms_weight, b_c_dt_rms_eps)
    if C is None:
        C = _read(variable.pop(0), C_proj_bias, c_rms_weight, b_c_dt_rms_eps)
    y = selective_scan_fn(
        x.transpose(1, 2), delta.transpose(1, 2), A, B, C, D, z.transpose(1, 2), delta_bias, delta_softplus
    )
    assert isinstance(y, Tensor)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)
