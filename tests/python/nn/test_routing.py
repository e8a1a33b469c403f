# SPDX-License-Identifier: Apache-2.0
"""A routing on its way: from a data loader's worker to the device, pickled, and with rows of any form."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

import mixture_of_mamba as mom


def routing(device=None):
    return mom.Routing.from_ids(torch.randint(-1, 3, (2, 6)), 3, device=device)


def assert_same(a, b):
    assert a.shape == b.shape and a.has_padding == b.has_padding
    for name in ("rows", "order", "offsets", "host_offsets"):
        assert torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()), name


def test_moved(device):
    there = routing()
    moved = there.to(device, non_blocking=True)
    assert_same(moved, there)
    assert moved.rows.device.type == device.type and moved.host_offsets.device.type == "cpu"
    assert there.to("meta").rows.is_meta
    assert_same(moved.to("cpu"), there)


@pytest.mark.cuda
def test_pinned_by_a_loader():
    def collate(samples):
        x, ids = (torch.stack(column) for column in zip(*samples, strict=True))
        return x, mom.Routing.from_ids(ids, 3)

    samples = [(torch.randn(6, 8), torch.randint(-1, 3, (6,))) for _ in range(4)]
    for x, pinned in DataLoader(samples, batch_size=2, collate_fn=collate, pin_memory=True):
        assert x.is_pinned() and pinned.rows.is_pinned() and pinned.order.is_pinned() and pinned.offsets.is_pinned()
        assert_same(pinned.to("cuda", non_blocking=True), pinned)


def test_pickled():
    before = routing()
    assert_same(pickle.loads(pickle.dumps(before)), before)


def test_compared_by_identity():
    one, other = routing(), routing()
    assert one == one and one != other and one in [other, one]


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 4), (2, 0, 5)], ids=str)
def test_rows_of_any_form(shape, device):
    r, x = routing(device), torch.randn(2, 6, *shape, device=device)
    there = r.sort(x)
    assert there.shape == x.shape and torch.equal(r.unsort(there), x)
    assert torch.equal(there.flatten(0, 1), x.flatten(0, 1)[r.order.long()])


@pytest.mark.parametrize("shape", [(0, 6), (2, 0)], ids=str)
def test_no_tokens(shape):
    r = mom.Routing.from_ids(torch.zeros(shape, dtype=torch.int64), 3)
    for x in (torch.zeros(shape, dtype=torch.int64), torch.zeros(*shape, 4), torch.zeros(*shape, 4, 2)):
        assert r.sort(x).shape == x.shape and r.unsort(x).dtype == x.dtype


def test_forms_are_on_the_cpu_under_any_default_device():
    with torch.device("meta"):
        of_segments = mom.Routing.from_segments([[(1, 0, 2)]], (1, 4), num_modalities=2)
        of_lists = mom.Routing.from_index_lists([[0, 1], [2]], (1, 4))
    assert of_segments.host_offsets.tolist() == [0, 2, 4] and of_lists.host_offsets.tolist() == [0, 2, 3]
