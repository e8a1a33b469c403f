# SPDX-License-Identifier: Apache-2.0
"""torch.library.opcheck on every operator: schema, fake tensors, autograd registration, AOT dispatch."""

from __future__ import annotations

import pytest
import torch
from support import (
    Arguments,
    block_arguments,
    conv_arguments,
    cotangent,
    ids_with,
    linear_arguments,
    operator_arguments,
    randn,
    scan_arguments,
)

import mixture_of_mamba as mom

OPS = torch.ops.mixture_of_mamba
SMALL = {"batch": 2, "length": 18, "channels": 5}

SCAN = {
    "base": {},
    "half precision": {"dtype": torch.bfloat16},
    "dt in float": {"dtype": torch.bfloat16, "dt_dtype": torch.float32},
    "packed": {"packed": True},
    "time order, reverse": {"order": "time", "reverse": True},
    "bare": {"D": False, "z": False, "dt_bias": None, "initial_state": False, "order": "time"},
    "views": {"strides": "half"},
    "channel-first": {"strides": "transposed"},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0},
    "one token": {"batch": 1, "length": 1},
}
CONV = {
    "base": {},
    "half precision": {"dtype": torch.bfloat16},
    "packed": {"packed": True},
    "bare": {"bias": False, "initial_state": False, "order": "time"},
    "no silu": {"silu": False},
    "views": {"strides": "half"},
    "channel-first": {"strides": "transposed"},
    "width 1": {"width": 1},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0},
}
LINEAR = {
    "base": {},
    "half precision": {"dtype": torch.bfloat16},
    "no bias": {"bias": False},
    "device offsets": {"host": False},
    "views": {"strides": "half"},
    "one modality": {"modalities": 1, "padding": False},
    "no tokens": {"length": 0},
}
BLOCK = {
    "base": {},
    "half precision": {"dtype": torch.bfloat16},
    "float matrices, half x": {"dtype": torch.bfloat16, "weight_dtype": torch.float32},
    "packed": {"packed": True},
    "dense": {"several": ()},
    "x_proj and out_proj per modality": {"several": ("x", "out")},
    "bare": {
        "in_bias": False,
        "conv_bias": False,
        "dt_bias": False,
        "out_bias": False,
        "initial_state": False,
        "order": "time",
    },
    "device offsets": {"host": False},
    "views": {"strides": "half"},
    "channel-first": {"strides": "transposed"},
    "two taps": {"taps": 2},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
    "no tokens": {"length": 0},
    "no sequences": {"batch": 0},
    "one token": {"batch": 1, "length": 1},
}


def with_gradients(arguments: Arguments, wanted=lambda name: True) -> Arguments:
    """Floating arguments as leaves that require a gradient."""

    def leaf(name, value):
        if isinstance(value, list):
            return [leaf(name, element) for element in value]
        if torch.is_tensor(value) and value.is_floating_point() and wanted(name):
            return value.detach().requires_grad_()
        return value

    return {name: leaf(name, value) for name, value in arguments.items()}


