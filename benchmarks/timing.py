# SPDX-License-Identifier: Apache-2.0
"""Timing by interleaved repeats: every contender runs once per round, so that drift hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Timing", "measure"]

BACK_TO_BACK = 5  # calls that one measurement of the wall time covers
CLOCK_HZ = 2.0e9  # no GPU here is faster, so that a pause in clocks is never too short


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float  # on a GPU: of the device alone, with all launches queued in advance
    low: float  # first quartile
    high: float  # third quartile
    wall: float | None = None  # GPU only: a call among many in a row, launches included

    @staticmethod
    def of(milliseconds: list[float], wall: list[float] | None = None) -> Timing:
        if len(milliseconds) < 4:
            low, median, high = min(milliseconds), statistics.median(milliseconds), max(milliseconds)
        else:
            low, median, high = statistics.quantiles(milliseconds, n=4)
        return Timing(median, low, high, statistics.median(wall) if wall else None)


def _time_cpu(function: Callable[[], object]) -> float:
    """The second of two calls, so that a contender finds its own data in the caches and not the one before's."""
    function()
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


class _CudaTimer:
    """Event pairs around one call, with the L2 cache flushed and the launches queued before it begins."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self.launch_seconds: dict[Callable[[], object], float] = {}

    def __call__(self, function: Callable[[], object]) -> float:
        pause = self.launch_seconds.get(function, 0.0)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        torch.cuda._sleep(int((1.5 * pause + 1e-4) * CLOCK_HZ))
        begin.record()
        host = time.perf_counter()
        function()
        host = time.perf_counter() - host
        end.record()
        end.synchronize()
        self.launch_seconds[function] = host if pause == 0.0 else min(host, pause)
        return begin.elapsed_time(end)

    @staticmethod
    def wall(function: Callable[[], object]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(BACK_TO_BACK):
            function()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e3 / BACK_TO_BACK


def measure(
    contenders: dict[str, Callable[[], object]], device: str, *, rounds: int = 15, warmup: int = 3
) -> dict[str, Timing]:
    """Median and quartiles of each contender over interleaved rounds."""
    timer = _CudaTimer() if device == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    walls: dict[str, list[float]] = {name: [] for name in contenders}
    for round_index in range(warmup + rounds):
        for name, function in contenders.items():
            elapsed = timer(function) if timer else _time_cpu(function)
            wall = timer.wall(function) if timer else None
            if round_index >= warmup:
                samples[name].append(elapsed)
                if wall is not None:
                    walls[name].append(wall)
    return {name: Timing.of(samples[name], walls[name]) for name in contenders}
