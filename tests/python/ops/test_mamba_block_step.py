# SPDX-License-Identifier: Apache-2.0
"""mamba_block_step: mamba_block of a few tokens, with both states updated in place."""

from __future__ import annotations

import re

import pytest
import torch
from support import FLOATS, Arguments, Results, assert_bitwise_equal, assert_matches, block_arguments, lower, truth

import mixture_of_mamba as mom

pytestmark = pytest.mark.usefixtures("poisoned", "full_precision_matmul")

VARIATIONS = {
    "one token": {"length": 1},
    "one token, no padding": {"length": 1, "padding": False},
    "one sequence": {"batch": 1, "length": 1},
    "many sequences": {"batch": 9, "length": 1, "padding": False},
    "a few tokens": {"length": 3},
    "more tokens than a step is for": {"length": 21},
    "time order": {"length": 1, "order": "time"},
    "dense": {"length": 2, "several": ()},
    "aligned sizes": {"length": 1, "width": 32, "inner": 64, "states": 16, "rank": 8},
    "six modalities": {"batch": 7, "length": 1, "modalities": 6},
    "no biases": {"length": 1, "in_bias": False, "conv_bias": False, "dt_bias": False, "out_bias": False},
    "no taps into the past": {"length": 1, "taps": 1},
    "parameters in half": {"length": 1, "parameter_dtype": torch.bfloat16},
    "no tokens": {"length": 0},
}
NOT_OF_A_STEP = ("cu_seqlens", "conv_state", "ssm_state", "lean")


def stepped(arguments: Arguments) -> Results:
    states = {name: arguments[name].clone() for name in ("conv_state", "ssm_state")}
    given = {name: value for name, value in arguments.items() if name not in NOT_OF_A_STEP}
    with torch.no_grad():
        y = mom.mamba_block_step(**states, **given)
    return {"y": y, "new_conv_state": states["conv_state"], "new_ssm_state": states["ssm_state"]}


def arguments_of(**options) -> Arguments:
    arguments = block_arguments(**options)
    dtype = arguments["x"].dtype
    arguments["conv_state"] = arguments["conv_state"].to(dtype)
    arguments["ssm_state"] = arguments["ssm_state"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return arguments


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_the_block_bitwise(device, dtype, variation):
    arguments = arguments_of(dtype=dtype, device=device, **variation)
    with torch.no_grad():
        expected = dict(zip(("y", "new_conv_state", "new_ssm_state"), mom.mamba_block(**arguments), strict=True))
    assert_bitwise_equal(stepped(arguments), expected)


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_matches_definition_in_double(variation):
    arguments = lower(arguments_of(dtype=torch.float64, **variation), torch.float64)
    expected = truth("mamba_block", arguments)
    results = stepped(arguments)
    assert_matches(results, {name: expected[name] for name in results})


def test_padding_tokens_leave_the_states_bitwise(device):
    arguments = arguments_of(length=1, device=device)
    arguments["offsets"] = torch.zeros_like(arguments["offsets"])
    arguments["host_offsets"] = arguments["offsets"].cpu()
    results = stepped(arguments)
    assert torch.equal(results["new_conv_state"], arguments["conv_state"])
    assert torch.equal(results["new_ssm_state"], arguments["ssm_state"])
    assert not results["y"].any()


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scan_state_in_16_bits(device, dtype, variation):
    """The step in float32, with the state rounded once."""
    arguments = arguments_of(dtype=dtype, device=device, **variation)
    arguments["ssm_state"] = arguments["ssm_state"].to(dtype)
    results = stepped(arguments)
    wide = stepped({**arguments, "ssm_state": arguments["ssm_state"].float()})
    assert results["new_ssm_state"].dtype == dtype
    assert torch.equal(results["new_ssm_state"], wide["new_ssm_state"].to(dtype))
    assert torch.equal(results["new_conv_state"], wide["new_conv_state"])
    # On a GPU the scan adds y up in another order, and a sum that falls on the other side is rounded to another y.
    torch.testing.assert_close(results["y"], wide["y"], rtol=2e-2, atol=2e-2)


def test_refuses_gradients(device):
    arguments = arguments_of(length=1, device=device)
    arguments["in_weight"][1].requires_grad_()
    given = {name: value for name, value in arguments.items() if name not in ("cu_seqlens", "lean")}
    with pytest.raises(RuntimeError, match=r"mamba_block_step is for inference.*use mamba_block with"):
        mom.mamba_block_step(**given)
    stepped(arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "conv_state",
            lambda s: s.half(),
            "conv_state is updated in place and must be contiguous float32, got contiguous",
        ),
        (
            "ssm_state",
            lambda s: s.bfloat16(),
            "ssm_state is updated in place and must be contiguous float32, got contig",
        ),
        ("ssm_state", lambda s: s.mT.contiguous().mT, "must be contiguous float32, got strided float32"),
        (
            "conv_state",
            lambda s: s[:1],
            "conv_state must have shape [sequences, width - 1, channels] = [2, 3, 12], got",
        ),
        ("ssm_state", lambda s: s[:, 1:], "ssm_state must have shape [sequences, channels, states] = [2, 12, 4], got"),
    ],
)
def test_errors(device, name, change, message):
    arguments = arguments_of(length=1, device=device)
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        stepped(arguments)


def test_states_are_checked_before_either_is_written(device):
    arguments = arguments_of(length=1, dtype=torch.bfloat16, device=device)
    conv_state, ssm_state = arguments["conv_state"].clone(), arguments["ssm_state"].half()
    given = {name: value for name, value in arguments.items() if name not in NOT_OF_A_STEP}
    message = "ssm_state is updated in place and must be contiguous float32 or bfloat16, got contiguous float16"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        mom.mamba_block_step(conv_state=conv_state, ssm_state=ssm_state, **given)
    assert torch.equal(conv_state, arguments["conv_state"])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_boundaries_that_only_the_device_knows(dtype):
    device = torch.device("cuda")
    sizes = {"width": 16, "inner": 32, "rank": 8}
    arguments = arguments_of(length=1, batch=5, dtype=dtype, device=device, **sizes)
    on_host = stepped(arguments)
    results = stepped({**arguments, "host_offsets": None})
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, value in results.items():
        torch.testing.assert_close(value, on_host[name], atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
def test_cuda_graph():
    """A captured step, replayed with other tokens and states."""
    first, second = (arguments_of(batch=3, length=1, padding=False, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    moving = ("x", "conv_state", "ssm_state")
    second = {**first, **{name: second[name] for name in moving}}
    static = {name: first[name].clone() for name in moving}
    given = {name: value for name, value in {**first, **static}.items() if name not in ("cu_seqlens", "lean")}
    with torch.no_grad():
        mom.mamba_block_step(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mom.mamba_block_step(**given)
    for name in moving:
        static[name].copy_(second[name])
    graph.replay()
    results = {"y": y, "new_conv_state": static["conv_state"], "new_ssm_state": static["ssm_state"]}
    assert_bitwise_equal(results, stepped(second))
