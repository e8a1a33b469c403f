# SPDX-License-Identifier: Apache-2.0
"""ModalityLinear: one call while its children are plain, the children themselves when somebody changed them."""

from __future__ import annotations

import pytest
import torch
from layer_support import make_layer, random_ids
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS


def rows_by_hand(linear, x, routing):
    out = x.new_zeros(*x.shape[:-1], linear.out_features)
    flat, flat_out = x.flatten(0, 1), out.flatten(0, 1)
    bounds = routing.offsets.tolist()
    for child, begin, end in zip(linear, bounds[:-1], bounds[1:], strict=True):
        flat_out[begin:end] = child(flat[begin:end])
    return out


@pytest.mark.parametrize("bias", [False, True])
def test_forward(bias):
    linear = mom.ModalityLinear(5, 7, 3, bias=bias).double()
    routing = mom.Routing.from_ids(random_ids(2, 9, 3), 3)
    x = torch.randn(2, 9, 5).double()
    torch.testing.assert_close(linear(x, routing), rows_by_hand(linear, x, routing))


class Adapter(nn.Module):
    """What LoRA libraries put in a linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) * self.scale


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_replaced_children_are_called(name):
    layer = make_layer()
    ids, x = random_ids(2, 8, 3), torch.randn(2, 8, 16).double()
    before = layer(x, ids)
    projection = getattr(layer, name)
    projection[1] = Adapter(projection[1])
    assert not torch.allclose(layer(x, ids), before)
    with torch.no_grad():
        projection[1].scale.fill_(1.0)
    torch.testing.assert_close(layer(x, ids), before)
    layer(x, ids).sum().backward()
    assert projection[1].scale.grad is not None
    assert projection[1].base.weight.grad is not None


@pytest.mark.parametrize("decouple", [("in_proj", "x_proj", "dt_proj", "out_proj"), ()])
@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_hooks_are_called(name, decouple):
    layer = make_layer(decouple=decouple)
    ids, x = random_ids(2, 8, 3), torch.randn(2, 8, 16).double()
    before, seen = layer(x, ids), []
    projection = getattr(layer, name)
    child = projection[2] if decouple else projection
    handle = child.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    torch.testing.assert_close(layer(x, ids), before)
    assert seen == [child.out_features]
    handle.remove()
    assert torch.equal(layer(x, ids), before)


@pytest.mark.parametrize("name", [*PROJECTIONS, "in_proj.1"])
def test_a_forward_of_one_instance_is_called(name):
    """As libraries for offloading put there (accelerate's ``add_hook_to_module``)."""
    layer, x, ids = make_layer(), torch.randn(2, 6, 16).double(), torch.randint(-1, 3, (2, 6))
    module, calls, expected = layer.get_submodule(name), [], layer(x, ids)
    plain = module.forward
    module.forward = lambda *arguments: calls.append(1) or plain(*arguments)
    torch.testing.assert_close(layer(x, ids), expected)
    assert calls == [1]


def test_modules_come_and_go():
    """What a ModuleList can do; the shared expert that is not there has no place in it."""
    linear = mom.ModalityLinear(4, 4, 3)
    first, last = linear[0], linear[2]
    del linear[1]
    assert list(linear) == [first, last] and linear.shared is None
    linear.insert(0, torch.nn.Linear(4, 4))
    linear.append(torch.nn.Linear(4, 4))
    assert len(linear) == 4 and linear[1] is first and linear.pop(0) is not first
    assert set(linear.state_dict()) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}


def test_freezing_one_modality():
    layer = make_layer()
    for parameter in layer.in_proj[0].parameters():
        parameter.requires_grad_(False)
    layer(torch.randn(1, 8, 16).double(), random_ids(1, 8, 3, padding=False)).sum().backward()
    assert layer.in_proj[0].weight.grad is None
    assert layer.in_proj[1].weight.grad is not None


def test_a_modality_without_tokens_has_zero_gradients():
    layer = make_layer()
    layer(torch.randn(1, 8, 16).double(), torch.zeros(1, 8, dtype=torch.int64)).sum().backward()
    assert layer.in_proj[0].weight.grad.any()
    assert not layer.in_proj[1].weight.grad.any()
