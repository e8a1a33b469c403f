# SPDX-License-Identifier: Apache-2.0
"""Timing by interleaved repeats: every contender runs once per round, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Timing", "measure"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @staticmethod
    def of(milliseconds: list[float]) -> Timing:
        if len(milliseconds) < 4:
            return Timing(statistics.median(milliseconds), min(milliseconds), max(milliseconds))
        low, median, high = statistics.quantiles(milliseconds, n=4)
        return Timing(median, low, high)


def _time_cpu(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


class _CudaTimer:
    """Event pairs around one call, with the L2 cache flushed before it."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")

    def __call__(self, function: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def measure(
    contenders: dict[str, Callable[[], object]], device: str, *, rounds: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Median and quartiles of each contender over interleaved rounds."""
    clock: Callable[[Callable[[], object]], float] = _CudaTimer() if device == "cuda" else _time_cpu
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(warmup + rounds):
        for name, function in contenders.items():
            elapsed = clock(function)
            if round_index >= warmup:
                samples[name].append(elapsed)
    return {name: Timing.of(values) for name, values in samples.items()}
