# SPDX-License-Identifier: Apache-2.0
"""A layer's options and state, checked before anything is made of them. Operators check tensors by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from mixture_of_mamba.nn.state import MambaState, checked_ssm_dtype

__all__ = ["check_conv_state", "check_cu_seqlens", "check_options", "check_state", "check_step_state", "checked_names"]


def checked_names(
    argument: str, names: Iterable[str], allowed: Sequence[str], *, but: Sequence[str] = ()
) -> tuple[str, ...]:
    """``names`` as a tuple, each among ``allowed`` and not in ``but``, and none of them twice."""
    allowed = tuple(name for name in allowed if name not in but)
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{argument} must be a list of names among {allowed}, got {names!r}")
    names = tuple(names)
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"{argument} must name projections among {allowed}, got {unknown}")
    if len(set(names)) < len(names):
        raise ValueError(f"{argument} must name each projection at most once, got {list(names)}")
    return names


def check_options(
    sizes: Mapping[str, Any],
    *,
    expand: Any,
    dt_rank: Any,
    dt_range: tuple[Any, Any],
    dt_init: Any,
    memory: Any,
    dtype: torch.dtype | None,
) -> None:
    """Raise ValueError for the first option of a layer that is wrong. ``sizes`` are integers of at least 1."""
    if dt_rank != "auto":
        sizes = {**sizes, "dt_rank": dt_rank}
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            or_auto = ' or "auto"' if name == "dt_rank" else ""
            raise ValueError(f"{name} must be an integer{or_auto}, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not isinstance(expand, Real) or not expand * sizes["d_model"] >= 1:
        raise ValueError(f"expand must make d_inner = expand * d_model at least 1, got {expand!r}")
    low, high = dt_range
    if not 0 < low <= high:
        raise ValueError(f"dt_min and dt_max must have 0 < dt_min <= dt_max, got {low!r} and {high!r}")
    if dt_init not in ("random", "constant"):
        raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
    if memory not in ("default", "lean"):
        raise ValueError(f'memory must be "default" or "lean", got {memory!r}')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype must be a floating type, got {dtype!r}")
    if dtype is not None and dtype.itemsize < 2:
        raise ValueError(f"dtype must have at least 16 bits, got {dtype}")


def check_state(state: object, *, needed: bool = False) -> None:
    """Shapes and dtypes are the operators' to check: they know the sequences."""
    if not isinstance(state, MambaState) and (needed or state is not None):
        raise ValueError(f"state must be a MambaState (allocate_state, return_state), got {type(state).__name__}")


def check_cu_seqlens(cu_seqlens: object) -> None:
    """Its values are the operators' to check."""
    if cu_seqlens is not None and not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be an int32 tensor [sequences + 1], got {type(cu_seqlens).__name__}")


def check_conv_state(state: MambaState, dtype: torch.dtype) -> None:
    """Of a step whose activations have ``dtype``: the operators would not say what to do."""
    if state.conv.dtype != dtype:
        raise ValueError(
            f"state.conv must have the dtype of the activations (autocast's under autocast), {dtype}, got "
            f"{state.conv.dtype}: allocate_state(batch, dtype={dtype}), or state.to(dtype={dtype}) after a prefill"
        )


def check_step_state(state: MambaState, batch: int, channels: int, states: int) -> None:
    """Of a step that is several operators: the scan's would refuse its part when the convolution's is written."""
    ssm = state.ssm
    if tuple(ssm.shape) != (batch, channels, states):
        wanted = f"[batch = {batch}, d_inner = {channels}, d_state = {states}]"
        raise ValueError(f"state.ssm must have shape {wanted}, got {list(ssm.shape)}")
    if not ssm.is_contiguous():
        raise ValueError(f"state.ssm must be contiguous, got strides {list(ssm.stride())}")
    checked_ssm_dtype("state.ssm", ssm.dtype, state.conv.dtype)
