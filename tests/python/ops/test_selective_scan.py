# SPDX-License-Identifier: Apache-2.0
"""selective_scan against its definition: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from support import (
    FLOATS,
    STRIDES,
    assert_bitwise_equal,
    assert_matches,
    cotangent,
    lower,
    operator_arguments,
    run,
    scan_arguments,
    strided,
    truth,
)

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned")

# One row of the table varies one thing against the base row.
VARIATIONS = {
    "base": {},
    "one token": {"length": 1},
    "tile - 1": {"length": 15},
    "tile": {"length": 16},
    "tile + 1": {"length": 17},
    "long": {"batch": 1, "length": 300},
    "one channel": {"channels": 1},
    "vector of channels + 1": {"channels": 17},
    "many channels": {"channels": 150, "length": 20},
    "one state": {"states": 1},
    "odd states": {"states": 7},
    "usual states": {"states": 16},
    "many states": {"states": 40, "length": 20},
    "one modality": {"modalities": 1},
    "four modalities, one empty": {"modalities": 4},
    "no padding": {"padding": False},
    "time order": {"order": "time"},
    "rows without offsets": {"order": "rows", "padding": False},
    "offsets without rows": {"order": "offsets"},
    "packed": {"packed": True},
    "packed in time order": {"packed": True, "order": "time"},
    "no skip": {"D": False},
    "no gate": {"z": False},
    "no dt bias": {"dt_bias": None},
    "shared dt bias": {"dt_bias": "shared"},
    "no initial state": {"initial_state": False},
    "bare": {"D": False, "z": False, "dt_bias": None, "initial_state": False, "order": "time"},
    "no softplus": {"softplus": False},
    "reverse": {"reverse": True},
    "reverse packed": {"reverse": True, "packed": True},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
    "dt in float": {"dt_dtype": torch.float32},
}


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_definition(device, dtype, variation):
    arguments = scan_arguments(dtype=dtype, device=device, **variation)
    assert_matches(run(mom.selective_scan, arguments), truth("selective_scan", arguments))


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_matches_definition_in_double(variation):
    arguments = scan_arguments(dtype=torch.float64, **{**variation, "parameter_dtype": torch.float64})
    arguments = lower(arguments, torch.float64)
    assert_matches(run(mom.selective_scan, arguments), truth("selective_scan", arguments))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(device, dtype, strides):
    arguments = scan_arguments(batch=3, strides=strides, dtype=dtype, device=device)
    assert_matches(run(mom.selective_scan, arguments), truth("selective_scan", arguments))


def test_strided_parameters_and_indices(device):
    arguments = scan_arguments(packed=True, device=device)
    expected = run(mom.selective_scan, arguments)
    for name in ("A", "D", "dt_bias", "initial_state", "rows", "offsets", "cu_seqlens"):
        value = arguments[name]
        arguments[name] = torch.stack((value, value), dim=-1)[..., 0]
        assert not arguments[name].is_contiguous()
    assert_matches(run(mom.selective_scan, arguments), expected, arithmetic=1e-6)


def test_indices_in_int64(device):
    arguments = scan_arguments(packed=True, device=device)
    expected = run(mom.selective_scan, arguments)
    wide = {name: arguments[name].long() for name in ("rows", "offsets", "cu_seqlens")}
    assert_bitwise_equal(run(mom.selective_scan, {**arguments, **wide}), expected)


@pytest.mark.parametrize("broadcast", [False, True])
def test_strided_gradients_of_outputs(device, broadcast):
    arguments = lower(scan_arguments(device=device), torch.float32, device)
    names = [name for name, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point()]
    leaves = [arguments[name].requires_grad_() for name in names]
    out, final_state = mom.selective_scan(**arguments)
    dense = [torch.ones_like(out), torch.ones_like(final_state)]
    seeds = [x.new_ones(()).expand_as(x) for x in dense] if broadcast else [strided(x, "transposed") for x in dense]
    wanted = torch.autograd.grad([out, final_state], leaves, dense, retain_graph=True)
    got = torch.autograd.grad([out, final_state], leaves, seeds)
    for name, actual, expected in zip(names, got, wanted, strict=True):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize(
    "mixed",
    [
        {"u": torch.bfloat16, "dt": torch.float32, "B": torch.bfloat16, "C": torch.bfloat16, "z": torch.bfloat16},
        {"u": torch.float32, "dt": torch.bfloat16, "B": torch.float32, "C": torch.float16, "z": torch.bfloat16},
        {"u": torch.float16, "dt": torch.bfloat16, "B": torch.float16, "C": torch.float16, "z": torch.float16},
    ],
)
def test_mixed_dtypes(device, mixed):
    arguments = scan_arguments(device=device)
    arguments |= {name: arguments[name].to(dtype) for name, dtype in mixed.items()}
    arguments["A"] = arguments["A"].to(torch.float64)  # parameters are used in float32 whatever they come in
    arguments["D"] = arguments["D"].to(torch.float16)
    results = run(mom.selective_scan, arguments)
    assert results["out"].dtype == mixed["u"]
    assert results["final_state"].dtype == torch.float32
    for name, value in arguments.items():
        if torch.is_tensor(value) and value.is_floating_point():
            assert results[f"grad_{name}"].dtype == value.dtype, name
    expected = truth("selective_scan", arguments)
    results["grad_A"] = results["grad_A"].float()
    assert_matches(results, expected)


def test_double_anywhere_means_double_everywhere():
    arguments = scan_arguments(dtype=torch.float32)
    arguments["C"] = arguments["C"].double()
    results = run(mom.selective_scan, arguments)
    assert results["out"].dtype == torch.float32
    assert results["final_state"].dtype == torch.float64
    results = {name: value.float() if name.endswith(("_A", "_D")) else value for name, value in results.items()}
    assert_matches(results, truth("selective_scan", arguments))


GRADCHECKS = ("base", "time order", "packed", "reverse packed", "four modalities, one empty", "no softplus", "bare")


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    sizes = {"batch": 2, "length": 5, "channels": 3, "states": 2}
    arguments = lower(scan_arguments(dtype=torch.float64, **{**sizes, **VARIATIONS[name]}), torch.float64)
    names = [key for key, value in arguments.items() if torch.is_tensor(value) and value.is_floating_point()]

    def scan(*leaves):
        return mom.selective_scan(**{**arguments, **dict(zip(names, leaves, strict=True))})

    leaves = tuple(arguments[key].clone().requires_grad_() for key in names)
    assert torch.autograd.gradcheck(scan, leaves, fast_mode=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 0},
        {"length": 0},
        {"batch": 0, "length": 0},
        {"length": 0, "packed": True},
        {"channels": 0},
        {"states": 0},
    ],
    ids=str,
)
def test_empty(device, sizes):
    arguments = scan_arguments(device=device, **sizes)
    results = run(mom.selective_scan, arguments)
    assert_matches(results, truth("selective_scan", arguments))
    if arguments["u"].numel() == 0 and arguments["initial_state"].numel():
        assert torch.equal(results["final_state"], arguments["initial_state"])


def test_all_padding(device):
    arguments = scan_arguments(device=device, packed=True)
    arguments["offsets"] = torch.zeros_like(arguments["offsets"])
    results = run(mom.selective_scan, arguments)
    assert not results["out"].any()
    assert torch.equal(results["final_state"], arguments["initial_state"])
    assert all(not results[f"grad_{name}"].any() for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias"))
    assert_matches(results, truth("selective_scan", arguments))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_of_padding_rows_do_not_matter(device, poison):
    arguments = scan_arguments(device=device, packed=True)
    real = int(arguments["offsets"][-1])
    for name in ("u", "dt", "B", "C", "z"):
        arguments[name] = arguments[name].clone(memory_format=torch.contiguous_format)
        arguments[name].flatten(0, 1)[real:] = poison
    results = run(mom.selective_scan, arguments)
    assert real < arguments["u"].flatten(0, 1).shape[0]
    assert not results["out"].flatten(0, 1)[real:].any()
    assert_matches(results, truth("selective_scan", arguments))


def test_large_steps_and_strong_decay(device):
    arguments = scan_arguments(device=device)
    arguments["dt"] = arguments["dt"] * 40  # far beyond the linear part of softplus on both sides
    arguments["A"] = arguments["A"] * 30  # exp(delta * A) underflows
    arguments["A"][0] = 0  # no decay at all
    arguments["z"] = arguments["z"] * 60
    results = run(mom.selective_scan, arguments)
    assert_matches(results, truth("selective_scan", arguments))


@pytest.mark.parametrize("wanted", ["out", "final_state"])
def test_gradient_of_one_output(device, wanted):
    arguments = lower(scan_arguments(device=device), torch.float32, device)
    names = ["u", "dt", "A", "B", "initial_state"]

    def gradients(function, arguments):
        leaves = [arguments[name].detach().requires_grad_() for name in names]
        outputs = function(**{**arguments, **dict(zip(names, leaves, strict=True))})
        grads = torch.autograd.grad(outputs[wanted == "final_state"].sum(), leaves)
        return dict(zip(names, grads, strict=True))

    expected = gradients(reference.selective_scan, lower(arguments, torch.float64))
    assert_matches(gradients(mom.selective_scan, arguments), expected)


def test_gradients_only_where_asked(device):
    arguments = scan_arguments(device=device)
    everything = run(mom.selective_scan, arguments)
    for name in ("u", "dt_bias", "initial_state"):
        leaf = arguments[name].detach().requires_grad_()
        out, final_state = mom.selective_scan(**{**arguments, name: leaf})
        torch.autograd.backward([out, final_state], [cotangent(out), cotangent(final_state)])
        assert torch.equal(leaf.grad, everything[f"grad_{name}"])
        assert all(x.grad is None for key, x in arguments.items() if torch.is_tensor(x) and key != name)


@pytest.mark.parametrize("reverse", [False, True])
def test_backward_without_checkpoints_recomputes_them(device, reverse):
    arguments = scan_arguments(device=device, packed=True, reverse=reverse)
    ops = torch.ops.mixture_of_mamba
    forward = operator_arguments("selective_scan", arguments, checkpoint=True)
    out, final_state, checkpoints = ops.selective_scan.default(*forward)
    seeds = {"grad_out": cotangent(out), "grad_final_state": cotangent(final_state)}
    results = []
    for saved in (checkpoints, None):
        values = operator_arguments("selective_scan_backward", arguments, **seeds, checkpoints=saved)
        results.append(ops.selective_scan_backward.default(*values))
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_views_are_not_copied(device):
    arguments = scan_arguments(device=device, strides="half")
    mom.selective_scan(**arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mom.selective_scan(**arguments)
    copies = {"aten::clone", "aten::copy_", "aten::_to_copy"}
    assert not copies & {event.key for event in profile.key_averages()}
