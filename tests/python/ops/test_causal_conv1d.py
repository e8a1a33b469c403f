# SPDX-License-Identifier: Apache-2.0
"""causal_conv1d against its definition: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, STRIDES, assert_matches, conv_arguments, cotangent, lower, run, strided, truth
from torch.nn import functional as F

import mixture_of_mamba as mom

pytestmark = pytest.mark.usefixtures("poisoned")

VARIATIONS = {
    "base": {},
    "one token": {"length": 1},
    "shorter than the window": {"length": 2},
    "as long as the window": {"length": 4},
    "long": {"batch": 1, "length": 700},
    "many short sequences": {"batch": 40, "length": 3},
    "one channel": {"channels": 1},
    "vector of channels + 1": {"channels": 17},
    "many channels": {"channels": 150, "length": 20},
    "width 1": {"width": 1},
    "width 2": {"width": 2},
    "width 3": {"width": 3},
    "width 5": {"width": 5},
    "width 31": {"width": 31},
    "wider than the sequence": {"width": 60},
    "one modality": {"modalities": 1},
    "four modalities, one empty": {"modalities": 4},
    "no padding": {"padding": False},
    "time order": {"order": "time"},
    "rows without offsets": {"order": "rows", "padding": False},
    "offsets without rows": {"order": "offsets"},
    "packed": {"packed": True},
    "packed, wide": {"packed": True, "width": 9},
    "packed in time order": {"packed": True, "order": "time"},
    "no bias": {"bias": False},
    "no initial state": {"initial_state": False},
    "bare": {"bias": False, "initial_state": False, "order": "time"},
    "no silu": {"silu": False},
    "no silu, packed": {"silu": False, "packed": True},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_definition(device, dtype, variation):
    arguments = conv_arguments(dtype=dtype, device=device, **variation)
    results = run(mom.causal_conv1d, arguments)
    assert all(value.is_contiguous() for value in (results["y"], results["final_state"]))
    assert_matches(results, truth("causal_conv1d", arguments))


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_matches_definition_in_double(variation):
    arguments = lower(conv_arguments(dtype=torch.float64, **variation), torch.float64)
    assert_matches(run(mom.causal_conv1d, arguments), truth("causal_conv1d", arguments))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(device, dtype, strides):
    arguments = conv_arguments(batch=3, strides=strides, dtype=dtype, device=device)
    assert_matches(run(mom.causal_conv1d, arguments), truth("causal_conv1d", arguments))


def test_strided_parameters_and_indices(device):
    arguments = conv_arguments(packed=True, device=device)
    expected = run(mom.causal_conv1d, arguments)
    for name in ("weight", "bias", "initial_state", "rows", "offsets", "cu_seqlens"):
        value = arguments[name]
        arguments[name] = torch.stack((value, value), dim=-1)[..., 0]
    assert_matches(run(mom.causal_conv1d, arguments), expected, arithmetic=1e-6)
    wide = {name: arguments[name].long() for name in ("rows", "offsets", "cu_seqlens")}
    assert_matches(run(mom.causal_conv1d, {**arguments, **wide}), expected, arithmetic=1e-6)


@pytest.mark.parametrize("broadcast", [False, True])
def test_strided_gradients_of_outputs(device, broadcast):
    arguments = conv_arguments(device=device)
    leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "bias", "initial_state")]
    y, final_state = mom.causal_conv1d(**arguments)
    dense = [torch.ones_like(y), torch.ones_like(final_state)]
    seeds = [x.new_ones(()).expand_as(x) for x in dense] if broadcast else [strided(x, "transposed") for x in dense]
    wanted = torch.autograd.grad([y, final_state], leaves, dense, retain_graph=True)
    for actual, expected in zip(torch.autograd.grad([y, final_state], leaves, seeds), wanted, strict=True):
        assert torch.equal(actual, expected)


def test_is_torch_conv1d(device):
    """Without routing, padding or states it is a depthwise ``F.conv1d`` with causal padding."""
    arguments = conv_arguments(order="time", initial_state=False, device=device)
    x, weight, bias = (arguments[name].cpu() for name in ("x", "weight", "bias"))
    width, channels = weight.shape[1], x.shape[2]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = F.silu(F.conv1d(padded, weight[:, None], bias, groups=channels)).transpose(1, 2)
    y, final_state = mom.causal_conv1d(**arguments)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(final_state.cpu(), x[:, -(width - 1) :])


@pytest.mark.parametrize("parameter_dtype", [torch.float64, torch.float16])
def test_mixed_dtypes(device, parameter_dtype):
    arguments = conv_arguments(dtype=torch.bfloat16, parameter_dtype=parameter_dtype, device=device)
    arguments["weight"] = arguments["weight"].to(torch.bfloat16).to(parameter_dtype)
    arguments["initial_state"] = arguments["initial_state"].float()
    results = run(mom.causal_conv1d, arguments)
    assert results["final_state"].dtype == torch.bfloat16
    assert results["grad_weight"].dtype == results["grad_bias"].dtype == parameter_dtype
    assert results["grad_initial_state"].dtype == torch.float32
    results["grad_initial_state"] = results["grad_initial_state"].bfloat16()
    for name in ("grad_weight", "grad_bias"):  # used, and accumulated, in float32
        results[name] = results[name].to(torch.promote_types(parameter_dtype, torch.float16))
        results[name] = results[name].float() if parameter_dtype == torch.float64 else results[name]
    assert_matches(results, truth("causal_conv1d", arguments))


@pytest.mark.parametrize("name", ["base", "time order", "packed", "width 1", "wider than the sequence", "no silu"])
def test_gradcheck(name):
    sizes = {"batch": 2, "length": 5, "channels": 3, "width": 3}
    variation = {**sizes, **VARIATIONS[name]}
    variation["width"] = min(variation["width"], 7)
    arguments = conv_arguments(dtype=torch.float64, **variation)
    names = [key for key, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point()]

    def conv(*leaves):
        return mom.causal_conv1d(**{**arguments, **dict(zip(names, leaves, strict=True))})

    assert torch.autograd.gradcheck(conv, tuple(arguments[key].requires_grad_() for key in names))


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"length": 0}, {"batch": 0, "length": 0}, {"length": 0, "packed": True}, {"channels": 0}],
    ids=str,
)
def test_empty(device, sizes):
    arguments = conv_arguments(device=device, **sizes)
    results = run(mom.causal_conv1d, arguments)
    assert_matches(results, truth("causal_conv1d", arguments))
    if arguments["x"].numel() == 0:
        assert torch.equal(results["final_state"], arguments["initial_state"])


def test_all_padding(device):
    arguments = conv_arguments(device=device, packed=True)
    arguments["offsets"] = torch.zeros_like(arguments["offsets"])
    results = run(mom.causal_conv1d, arguments)
    assert not any(results[name].any() for name in ("y", "grad_x", "grad_weight", "grad_bias"))
    assert torch.equal(results["final_state"], arguments["initial_state"])
    assert torch.equal(results["grad_initial_state"], cotangent(results["final_state"]))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_of_padding_rows_do_not_matter(device, poison):
    arguments = conv_arguments(device=device, packed=True)
    real = int(arguments["offsets"][-1])
    arguments["x"].flatten(0, 1)[real:] = poison
    results = run(mom.causal_conv1d, arguments)
    assert not results["y"].flatten(0, 1)[real:].any()
    assert_matches(results, truth("causal_conv1d", arguments))


def test_gradients_only_where_asked(device):
    arguments = conv_arguments(device=device)
    everything = run(mom.causal_conv1d, arguments)
    for name in ("x", "weight", "bias", "initial_state"):
        leaf = arguments[name].detach().requires_grad_()
        outputs = mom.causal_conv1d(**{**arguments, name: leaf})
        used = [output for output in outputs if output.requires_grad]
        torch.autograd.backward(used, [cotangent(output) for output in used])
        assert torch.equal(leaf.grad, everything[f"grad_{name}"])


def test_views_are_not_copied(device):
    arguments = conv_arguments(device=device, strides="half")
    mom.causal_conv1d(**arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mom.causal_conv1d(**arguments)
    copies = {"aten::clone", "aten::copy_", "aten::_to_copy"}
    assert not copies & {event.key for event in profile.key_averages()}
