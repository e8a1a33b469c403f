# SPDX-License-Identifier: Apache-2.0
"""What models are given, checked before anything is computed.

Values are read where they lie on the CPU as numbers. Nothing here waits for a GPU, and nothing is read under
``torch.compile`` and in tracing.
"""

from __future__ import annotations

import contextlib
from numbers import Integral

import torch
from torch import Tensor

from mixture_of_mamba.routing_forms import kind_of

__all__ = ["check_ids", "check_new_tokens", "check_times", "check_tokens", "first_outside"]


def first_outside(values: Tensor, low: float, high: float) -> int | None:
    """The flat position of the first value that is not in low .. high; None too where values cannot be read."""
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    if type(values) is not Tensor or not values.numel():  # fake tensors are of a type of their own
        return None
    with contextlib.suppress(RuntimeError):  # traced or vmapped: there is no number to read
        least, most = (bound.item() for bound in values.aminmax())
        if not (low <= least and most <= high):  # nor is NaN inside
            wide = values.flatten().double()  # uint8 takes no negative bound
            return int(((wide >= low) & (wide <= high)).long().argmin())
    return None


def check_tokens(tokens: object) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise ValueError(f"tokens must be integers [batch, length], got {kind_of(tokens)}")


def check_ids(tokens: Tensor, size: int, name: str) -> None:
    """``name`` is what the caller calls ``size``, how many tokens there are."""
    outside = first_outside(tokens, -1, size - 1)
    if outside is not None:
        raise ValueError(
            f"tokens must lie in -1 .. {name} - 1 = {size - 1} (-1 is padding), "
            f"got {tokens.flatten()[outside]} at flat position {outside}"
        )


def check_times(times: object, pictures: int) -> None:
    if not isinstance(times, Tensor) or times.shape != (pictures,):
        got = list(times.shape) if isinstance(times, Tensor) else kind_of(times)
        raise ValueError(f"times must have shape [pictures = {pictures}], got {got}")
    outside = first_outside(times, 0, 1)
    if outside is not None:
        raise ValueError(f"times must lie in 0 (clean) .. 1 (noise), got {times[outside]:g} for picture {outside}")


def check_new_tokens(new_tokens: object) -> None:
    if not isinstance(new_tokens, Integral) or new_tokens < 0:
        raise ValueError(f"new_tokens must be an integer of at least 0, got {new_tokens!r}")
