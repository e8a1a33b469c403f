# SPDX-License-Identifier: Apache-2.0
"""Autocast: projections and convolution in the low precision; A, dt, biases, states and the scan in float32."""

from __future__ import annotations

import pytest
import torch
from support import (
    assert_bitwise_equal,
    block_arguments,
    conv_arguments,
    linear_arguments,
    lower,
    run,
    scan_arguments,
)

import mixture_of_mamba as mom


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


def cast(function, device, dtype):
    def under_autocast(**arguments):
        with torch.autocast(device.type, dtype=dtype):
            return function(**arguments)

    under_autocast.__name__ = function.__name__
    return under_autocast


def test_grouped_linear_runs_in_low_precision(device, dtype):
    arguments = linear_arguments(device=device)
    results = run(cast(mom.grouped_linear, device, dtype), arguments)
    assert results["y"].dtype == dtype
    assert all(value.dtype == torch.float32 for name, value in results.items() if name.startswith("grad_"))
    low = run(mom.grouped_linear, lower(arguments, dtype, device))
    assert_bitwise_equal(lower(results, dtype, device), low)


def test_causal_conv1d_runs_in_low_precision(device, dtype):
    arguments = conv_arguments(device=device)
    results = run(cast(mom.causal_conv1d, device, dtype), arguments)
    assert results["y"].dtype == results["final_state"].dtype == dtype
    assert all(value.dtype == torch.float32 for name, value in results.items() if name.startswith("grad_"))
    low = run(mom.causal_conv1d, lower(arguments, dtype, device))
    assert_bitwise_equal(lower(results, dtype, device), low)


def test_selective_scan_keeps_float32(device, dtype):
    """Nothing is cast: a float32 dt beside low-precision activations stays float32, as do A and the state."""
    arguments = scan_arguments(dtype=dtype, dt_dtype=torch.float32, device=device)
    results = run(cast(mom.selective_scan, device, dtype), arguments)
    assert results["out"].dtype == dtype
    wide = ("final_state", "grad_dt", "grad_A", "grad_D", "grad_dt_bias", "grad_initial_state")
    assert all(results[name].dtype == torch.float32 for name in wide)
    assert_bitwise_equal(results, run(mom.selective_scan, arguments))


def test_selective_scan_in_float32_stays_in_float32(device, dtype):
    arguments = scan_arguments(device=device)
    results = run(cast(mom.selective_scan, device, dtype), arguments)
    assert all(value.dtype == torch.float32 for value in results.values())
    assert_bitwise_equal(results, run(mom.selective_scan, arguments))


@pytest.mark.parametrize("several", [("in", "x", "dt", "out"), ()], ids=["per modality", "shared"])
def test_mamba_block_keeps_the_recurrence_in_float32(device, dtype, several):
    """Matrices, convolution and activations are cast; A_log, D, the bias of dt and the scan's state are not."""
    arguments = block_arguments(several=several, device=device)
    results = run(cast(mom.mamba_block, device, dtype), arguments)
    assert results["y"].dtype == results["new_conv_state"].dtype == dtype
    assert results["new_ssm_state"].dtype == torch.float32
    assert all(value.dtype == torch.float32 for name, value in results.items() if name.startswith("grad_"))
    wide = ("A_log", "D", "dt_bias", "ssm_state")
    low = {
        name: value if name in wide else lower({name: value}, dtype, device)[name] for name, value in arguments.items()
    }
    expected = run(mom.mamba_block, low)
    for name in wide:
        names = [f"grad_{name}[{m}]" for m in range(len(arguments[name]))] if name == "dt_bias" else [f"grad_{name}"]
        assert all(expected[each].dtype == torch.float32 for each in names)
    assert_bitwise_equal(results, {name: value.to(results[name].dtype) for name, value in expected.items()})


def test_a_layer_of_ops(device, dtype):
    """From float32 inputs: low precision between the projections, float32 dt, A and state, float32 gradients."""
    linear = linear_arguments(2, 37, 12, 24, device=device, padding=False)
    conv = conv_arguments(2, 37, 12, device=device, order="time", initial_state=False)
    scan = scan_arguments(2, 37, 12, device=device, order="time", initial_state=False)
    leaves = [linear["x"], *linear["weight"], conv["weight"], scan["A"], scan["dt"]]
    for leaf in leaves:
        leaf.requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        x, z = mom.grouped_linear(**linear).chunk(2, -1)
        x, _ = mom.causal_conv1d(**{**conv, "x": x})
        out, final_state = mom.selective_scan(**{**scan, "u": x, "z": z, "B": x[..., :4], "C": x[..., 4:8]})
    assert z.dtype == x.dtype == out.dtype == dtype
    assert final_state.dtype == torch.float32
    out.float().square().sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in leaves)


def test_double_is_left_alone(dtype):
    with torch.autocast("cpu", dtype=dtype):
        assert mom.grouped_linear(**linear_arguments(dtype=torch.float64)).dtype == torch.float64
        assert mom.causal_conv1d(**conv_arguments(dtype=torch.float64))[0].dtype == torch.float64
        assert mom.selective_scan(**scan_arguments(dtype=torch.float64))[0].dtype == torch.float64
        assert mom.mamba_block(**block_arguments(dtype=torch.float64))[0].dtype == torch.float64


def test_disabled_autocast_casts_nothing(device, dtype):
    with torch.autocast(device.type, dtype=dtype), torch.autocast(device.type, enabled=False):
        assert mom.grouped_linear(**linear_arguments(device=device)).dtype == torch.float32
        assert mom.causal_conv1d(**conv_arguments(device=device))[0].dtype == torch.float32
        assert mom.mamba_block(**block_arguments(device=device))[0].dtype == torch.float32


def test_permute_rows_keeps_the_dtype(device, dtype):
    index = torch.randperm(10).int().to(device)
    with torch.autocast(device.type, dtype=dtype):
        assert mom.permute_rows(torch.randn(2, 5, 3, device=device), index, index).dtype == torch.float32


def test_compiled_under_autocast(device, dtype):
    """fullgraph: the autocast rule is visible to the compiler."""
    arguments = linear_arguments(device=device)
    compiled = torch.compile(mom.grouped_linear, backend="aot_eager", fullgraph=True)
    with torch.autocast(device.type, dtype=dtype):
        assert torch.equal(compiled(**arguments), mom.grouped_linear(**arguments))


def test_a_step_of_a_layer(device, dtype):
    """State caches keep their dtypes: the convolution's low precision, the scan's float32."""
    scan = scan_arguments(2, 1, dtype=dtype, device=device)
    state = scan["initial_state"].clone()
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "rows", "offsets", "softplus")
    given = {name: scan[name] for name in names}
    with torch.no_grad(), torch.autocast(device.type, dtype=dtype):
        out = mom.selective_scan_step(state=state, **given)
    with torch.no_grad():
        expected_state = scan["initial_state"].clone()
        expected = mom.selective_scan_step(state=expected_state, **given)
    assert torch.equal(out, expected) and torch.equal(state, expected_state)