def check(name: str, arguments: tuple) -> None:
    results = torch.library.opcheck(getattr(OPS, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


def checked_scan_arguments(variation: Arguments, device: torch.device) -> Arguments:
    """Two calls are compared, so every checkpoint slot must have an owner: packed sequences that fill them."""
    arguments = scan_arguments(**{**SMALL, **variation}, device=device)
    if variation.get("packed"):
        arguments["cu_seqlens"] = torch.tensor([0, 17, 36], dtype=torch.int32, device=device)
        arguments["initial_state"] = arguments["initial_state"][:2]
    return arguments


@pytest.mark.parametrize("variation", SCAN.values(), ids=SCAN)
@pytest.mark.parametrize("training", [True, False])
def test_selective_scan(device, variation, training):
    arguments = checked_scan_arguments(variation, device)
    if training:
        arguments = with_gradients(arguments)
    checkpoint = training and arguments["u"].numel() > 0
    check("selective_scan", operator_arguments("selective_scan", arguments, checkpoint=checkpoint))


@pytest.mark.parametrize("frozen", ["u", "A", "dt_bias", "initial_state"])
def test_selective_scan_with_some_gradients(device, frozen):
    arguments = with_gradients(scan_arguments(**SMALL, device=device), lambda name: name != frozen)
    check("selective_scan", operator_arguments("selective_scan", arguments, checkpoint=True))


@pytest.mark.parametrize("variation", SCAN.values(), ids=SCAN)
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
def test_selective_scan_backward(device, variation, saved):
    arguments = checked_scan_arguments(variation, device)
    out, final_state, checkpoints = OPS.selective_scan.default(
        *operator_arguments("selective_scan", arguments, checkpoint=True)
    )
    more = {"grad_out": cotangent(out), "checkpoints": checkpoints if saved else None}
    if saved:
        more["grad_final_state"] = cotangent(final_state)
    check("selective_scan_backward", operator_arguments("selective_scan_backward", arguments, **more))


@pytest.mark.parametrize("variation", SCAN.values(), ids=SCAN)
def test_selective_scan_step(device, variation):
    if variation.get("reverse") or variation.get("packed"):
        pytest.skip("a step is neither reversed nor packed")
    arguments = scan_arguments(**{**SMALL, "length": 1, **variation, "initial_state": True}, device=device)
    state = arguments["initial_state"].to(torch.float32)
    check("selective_scan_step", operator_arguments("selective_scan_step", arguments, state=state))


@pytest.mark.parametrize("length", [1, 5])
def test_selective_scan_step_with_a_state_in_16_bits(device, length):
    arguments = scan_arguments(**{**SMALL, "length": length, "dtype": torch.bfloat16}, device=device)
    state = arguments["initial_state"].bfloat16()
    check("selective_scan_step", operator_arguments("selective_scan_step", arguments, state=state))


@pytest.mark.parametrize("variation", CONV.values(), ids=CONV)
@pytest.mark.parametrize("training", [True, False])
def test_causal_conv1d(device, variation, training):
    arguments = conv_arguments(**{**SMALL, **variation}, device=device)
    if training:
        arguments = with_gradients(arguments)
    check("causal_conv1d", operator_arguments("causal_conv1d", arguments))


@pytest.mark.parametrize("variation", CONV.values(), ids=CONV)
def test_causal_conv1d_backward(device, variation):
    arguments = conv_arguments(**{**SMALL, **variation}, device=device)
    y, final_state = mom.causal_conv1d(**arguments)
    more = {"grad_y": cotangent(y), "grad_final_state": cotangent(final_state)}
    check("causal_conv1d_backward", operator_arguments("causal_conv1d_backward", arguments, **more))
    more["grad_final_state"] = None
    check("causal_conv1d_backward", operator_arguments("causal_conv1d_backward", arguments, **more))


@pytest.mark.parametrize("variation", CONV.values(), ids=CONV)
def test_causal_conv1d_step(device, variation):
    if variation.get("packed"):
        pytest.skip("a step is not packed")
    arguments = conv_arguments(**{**SMALL, "length": 1, **variation, "initial_state": True}, device=device)
    state = arguments["initial_state"]
    check("causal_conv1d_step", operator_arguments("causal_conv1d_step", arguments, state=state))


@pytest.mark.parametrize("variation", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("training", [True, False])
def test_grouped_linear(device, variation, training):
    sizes = {"batch": 2, "length": 18, "in_features": 5, "out_features": 3}
    arguments = linear_arguments(**{**sizes, **variation}, device=device)
    if training:
        arguments = with_gradients(arguments)
    check("grouped_linear", operator_arguments("grouped_linear", arguments))


@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("host", [True, False])
def test_grouped_linear_backward(device, needs, host):
    arguments = linear_arguments(2, 18, 5, 3, host=host, device=device)
    more = dict(zip(("needs_x", "needs_weight", "needs_bias"), needs, strict=True))
    grad = cotangent(mom.grouped_linear(**arguments))
    check("grouped_linear_backward", operator_arguments("grouped_linear_backward", arguments, grad=grad, **more))


def checked_block_arguments(variation: Arguments, device: torch.device, **more) -> Arguments:
    """As for the scan, every checkpoint slot has an owner; without tokens none has, so none is made."""
    if device.type == "cuda" and not variation.get("host", True):
        pytest.skip("boundaries must be on the host of a GPU")
    arguments = block_arguments(
        **{"batch": 2, "length": 18, "width": 6, "inner": 5, **variation, **more}, device=device
    )
    if variation.get("packed"):
        arguments["cu_seqlens"] = torch.tensor([0, 17, 36], dtype=torch.int32, device=device)
        arguments |= {name: arguments[name][:2] for name in ("conv_state", "ssm_state")}
    arguments["lean"] |= arguments["x"].numel() == 0
    return arguments


@pytest.mark.parametrize("variation", BLOCK.values(), ids=BLOCK)
@pytest.mark.parametrize("level", ["default", "lean", "inference"])
def test_mamba_block(device, variation, level):
    arguments = checked_block_arguments(variation, device, lean=level == "lean")
    if level != "inference":
        arguments = with_gradients(arguments)
    keep = level != "inference"
    check("mamba_block", operator_arguments("mamba_block", arguments, keep=keep))


@pytest.mark.parametrize("frozen", ["x", "in_weight", "dt_bias", "A_log", "conv_state"])
def test_mamba_block_with_some_gradients(device, frozen):
    arguments = with_gradients(checked_block_arguments({}, device), lambda name: name != frozen)
    check("mamba_block", operator_arguments("mamba_block", arguments, keep=True))


@pytest.mark.parametrize("variation", BLOCK.values(), ids=BLOCK)
@pytest.mark.parametrize("needs", [31, 0, 10], ids=["all", "nothing", "in_proj and dt_proj"])
def test_mamba_block_backward(device, variation, needs):
    arguments = checked_block_arguments(variation, device, lean=needs == 0)
    y, conv_state, ssm_state, *kept = OPS.mamba_block.default(*operator_arguments("mamba_block", arguments, keep=True))
    more = dict(zip(("xz", "x_dbl", "u", "checkpoints"), kept, strict=True))
    more |= {"grad_y": cotangent(y), "needs": needs}
    if needs:
        more |= {"grad_conv_state": cotangent(conv_state), "grad_ssm_state": cotangent(ssm_state)}
    check("mamba_block_backward", operator_arguments("mamba_block_backward", arguments, **more))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 9, 3), (18, 4), (2, 0, 3)], ids=str)
def test_permute_rows(device, shape, training):
    x = randn(*shape, device=device).requires_grad_(training)
    index = torch.randperm(x[..., 0].numel())
    check("permute_rows", (x, index.int().to(device), index.argsort().int().to(device)))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("shape", [(2, 9), (18,), (2, 0)], ids=str)
def test_modality_routing(device, shape, checked):
    ids = ids_with(1, torch.Size(shape).numel(), 3, padding=True).reshape(shape).to(device)
    check("modality_routing", (ids, 3, checked))
