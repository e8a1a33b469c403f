# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a training step, counted by torch with the library's formulas."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]


def count_flops(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Of one forward and one backward."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())
