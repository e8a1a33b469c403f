# SPDX-License-Identifier: Apache-2.0
"""The layer under torch's transformations: compile, export, autocast, activation checkpointing, flop counting."""

from __future__ import annotations

import functools

import pytest
import torch
from layer_support import random_ids
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

import mixture_of_mamba as mom


def test_one_graph_for_all_lengths_and_mixes():
    layer = mom.MixtureOfMamba(16, 3)
    graphs = 0

    def counting(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    # The first batch has 22 tokens: torch takes sizes that are equal by chance, as with the width 16, for one size.
    for length in (11, 9, 33, 64, 100):
        ids, x = random_ids(2, length, 3), torch.randn(2, length, 16)
        ids[0, 0] = -1
        routing = mom.Routing.from_ids(ids, 3)
        torch.testing.assert_close(compiled(x, routing), layer(x, routing))
    assert graphs == 1


@pytest.mark.slow
def test_inductor_trains_alike(device):
    layer = mom.MixtureOfMamba(16, 2).to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for length in (12, 40):
        ids = random_ids(2, length, 2)
        ids[0, 0] = -1
        routing = mom.Routing.from_ids(ids, 2, device=device)
        x = torch.randn(2, length, 16, device=device, requires_grad=True)
        leaves = [x, *layer.parameters()]
        grad = torch.randn(2, length, 16, device=device)
        expected = torch.autograd.grad(layer(x, routing), leaves, grad)
        for got, wanted in zip(torch.autograd.grad(compiled(x, routing), leaves, grad), expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-4, rtol=2e-4)


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mom.MixtureOfMamba(16, 2)

        def forward(self, x, ids):
            return self.layer(x, ids)

    model = Model()
    length = torch.export.Dim("length", min=2, max=4096)
    example = (torch.randn(2, 10, 16), random_ids(2, 10, 2))
    program = torch.export.export(model, example, dynamic_shapes=({1: length}, {1: length}))
    x, ids = torch.randn(2, 27, 16), random_ids(2, 27, 2)
    torch.testing.assert_close(program.module()(x, ids), model(x, ids))


def test_autocast_keeps_the_recurrence_wide(device):
    layer = mom.MixtureOfMamba(16, 2).to(device)
    ids, x = random_ids(2, 30, 2).to(device), torch.randn(2, 30, 16, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, state = layer(x, ids, return_state=True)
    assert y.dtype == state.conv.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    expected = layer(x, ids)
    assert (y.float() - expected).norm() <= 2e-2 * expected.norm()
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("op_name", ["mamba_block", "selective_scan"])
def test_selective_checkpointing_saves_what_the_list_names(op_name):
    layer = mom.MixtureOfMamba(16, 2)
    if op_name == "selective_scan":  # a watched projection makes the layer call the operators one by one
        layer.out_proj.register_forward_hook(lambda *_: None)
    target = getattr(torch.ops.mixture_of_mamba, op_name).default
    ids, x = random_ids(2, 20, 2, padding=False), torch.randn(2, 20, 16, requires_grad=True)
    scans = []

    def policy(context, op, *args, **kwargs):
        if op is target:
            scans.append(context.is_recompute)
        saved = op in mom.sac_save_list()
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    y = checkpoint(layer, x, ids, use_reentrant=False, context_fn=contexts)
    leaves = [x, *layer.parameters()]
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(layer(x, ids), leaves, grad)
    for got, wanted in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
        assert torch.equal(got, wanted)
    assert scans[0] is False
    assert target in mom.sac_save_list()


def test_flops_do_not_grow_with_modalities():
    """Each token meets one set of weights: a mixture costs what the dense block costs."""
    x = torch.randn(2, 32, 16)
    counts = []
    for modalities in (1, 4):
        layer = mom.MixtureOfMamba(16, modalities)
        ids = random_ids(2, 32, modalities, padding=False)
        with FlopCounterMode(display=False) as counter:
            layer(x, ids)
        counts.append(counter.get_total_flops())
    d, e, n, r, w = 16, 32, 16, 1, 4
    by_hand = 64 * (2 * (d * 2 * e + e * (r + 2 * n) + r * e + e * d) + 2 * e * w + 9 * e * n)
    assert counts == [by_hand, by_hand]
