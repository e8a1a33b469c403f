# SPDX-License-Identifier: Apache-2.0
"""Bounds on delta, the step size that the scan makes of dt: ``clamp(softplus(dt + bias), low, high)``.

softplus grows, so the clamp may come before it, at the values whose softplus are the bounds. Values and gradients are
the same, and softplus stays inside the scan's kernel, which keeps nothing for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mixture_of_mamba.nn.per_row import with_bias
from mixture_of_mamba.routing import Routing

__all__ = ["checked_dt_limit", "limited_dt"]


def checked_dt_limit(limit: Sequence[float] | None) -> tuple[float, float] | None:
    """``(low, high)``; None where that bounds nothing, as (0, inf), ``mamba_ssm.Mamba2``'s default."""
    if limit is None:
        return None
    if isinstance(limit, str) or not isinstance(limit, Sequence) or len(limit) != 2:
        raise ValueError(f"dt_limit must be two numbers (low, high), got {limit!r}")
    low, high = float(limit[0]), float(limit[1])
    if not 0 <= low < high:
        raise ValueError(f"dt_limit must have 0 <= low < high, got {limit!r}")
    return None if (low, high) == (0, math.inf) else (low, high)


def limited_dt(dt: Tensor, bias: Tensor | None, limit: tuple[float, float], routing: Routing | None) -> Tensor:
    """dt with its bias, clamped so that softplus of it lies within the limits.

    In float32 at least: in 16 bits both the bias and the bounds, which lie far from 0, would lose about a percent.

    Args:
        dt: ``[batch, length, channels]``, rows in sorted order.
        bias: ``[channels]``, or ``[modalities, channels]``, which needs the routing.
    """
    dt = with_bias(dt, bias, routing)
    return dt.clamp(*(_inverse_softplus(bound) for bound in limit))


def _inverse_softplus(delta: float) -> float:
    return delta + math.log(-math.expm1(-delta)) if delta else -math.inf
