# SPDX-License-Identifier: Apache-2.0
"""A layer of one modality without ids: nothing is sorted, and the numbers are those of ids that say the same."""

from __future__ import annotations

import pytest
import torch
from layer_support import Calls, make_layer, reference_layer

from mixture_of_mamba.nn import PROJECTIONS

OPTIONS = {
    "plain": {"bias": True},
    "norms and limits": {"bcdt_norm": True, "dt_limit": (0.01, 0.05)},
    "shared experts": {"shared_expert": PROJECTIONS},
    "shared experts and limits": {"shared_expert": PROJECTIONS, "dt_limit": (0.01, 0.05)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("watched", [False, True], ids=["one operator", "watched"])
@pytest.mark.parametrize("length", [5, 150])
def test_no_routing(options, watched, length):
    layer, x = make_layer(modalities=1, **options), torch.randn(2, length, 16).double().requires_grad_()
    ids, calls = torch.zeros(2, length, dtype=torch.int64), []
    if watched:
        for module in (layer.in_proj, layer.x_proj, layer.dt_proj[0], layer.out_proj[0]):
            module.register_forward_hook(lambda *_: calls.append(1))
    with Calls() as operators:
        y = layer(x)
    assert operators.counts and not operators.counts.keys() & {"permute_rows", "modality_routing"}
    assert len(calls) == 4 * watched
    expected = layer(x, ids)
    torch.testing.assert_close(y, expected)
    leaves, grad = [x, *layer.parameters()], torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, leaves, grad), torch.autograd.grad(expected, leaves, grad))

    states = [layer.allocate_state(2), layer.allocate_state(2)]
    steps = [layer.step(x[:, :3], states[0]), layer.step(x[:, :3], states[1], ids[:, :3])]
    torch.testing.assert_close(steps[0], steps[1])
    torch.testing.assert_close(states[0].conv, states[1].conv)
    torch.testing.assert_close(states[0].ssm, states[1].ssm)


@pytest.mark.parametrize("decouple", [("A_log", "in_proj"), ("D", "dt_proj"), ("A_log", "D")], ids="+".join)
def test_a_recurrence_of_its_own(decouple):
    layer, x = make_layer(modalities=1, decouple=decouple), torch.randn(2, 6, 16).double()
    torch.testing.assert_close(layer(x), reference_layer(layer, x, torch.zeros(2, 6, dtype=torch.int64)))


@pytest.mark.parametrize("modality", [None, 0, 3, True])
def test_one_number_for_all(modality):
    layer, x = make_layer(modalities=1), torch.randn(2, 6, 16).double()
    assert torch.equal(layer(x, modality), layer(x))


def test_reverse():
    layer, x = make_layer(modalities=1), torch.randn(2, 6, 16).double()
    torch.testing.assert_close(layer(x, reverse=True), layer(x.flip(1)).flip(1))
