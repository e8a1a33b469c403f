# SPDX-License-Identifier: Apache-2.0
"""More modalities, the same function: outputs and gradients before and after."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba import checkpoints
from mixture_of_mamba.nn import PROJECTIONS

SUBSETS = [PROJECTIONS, ("in_proj",), ("dt_proj", "x_proj"), ("in_proj", "out_proj"), ()]
subsets = pytest.mark.parametrize("decouple", SUBSETS, ids="+".join)


def marks(layer):
    return {name: vars(parameter) for name, parameter in layer.named_parameters()}


def own_gradients(layer, x, ids):
    """The gradients of a function of y, of x and of every parameter."""
    y = layer(x, ids)
    return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])


def inputs(modalities):
    x = torch.randn(2, 23, 24, dtype=torch.float64, requires_grad=True)
    return x, torch.randint(-1, modalities, (2, 23))


@subsets
def test_an_upcycled_layer_computes_the_dense_function(decouple):
    dense = mom.Mamba(24, d_state=5, d_conv=3, dt_rank=4, bias=True).double()
    layer = checkpoints.upcycle(dense, 3, decouple)
    assert type(layer) is mom.MixtureOfMamba
    assert (layer.num_modalities, layer.decouple) == (3, decouple)
    x, ids = inputs(3)
    torch.testing.assert_close(layer(x, ids), dense(x, ids), rtol=1e-12, atol=1e-12)
    # A gradient of the dense layer is the sum over the modalities, each of which has its own.
    expected = dict(zip(["x", *dict(dense.named_parameters())], own_gradients(dense, x, ids), strict=True))
    actual = dict(zip(["x", *dict(layer.named_parameters())], own_gradients(layer, x, ids), strict=True))
    for name, gradient in expected.items():
        projection, _, leaf = name.partition(".")
        if projection in decouple:
            parts = [actual[f"{projection}.{m}.{leaf}"] for m in range(3)]
            assert all(part.any() for part in parts)
            torch.testing.assert_close(sum(parts), gradient)
        else:
            torch.testing.assert_close(actual[name], gradient)


@subsets
def test_an_added_modality_starts_like_another_and_changes_no_other(decouple):
    layer = mom.MixtureOfMamba(24, 2, decouple).double()
    wider = checkpoints.add_modality(layer, like=1)
    assert wider.num_modalities == 3
    x, ids = inputs(3)
    torch.testing.assert_close(wider(x, ids), layer(x, ids.clamp(max=1)), rtol=1e-12, atol=1e-12)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(wider.state_dict()[name], tensor)
    for name in decouple:
        assert torch.equal(getattr(wider, name)[2].weight, getattr(layer, name)[1].weight)
    if decouple:
        with torch.no_grad():
            for name in decouple:
                getattr(wider, name)[2].weight.add_(1.0)
        old = ids.clamp(max=1)
        torch.testing.assert_close(wider(x, old), layer(x, old), rtol=1e-12, atol=1e-12)
        assert not torch.equal(wider(x, ids), layer(x, old))


def test_a_token_at_a_time():
    dense = mom.Mamba(24)
    layer = checkpoints.add_modality(checkpoints.upcycle(dense, 1))
    state, dense_state = layer.allocate_state(2), dense.allocate_state(2)
    for t in range(4):
        x = torch.randn(2, 1, 24)
        torch.testing.assert_close(
            layer.step(x, state, torch.tensor([[0], [1]])), dense.step(x, dense_state), msg=str(t)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_along(dtype):
    dense = mom.Mamba(20, d_state=5, d_conv=3, dt_rank=3, conv_bias=False, bias=True, dtype=dtype, memory="lean")
    dense.in_proj.requires_grad_(False)
    dense.layer_idx = 7
    random_state = torch.get_rng_state()
    layer = checkpoints.upcycle(dense.eval(), 2, ("in_proj", "dt_proj"))
    assert torch.equal(torch.get_rng_state(), random_state)
    fresh = mom.MixtureOfMamba(
        20, 2, ("in_proj", "dt_proj"), 5, 3, dt_rank=3, conv_bias=False, bias=True, dtype=dtype, memory="lean"
    )
    assert str(layer) == str(fresh)
    assert marks(layer) == marks(fresh)
    assert vars(layer).keys() == vars(fresh).keys()
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == fresh.get_parameter(name).dtype
        assert parameter.shape == fresh.get_parameter(name).shape
        assert parameter.requires_grad != name.startswith("in_proj")
    assert (layer.memory, layer.layer_idx, layer.training, layer.d_inner) == ("lean", 7, False, 40)
    assert checkpoints.upcycle(dense, 2, memory="default").memory == "default"
    assert marks(checkpoints.add_modality(layer))["dt_proj.2.bias"] == marks(fresh)["dt_proj.1.bias"]


def test_a_fractional_expansion():
    dense = mom.Mamba(12, expand=1.75)
    assert checkpoints.upcycle(dense, 2).d_inner == dense.d_inner == 21


def test_nothing_is_shared():
    dense = mom.Mamba(24)
    layer = checkpoints.upcycle(dense, 2)
    pointers = [parameter.data_ptr() for parameter in [*dense.parameters(), *layer.parameters()]]
    assert len(set(pointers)) == len(pointers)
    x, ids = torch.randn(1, 9, 24), torch.randint(0, 2, (1, 9))
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, ids), layer(x, ids))
    nn.init.zeros_(twin.out_proj[1].weight)
    assert layer.out_proj[1].weight.any() and twin.out_proj[0].weight.any() and dense.out_proj.weight.any()


def test_on_meta():
    layer = checkpoints.add_modality(checkpoints.upcycle(mom.Mamba(24, device="meta"), 2))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer.num_modalities == 3 and vars(layer.A_log)


def test_replaced_projections_come_along():
    dense = mom.Mamba(24)
    dense.out_proj = nn.Sequential(dense.out_proj, nn.Dropout(0.0))
    layer = checkpoints.upcycle(dense, 2)
    assert all(type(child) is nn.Sequential for child in layer.out_proj)
    x, ids = torch.randn(1, 9, 24), torch.randint(0, 2, (1, 9))
    torch.testing.assert_close(layer(x, ids), dense(x))
