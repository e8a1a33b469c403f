# SPDX-License-Identifier: Apache-2.0
"""modality_routing against its definition, and what a stable sort promises."""

from __future__ import annotations

import pytest
import torch
from support import ids_with

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned")

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
SHAPES = [(0,), (1,), (7,), (3, 5), (2, 0), (2, 3, 4), (1023,), (1024,), (1025,), (3, 5000)]


def assert_is_routing(ids: torch.Tensor, num_modalities: int) -> None:
    expected = reference.modality_routing(ids.cpu(), num_modalities, checked=False)
    for name, actual, wanted in zip(
        ("rows", "order", "offsets"), mom.modality_routing(ids, num_modalities, checked=False), expected, strict=True
    ):
        assert actual.dtype == torch.int32 and actual.is_contiguous() and actual.device == ids.device, name
        assert torch.equal(actual.cpu(), wanted), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modalities", [1, 2, 3, 31, 1024])
def test_matches_definition(device, shape, modalities):
    assert_is_routing(torch.randint(-1, modalities, shape).to(device), modalities)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_dtypes(device, dtype):
    assert_is_routing(ids_with(3, 50, 4, padding=True).to(device, dtype), 4)


def test_unsigned_ids(device):
    """255 is no modality, so unchecked it is padding."""
    assert_is_routing(torch.tensor([3, 0, 255, 1, 0], dtype=torch.uint8, device=device), 4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.complex64, torch.float8_e5m2], ids=str)
def test_ids_are_integers(device, dtype):
    with pytest.raises(RuntimeError, match="ids must be an integer tensor, got"):
        mom.modality_routing(torch.zeros(2, 3, device=device).to(dtype), 4)


@pytest.mark.parametrize("fill", [-1, 0, 2])
def test_one_modality_takes_all(device, fill):
    ids = torch.full((2, 600), fill, device=device)
    rows, order, offsets = mom.modality_routing(ids, 3)
    assert torch.equal(rows, order) and torch.equal(rows.cpu(), torch.arange(1200, dtype=torch.int32))
    assert offsets.tolist() == {-1: [0, 0, 0, 0], 0: [0, 1200, 1200, 1200], 2: [0, 0, 0, 1200]}[fill]


def test_strided_ids(device):
    ids = ids_with(40, 30, 3, padding=True).to(device)
    assert_is_routing(ids.T, 3)
    assert_is_routing(ids[::3, 1::2], 3)
    assert_is_routing(ids[:1].expand(40, 30), 3)


def test_sort_is_stable_and_inverse(device):
    ids = ids_with(4, 333, 5, padding=True).to(device)
    rows, order, offsets = mom.modality_routing(ids, 5)
    tokens = torch.arange(ids.numel(), device=device)
    assert torch.equal(rows[order.long()].long(), tokens)
    assert torch.equal(order[rows.long()].long(), tokens)
    in_order = ids.flatten()[order.long()]
    ends = [*offsets.tolist(), ids.numel()]
    for m, modality in enumerate([0, 1, 2, 3, 4, -1]):
        segment = slice(ends[m], ends[m + 1])
        assert bool((in_order[segment] == modality).all())
        assert bool((order[segment].diff() > 0).all())


@pytest.mark.parametrize("value", [-2, 3, 2**40, -(2**62)])
def test_unchecked_ids_out_of_range_are_padding(device, value):
    ids = torch.tensor([0, value, 2, -1, 1], device=device)
    rows, _, offsets = mom.modality_routing(ids, 3, checked=False)
    assert rows.tolist() == [0, 3, 2, 4, 1]
    assert offsets.tolist() == [0, 1, 2, 3]


@pytest.mark.cuda
def test_ids_on_a_gpu_are_never_read_on_the_host():
    ids = torch.tensor([0, 7, 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, _, offsets = mom.modality_routing(ids, 2, checked=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert rows.tolist() == [0, 2, 1] and offsets.tolist() == [0, 1, 2]


def test_relabelling_permutes_the_segments(device):
    ids = ids_with(3, 70, 3, padding=True).to(device)
    relabelled = torch.where(ids < 0, ids, 2 - ids)
    _, order, offsets = mom.modality_routing(ids, 3)
    _, other_order, other_offsets = mom.modality_routing(relabelled, 3)
    for m in range(3):
        segment = order[offsets[m] : offsets[m + 1]]
        assert torch.equal(segment, other_order[other_offsets[2 - m] : other_offsets[3 - m]])
