# SPDX-License-Identifier: Apache-2.0
"""What torch's tools see: FLOP counts, profiler names, selective activation checkpointing."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from support import block_arguments, conv_arguments, linear_arguments, run, scan_arguments
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import mixture_of_mamba as mom

TOKENS, CHANNELS, STATES, WIDTH = 2 * 37, 12, 4, 4
SCAN = 9 * TOKENS * CHANNELS * STATES
CONV = 2 * TOKENS * CHANNELS * WIDTH
LINEAR = 2 * TOKENS * 12 * 7
IN_PROJ, X_PROJ = 2 * TOKENS * 10 * 24, 2 * TOKENS * 12 * (3 + 2 * 4)
DT_PROJ, OUT_PROJ = 2 * TOKENS * 3 * 12, 2 * TOKENS * 12 * 10
PRODUCTS = IN_PROJ + X_PROJ + DT_PROJ + OUT_PROJ
BLOCK = PRODUCTS + CONV + SCAN
BLOCK_BACKWARD = 2 * PRODUCTS + 3 * CONV + 2 * SCAN + DT_PROJ  # dt is made again
CASES = {
    "selective_scan": (mom.selective_scan, scan_arguments, SCAN, SCAN + 2 * SCAN),
    "causal_conv1d": (mom.causal_conv1d, conv_arguments, CONV, CONV + 3 * CONV),
    "grouped_linear": (mom.grouped_linear, linear_arguments, LINEAR, LINEAR + 2 * LINEAR),
    "mamba_block": (mom.mamba_block, block_arguments, BLOCK, BLOCK + BLOCK_BACKWARD),
    "mamba_block, lean": (
        mom.mamba_block,
        partial(block_arguments, lean=True),
        BLOCK,
        BLOCK + BLOCK_BACKWARD + CONV + SCAN,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_flops(device, case):
    function, make, forward, both = case
    arguments = make(device=device)
    for backward, expected in ((False, forward), (True, both)):
        counter = FlopCounterMode(display=False)
        with counter:
            run(function, arguments, backward=backward)
        assert counter.get_total_flops() == expected


def test_flops_do_not_grow_with_modalities(device):
    totals = set()
    for modalities in (1, 2, 5):
        counter = FlopCounterMode(display=False)
        with counter:
            run(mom.grouped_linear, linear_arguments(modalities=modalities, device=device))
        totals.add(counter.get_total_flops())
    assert totals == {3 * LINEAR}
    totals = set()
    for modalities in (1, 2, 5):
        counter = FlopCounterMode(display=False)
        with counter:
            run(mom.mamba_block, block_arguments(modalities=modalities, device=device))
        totals.add(counter.get_total_flops())
    assert totals == {BLOCK + BLOCK_BACKWARD}


def test_flops_of_a_frozen_block(device):
    """A gradient that nobody asked for is not counted: here those of two projections' matrices, and that of x."""
    arguments = block_arguments(device=device)
    for name in ("x_weight", "out_weight"):
        arguments[name][0].requires_grad_()
    counter = FlopCounterMode(display=False)
    y, *_ = mom.mamba_block(**arguments)
    with counter:
        y.sum().backward()
    assert counter.get_total_flops() == BLOCK_BACKWARD - 2 * IN_PROJ - DT_PROJ


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_profiler_names(device, case):
    function, make, *_ = case
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(function, make(device=device))
    names = {event.key for event in profile.key_averages()}
    assert {f"mixture_of_mamba::{function.__name__}", f"mixture_of_mamba::{function.__name__}_backward"} <= names


def test_profiler_names_of_routing(device):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        routing = mom.Routing.from_ids(torch.zeros(2, 5, dtype=torch.int64, device=device), 2)
        routing.sort(torch.zeros(2, 5, 3, device=device))
    names = {event.key for event in profile.key_averages()}
    assert {"mixture_of_mamba::modality_routing", "mixture_of_mamba::permute_rows"} <= names


class Calls(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def layer(x, linear, conv, scan):
    u = mom.grouped_linear(**{**linear, "x": x})
    u, _ = mom.causal_conv1d(**{**conv, "x": u})
    out, _ = mom.selective_scan(**{**scan, "u": u, "z": u})
    return out.square().sum()


def layer_arguments(device):
    linear = linear_arguments(2, 37, 12, 12, device=device)
    conv = conv_arguments(2, 37, 12, order="time", device=device)
    scan = scan_arguments(2, 37, 12, order="time", device=device)
    return linear["x"].requires_grad_(), linear, conv, scan


def test_selective_checkpointing_keeps_what_the_public_list_names(device):
    arguments = layer_arguments(device)
    contexts = partial(create_selective_checkpoint_contexts, mom.sac_save_list())
    with Calls() as forward:
        loss = checkpoint(layer, *arguments, use_reentrant=False, context_fn=contexts)
    with Calls() as backward:
        (gradient,) = torch.autograd.grad(loss, arguments[0])
    name = "mixture_of_mamba.{}.default".format
    for op in ("grouped_linear", "causal_conv1d", "selective_scan"):
        assert forward.counts[name(op)] == 1
        assert backward.counts[name(f"{op}_backward")] == 1
    assert backward.counts[name("selective_scan")] == 0
    assert backward.counts[name("grouped_linear")] == 0
    assert backward.counts[name("causal_conv1d")] == 1  # cheap, so computed again
    (expected,) = torch.autograd.grad(layer(*arguments), arguments[0])
    assert torch.equal(gradient, expected)


def test_plain_checkpointing(device):
    arguments = layer_arguments(device)
    (expected,) = torch.autograd.grad(layer(*arguments), arguments[0])
    loss = checkpoint(layer, *arguments, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(loss, arguments[0])[0], expected)


def test_public_list_holds_overloads(device):
    assert all(isinstance(op, torch._ops.OpOverload) for op in mom.sac_save_list())


def test_inference_keeps_no_checkpoints(device):
    """States for backward are made only when somebody will ask for a gradient."""
    arguments = scan_arguments(device=device)
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            outputs = function(*args, **(kwargs or {}))
            if function is torch.ops.mixture_of_mamba.selective_scan.default:
                sizes.append(outputs[2].numel())
            return outputs

    with Sizes():
        mom.selective_scan(**arguments)
        with torch.no_grad():
            mom.selective_scan(**{**arguments, "u": arguments["u"].clone().requires_grad_()})
        mom.selective_scan(**{**arguments, "u": arguments["u"].clone().requires_grad_()})
    assert sizes[:2] == [0, 0] and sizes[2] > 0
