# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d_step and selective_scan_step: the same numbers, with the state updated in place."""

from __future__ import annotations

import pytest
import torch
from step_support import of_a_step, replayed_step, step
from support import (
    FLOATS,
    assert_bitwise_equal,
    assert_matches,
    conv_arguments,
    lower,
    scan_arguments,
)

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned")

SCAN = {
    "base": {},
    "one token": {"length": 1},
    "one token, no padding": {"length": 1, "padding": False},
    "one token, time order": {"length": 1, "order": "time"},
    "many sequences": {"batch": 9, "length": 1, "channels": 40},
    "a few tokens": {"length": 3},
    "usual states": {"length": 1, "channels": 33, "states": 16},
    "bare": {"D": False, "z": False, "dt_bias": None, "order": "time"},
    "shared dt bias": {"dt_bias": "shared", "length": 1},
    "no softplus": {"softplus": False, "length": 2},
    "views": {"strides": "half", "length": 1},
    "channel-first": {"strides": "transposed", "length": 2},
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0},
    "a token more than the step's own kernel takes": {"length": 5},
    **{f"{n} states": {"length": 2, "states": n} for n in (0, 1, 4, 8, 17, 32, 63, 64, 100, 128, 129)},
}
CONV = {
    "base": {},
    "one token": {"length": 1},
    "one token, time order": {"length": 1, "order": "time"},
    "many sequences": {"batch": 9, "length": 1, "channels": 40},
    "fewer tokens than the window": {"length": 2},
    "as many tokens as the window": {"length": 4},
    "width 1": {"width": 1, "length": 1},
    "width 2": {"width": 2, "length": 1},
    "width 9": {"width": 9, "length": 1},
    "no bias, no silu": {"bias": False, "silu": False, "length": 1},
    "views": {"strides": "half", "length": 1},
    "channel-first": {"strides": "transposed", "length": 2},
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0},
}


@pytest.mark.parametrize("variation", SCAN.values(), ids=SCAN)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scan_matches_definition(device, dtype, variation):
    arguments = scan_arguments(dtype=dtype, device=device, **variation)
    expected = step(reference.selective_scan_step, lower(arguments, torch.float64))
    assert_matches(step(mom.selective_scan_step, arguments), expected)


@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"initial_state": False}, {"states": 7, "channels": 65}])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_few_tokens_without_a_gradient(device, dtype, options):
    """A forward of so few tokens is computed as a step is."""
    arguments = scan_arguments(**{"dtype": dtype, "device": device, "length": 3, "batch": 6, **options})
    with torch.no_grad():
        got = dict(zip(("out", "final_state"), mom.selective_scan(**arguments), strict=True))
        expected = reference.selective_scan(**lower(arguments, torch.float64))
    assert_matches(got, dict(zip(("out", "final_state"), expected, strict=True)))


@pytest.mark.parametrize("variation", CONV.values(), ids=CONV)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conv_matches_definition(device, dtype, variation):
    arguments = conv_arguments(dtype=dtype, device=device, **variation)
    expected = step(reference.causal_conv1d_step, lower(arguments, torch.float64))
    assert_matches(step(mom.causal_conv1d_step, arguments), expected)


@pytest.mark.parametrize("make", [scan_arguments, conv_arguments])
def test_double(make):
    arguments = lower(make(dtype=torch.float64), torch.float64)
    name = "selective_scan_step" if make is scan_arguments else "causal_conv1d_step"
    expected = step(getattr(reference, name), arguments)
    assert_matches(step(getattr(mom, name), arguments), expected)


