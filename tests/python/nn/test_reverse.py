# SPDX-License-Identifier: Apache-2.0
"""Layers that walk time from last to first: what flipping x, ids and result gives."""

from __future__ import annotations

import pytest
import torch
from layer_support import make_layer, random_ids

import mixture_of_mamba as mom

LAYERS = {
    "one operator": {},
    "shared": {"decouple": ()},
    "with D and limits": {"decouple": ("in_proj", "D"), "dt_limit": (0.01, 0.1)},
    "with A": {"decouple": ("dt_proj", "A_log")},
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def flipped(layer, x, ids, **unused):
    return layer(x.flip(1), ids.flip(1), **unused)


@each_layer
@pytest.mark.parametrize("watched", [False, True])
def test_reverse_is_flip_forward_flip(options, watched):
    layer = make_layer(**options)
    if watched:
        layer.out_proj.register_forward_hook(lambda *_: None)
    ids, x = random_ids(3, 11, 3), torch.randn(3, 11, 16).double().requires_grad_()
    y, expected = layer(x, ids, reverse=True), flipped(layer, x, ids).flip(1)
    torch.testing.assert_close(y, expected)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(x)
    for got, wanted in zip(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@each_layer
def test_packed_documents_and_states(options, device):
    layer = make_layer(**options).float().to(device)
    lengths = [4, 0, 7, 1]
    ids, x = random_ids(1, 12, 3).to(device), torch.randn(1, 12, 16, device=device)
    bounds = torch.tensor([0, 4, 4, 11, 12], dtype=torch.int32, device=device)
    _, before = layer(torch.randn(4, 3, 16, device=device), random_ids(4, 3, 3).to(device), return_state=True)
    y, after = layer(x, ids, cu_seqlens=bounds, state=before, return_state=True, reverse=True)
    begin = 0
    for i, length in enumerate(lengths):
        part, own = slice(begin, begin + length), mom.MambaState(before.conv[i : i + 1], before.ssm[i : i + 1])
        alone, own = flipped(layer, x[:, part], ids[:, part], state=own, return_state=True)
        torch.testing.assert_close(y[:, part], alone.flip(1))
        torch.testing.assert_close(after.ssm[i : i + 1], own.ssm)
        torch.testing.assert_close(after.conv[i : i + 1], own.conv)
        begin += length


def test_sorted_rows_and_a_routing_of_its_own(device):
    layer = make_layer().float().to(device)
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16, device=device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    expected = layer(x, routing, reverse=True)
    sorted_rows = routing.sort(x)
    torch.testing.assert_close(routing.unsort(layer(sorted_rows, routing, sorted=True, reverse=True)), expected)
    torch.testing.assert_close(routing.unsort(layer(sorted_rows, routing.reversed(), sorted=True)), expected)
    twice = routing.reversed().reversed()
    assert torch.equal(twice.rows, routing.rows) and torch.equal(twice.order, routing.order)
    assert torch.equal(routing.reversed().sort(x.flip(1)), sorted_rows)


def test_the_dense_block_needs_no_ids():
    mamba, x = mom.Mamba(16), torch.randn(2, 7, 16)
    torch.testing.assert_close(mamba(x, reverse=True), mamba(x.flip(1)).flip(1))
    mixture = mom.MixtureOfMamba(16, 3, ())
    torch.testing.assert_close(mixture(x, 2, reverse=True), mixture(x.flip(1), 2).flip(1))


def test_both_directions_see_the_future_and_the_past():
    one, other = mom.MixtureOfMamba(16, 2), mom.MixtureOfMamba(16, 2)
    routing = mom.Routing.from_ids(random_ids(1, 9, 2, padding=False), 2)
    x = torch.randn(1, 9, 16, requires_grad=True)
    y = one(x, routing) + other(x, routing, reverse=True)
    (gradient,) = torch.autograd.grad(y[0, 4].sum(), x)
    assert gradient[0].any(dim=1).all()
    for layer, reverse, reached in ((one, False, slice(0, 5)), (other, True, slice(4, 9))):
        (gradient,) = torch.autograd.grad(layer(x, routing, reverse=reverse)[0, 4].sum(), x)
        expected = torch.zeros(9, dtype=torch.bool)
        expected[reached] = True
        assert torch.equal(gradient[0].any(dim=1), expected)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches(shape):
    y = make_layer()(torch.randn(*shape, 16).double(), torch.zeros(shape, dtype=torch.int64), reverse=True)
    assert y.shape == (*shape, 16)


def test_wrong_boundaries_are_named():
    layer, x, ids = mom.MixtureOfMamba(8, 2), torch.randn(1, 5, 8), torch.zeros(1, 5, dtype=torch.int64)
    for bounds, message in (
        (torch.tensor([0, 99], dtype=torch.int32), "cu_seqlens must"),
        (
            torch.tensor(5, dtype=torch.int32),
            r"cu_seqlens must be a tensor of shape \[sequences \+ 1\], got torch.int32 \[\]",
        ),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            layer(x, ids, cu_seqlens=bounds, reverse=True)
