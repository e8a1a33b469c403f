# SPDX-License-Identifier: Apache-2.0
"""Layers whose tensors have no memory: meta and fake tensors, tracing, and weights that are elsewhere until a call."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import mixture_of_mamba as mom

LAYERS = {"one operator": {}, "step by step": {"bcdt_norm": True}}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def problem(options):
    return mom.MixtureOfMamba(8, 2, **options), torch.randn(2, 6, 8), torch.randint(-1, 2, (2, 6))


@each_layer
@pytest.mark.parametrize("modality", ["ids", "int", "masks"])
def test_fake_tensors(options, modality):
    with FakeTensorMode():
        layer, x, ids = problem(options)
        masks = torch.stack([ids == 0, ids == 1]).flatten(1)
        arguments = {"ids": {"modality": ids}, "int": {"modality": 1}, "masks": {"modality_masks": masks}}[modality]
        y, state = layer(x, return_state=True, **arguments)
        layer(x.requires_grad_(), **arguments).sum().backward()
    assert y.shape == (2, 6, 8) and state.ssm.shape == (2, 16, 16) and x.grad.shape == x.shape


@each_layer
def test_meta_tensors(options):
    layer = mom.MixtureOfMamba(8, 2, device="meta", **options)
    x, ids = torch.empty(2, 6, 8, device="meta"), torch.zeros(2, 6, dtype=torch.int64)
    y, state = layer(x, ids, return_state=True)
    assert layer.step(x[:, :1], state, 0).shape == (2, 1, 8) and y.is_meta
    y.sum().backward()
    assert all(parameter.grad.is_meta for parameter in layer.parameters())


@each_layer
def test_traced_with_ids(options):
    layer, x, ids = problem(options)
    other = torch.randint(-1, 2, (2, 6))
    traced = make_fx(lambda x, ids: layer(x, ids))(x, ids)
    torch.testing.assert_close(traced(x, other), layer(x, other))


@each_layer
def test_mapped_with_ids(options):
    layer, x, ids = problem(options)
    several = torch.stack([ids, ids.flip(0)]), torch.stack([x, -x])
    y = vmap(lambda ids, x: layer(x, ids))(*several)
    for one, ids_of_one, x_of_one in zip(y, *several, strict=True):
        torch.testing.assert_close(one, layer(x_of_one, ids_of_one))


@each_layer
@pytest.mark.parametrize("name", ["D", "A_log", "out_proj.1.weight", "conv1d.weight"])
def test_one_tensor_without_memory(options, name):
    """Not memory that nobody wrote."""
    layer, x, ids = problem(options)
    parts = {name: layer.get_parameter(name).to("meta")}
    with pytest.raises(RuntimeError, match=r"must be on the device of \w+ \(cpu\), got meta|Tensor on device meta"):
        functional_call(layer, parts, (x, ids))


def test_operators_without_memory():
    x, weight = torch.randn(1, 5, 4), torch.randn(4, 4)
    ids = torch.zeros(1, 5, dtype=torch.int64)
    routing, nowhere = mom.Routing.from_ids(ids, 1), mom.Routing.from_ids(ids, 1, device="meta")
    got = r"must be on the device of x \(cpu\), got meta"
    with pytest.raises(RuntimeError, match="index " + got):
        nowhere.sort(x)
    with pytest.raises(RuntimeError, match="weight " + got):
        mom.grouped_linear(x, [weight.to("meta")], None, routing.offsets)
    with pytest.raises(RuntimeError, match="state " + got):
        mom.causal_conv1d_step(x, torch.empty(1, 3, 4, device="meta"), weight)


def offload(model, **options):
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), **options)


@pytest.mark.parametrize("modalities", [1, 2])
def test_offloaded_by_accelerate(modalities):
    """As a whole: the convolution's weights are read, so it has to have them before the layer runs."""
    layer, x = mom.MixtureOfMamba(8, modalities), torch.randn(2, 6, 8)
    ids = torch.randint(modalities, (2, 6))
    expected = layer(x, ids)
    offload(nn.Sequential(layer), preload_module_classes=["MixtureOfMamba"])
    assert layer.D.is_meta
    torch.testing.assert_close(layer(x, ids), expected)


def test_offloaded_in_parts_is_an_error():
    layer, x = mom.Mamba(8), torch.randn(2, 6, 8)
    offload(layer)
    with pytest.raises(RuntimeError, match="weight must be on the device of x"):
        layer(x)