def test_mixed_dtypes(device):
    arguments = scan_arguments(dtype=torch.bfloat16, dt_dtype=torch.float32, length=1, device=device)
    results = step(mom.selective_scan_step, arguments)
    assert results["out"].dtype == torch.bfloat16 and results["state"].dtype == torch.float32
    assert_matches(results, step(reference.selective_scan_step, lower(arguments, torch.float64)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_padding_tokens_leave_the_state_bitwise(device, dtype):
    for make, function in (
        (scan_arguments, mom.selective_scan_step),
        (conv_arguments, mom.causal_conv1d_step),
    ):
        arguments = make(dtype=dtype, length=1, device=device)
        arguments["offsets"] = torch.zeros_like(arguments["offsets"])
        results = step(function, arguments)
        assert torch.equal(results["state"], arguments["initial_state"])
        assert not results["out"].any()


def test_state_of_other_sequences_is_untouched(device):
    """A decoder hands in a slice of its state cache."""
    arguments = scan_arguments(batch=2, length=1, device=device)
    cache = torch.full((4, *arguments["initial_state"].shape[1:]), 7.0, device=device)
    expected = step(mom.selective_scan_step, arguments)
    cache[1:3] = arguments["initial_state"]
    out = mom.selective_scan_step(state=cache[1:3], **of_a_step(arguments))
    assert_bitwise_equal({"out": out, "state": cache[1:3]}, expected)
    assert bool((cache[0] == 7).all()) and bool((cache[3] == 7).all())


def test_steps_refuse_gradients(device):
    scan = scan_arguments(length=1, device=device)
    scan["u"].requires_grad_()
    conv = conv_arguments(length=1, device=device)
    conv["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match=r"selective_scan_step is for inference.*use selective_scan with"):
        mom.selective_scan_step(scan["u"], scan["initial_state"], *(scan[name] for name in ("dt", "A", "B", "C")))
    with pytest.raises(RuntimeError, match=r"causal_conv1d_step is for inference.*use causal_conv1d with"):
        mom.causal_conv1d_step(conv["x"], conv["initial_state"], conv["weight"])
    with torch.no_grad():
        mom.causal_conv1d_step(conv["x"], conv["initial_state"], conv["weight"])
    with pytest.raises(RuntimeError, match="causal_conv1d_step is for inference"):
        mom.causal_conv1d_step(
            conv["x"], conv["initial_state"].clone().requires_grad_(), conv["weight"].detach().clone()
        )
    with pytest.raises(RuntimeError, match="selective_scan_step is for inference"):
        mom.selective_scan_step(
            scan["u"].detach(),
            scan["initial_state"].clone().requires_grad_(),
            *(scan[name] for name in ("dt", "A", "B", "C")),
        )
    with torch.inference_mode():
        mom.selective_scan_step(scan["u"], scan["initial_state"], *(scan[name] for name in ("dt", "A", "B", "C")))


@pytest.mark.parametrize("way", ["operators", "one operator", "step by step"])
def test_a_graph_that_keeps_the_old_state_is_told(way, device):
    """As after any other writing in place: not gradients of values that are no more."""
    layer = mom.MixtureOfMamba(8, 2, bcdt_norm=way == "step by step", device=device)
    x, ids = torch.randn(2, 5, 8, device=device), torch.randint(2, (2, 5)).to(device)
    _, state = layer(x, ids, return_state=True)
    state = state.detach()
    y = layer(x, ids, state=state)
    before = state.conv._version, state.ssm._version
    if way == "operators":
        with torch.no_grad():
            u = torch.randn(2, 1, 16, device=device)
            B = torch.randn(2, 1, 16, device=device)
            mom.causal_conv1d_step(u, state.conv, layer.conv1d.weight.squeeze(1))
            mom.selective_scan_step(u, state.ssm, u, -layer.A_log.exp(), B, B)
    else:
        layer.step(x[:, :1], state, ids[:, :1])
    assert (state.conv._version, state.ssm._version) == (before[0] + 1, before[1] + 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cuda_graph(dtype):
    """A captured decoding step, replayed with other tokens and another modality mix."""
    first = scan_arguments(batch=3, length=1, dtype=dtype, device="cuda")
    second = scan_arguments(batch=3, length=1, dtype=dtype, device="cuda")
    assert_bitwise_equal(replayed_step(first, second), step(mom.selective_scan_step, second))
