# SPDX-License-Identifier: Apache-2.0
"""Which interval a position is in, against a search by hand."""

from __future__ import annotations

import bisect

import pytest
import torch

from mixture_of_mamba.intervals import interval_of


def by_hand(boundaries):
    return [min(max(bisect.bisect(boundaries, p) - 1, 0), len(boundaries) - 2) for p in range(10)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("boundaries", [[0, 3, 3, 7], [0, 0, 5, 5], [2, 4, 6], [0, 9]], ids=str)
def test_every_position(boundaries, dtype, device):
    positions = torch.arange(10, device=device).view(2, 5)
    found = interval_of(positions, torch.tensor(boundaries, dtype=dtype, device=device))
    assert found.dtype == torch.int64 and found.shape == positions.shape
    assert found.flatten().tolist() == by_hand(boundaries)


def test_memory_grows_with_positions_alone():
    """100,000 positions in 50,000 intervals: a table of all pairs would have 5 GB at a byte a pair."""
    boundaries = torch.arange(0, 100_001, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = interval_of(torch.arange(100_000), boundaries)
    assert torch.equal(found, torch.arange(100_000) // 2)
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 10_000_000


def test_a_view_compiled(device):
    boundaries = [0, 3, 3, 7]
    whole = torch.tensor([8, -2, *boundaries, 1], device=device)
    compiled = torch.compile(lambda positions, b: interval_of(positions, b[2:-1]), fullgraph=True)
    assert compiled(torch.arange(10, device=device), whole).tolist() == by_hand(boundaries)
