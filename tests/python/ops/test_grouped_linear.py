# SPDX-License-Identifier: Apache-2.0
"""grouped_linear against its definition: output and every gradient, with host and with device offsets."""

from __future__ import annotations

import pytest
import torch
from support import FLOATS, STRIDES, assert_matches, cotangent, linear_arguments, lower, run, strided, truth
from torch.nn import functional as F

import mixture_of_mamba as mom
from mixture_of_mamba._installation import gather

pytestmark = pytest.mark.usefixtures("poisoned", "full_precision_matmul")

VARIATIONS = {
    "base": {},
    "one token": {"batch": 1, "length": 1},
    "one feature in": {"in_features": 1},
    "one feature out": {"out_features": 1},
    "aligned": {"in_features": 64, "out_features": 32},
    "odd": {"in_features": 33, "out_features": 35},
    "many rows": {"batch": 2, "length": 700, "in_features": 72, "out_features": 136},
    "many features in": {"batch": 2, "length": 150, "in_features": 1032, "out_features": 24},
    "one modality": {"modalities": 1},
    "one modality, no padding": {"modalities": 1, "padding": False},
    "four modalities, one empty": {"modalities": 4},
    "twenty modalities": {"modalities": 20},
    "more modalities than tokens": {"modalities": 9, "batch": 1, "length": 3},
    "no padding": {"padding": False},
    "no bias": {"bias": False},
}
# A GEMM with a bias may round twice; sums of products in a GEMM's order lose more than the scan's.
TOLERANCE = {"arithmetic": 1e-5, "roundings": 2}


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return TOLERANCE if dtype != torch.float64 else {}


@pytest.fixture(params=[True, False], ids=["host offsets", "device offsets"])
def host(request):
    return request.param


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_definition(device, dtype, variation, host):
    arguments = linear_arguments(dtype=dtype, device=device, host=host, **variation)
    results = run(mom.grouped_linear, arguments)
    assert results["y"].is_contiguous() and results["y"].dtype == dtype
    assert_matches(results, truth("grouped_linear", arguments), **tolerance(dtype))


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_matches_definition_in_double(variation):
    arguments = linear_arguments(dtype=torch.float64, **variation)
    assert_matches(run(mom.grouped_linear, arguments), truth("grouped_linear", arguments))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("sizes", [{}, {"length": 90, "in_features": 64, "out_features": 32}], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(device, dtype, sizes, strides, host):
    arguments = linear_arguments(batch=3, strides=strides, dtype=dtype, device=device, host=host, **sizes)
    assert_matches(run(mom.grouped_linear, arguments), truth("grouped_linear", arguments), **tolerance(dtype))


@pytest.mark.parametrize("layout", [lambda w: w.T.contiguous().T, lambda w: torch.cat([w, w], 1)[:, : w.shape[1]]])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strided_weights(device, dtype, layout, host):
    sizes = {"batch": 3, "length": 90, "in_features": 64, "out_features": 32}
    arguments = linear_arguments(dtype=dtype, device=device, host=host, **sizes)
    arguments["weight"] = [layout(w) for w in arguments["weight"]]
    assert_matches(run(mom.grouped_linear, arguments), truth("grouped_linear", arguments), **TOLERANCE)


@pytest.mark.parametrize("shape", [(74, 12), (2, 37, 12), (2, 1, 37, 12)], ids=str)
def test_any_number_of_dimensions(device, shape, host):
    arguments = linear_arguments(device=device, host=host)
    expected = mom.grouped_linear(**arguments)
    arguments["x"] = arguments["x"].reshape(shape)
    y = mom.grouped_linear(**arguments)
    assert y.shape == (*shape[:-1], 7) and torch.equal(y.flatten(0, -2), expected.flatten(0, -2))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16])
def test_mixed_dtypes(device, weight_dtype, host):
    """Weights are cast to the dtype of x; their gradients come in their own."""
    arguments = linear_arguments(dtype=torch.bfloat16, device=device, host=host)
    arguments["weight"] = [w.to(weight_dtype) for w in arguments["weight"]]
    arguments["bias"] = [b.to(weight_dtype) for b in arguments["bias"]]
    results = run(mom.grouped_linear, arguments)
    assert results["y"].dtype == torch.bfloat16
    assert all(value.dtype == weight_dtype for name, value in results.items() if name.startswith(("grad_w", "grad_b")))
    results = lower(results, torch.bfloat16, device)
    expected = truth("grouped_linear", lower(arguments, torch.bfloat16))
    assert_matches(results, expected, arithmetic=1e-5, roundings=3)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    arguments = linear_arguments(2, 4, 3, 2, modalities=3, dtype=torch.float64, bias=bias)
    weight, biases = arguments["weight"], arguments["bias"] or []

    def linear(x, *parameters):
        return mom.grouped_linear(x, parameters[:3], parameters[3:] or None, arguments["offsets"])

    assert torch.autograd.gradcheck(linear, tuple(t.requires_grad_() for t in (arguments["x"], *weight, *biases)))


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 0}, {"length": 0}, {"in_features": 0}, {"out_features": 0}, {"length": 0, "modalities": 4}],
    ids=str,
)
def test_empty(device, sizes, host):
    arguments = linear_arguments(device=device, host=host, **sizes)
    assert_matches(run(mom.grouped_linear, arguments), truth("grouped_linear", arguments), **TOLERANCE)


def test_gradients_of_empty_modalities_are_zeros(device, host):
    arguments = linear_arguments(device=device, host=host)
    arguments["offsets"] = torch.zeros_like(arguments["offsets"])
    if host:
        arguments["host_offsets"] = torch.zeros_like(arguments["host_offsets"])
    leaves = [t.requires_grad_() for t in (*arguments["weight"], *arguments["bias"], arguments["x"])]
    y = mom.grouped_linear(**arguments)
    assert not y.any()
    y.backward(cotangent(y))
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_of_padding_rows_do_not_matter(device, poison, host):
    arguments = linear_arguments(device=device, host=host, modalities=3)
    real = int(arguments["offsets"][-1])
    arguments["x"].flatten(0, 1)[real:] = poison
    assert real < 74
    assert_matches(run(mom.grouped_linear, arguments), truth("grouped_linear", arguments), **TOLERANCE)


def test_values_of_gradients_in_padding_rows_do_not_matter(device, host):
    arguments = linear_arguments(device=device, host=host)
    real = int(arguments["offsets"][-1])
    leaves = [t.requires_grad_() for t in (arguments["x"], *arguments["weight"], *arguments["bias"])]
    y = mom.grouped_linear(**arguments)
    gradient = cotangent(y)
    wanted = torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    poisoned = gradient.clone()
    poisoned.flatten(0, 1)[real:] = float("nan")
    for got, expected in zip(torch.autograd.grad(y, leaves, poisoned), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("asked", ["x", "weight", "bias"])
def test_gradients_only_where_asked(device, asked, host):
    arguments = linear_arguments(device=device, host=host)
    everything = run(mom.grouped_linear, arguments)
    asked_for = arguments[asked] if asked == "x" else arguments[asked][1]
    asked_for.requires_grad_()
    y = mom.grouped_linear(**arguments)
    y.backward(cotangent(y))
    assert torch.equal(asked_for.grad, everything["grad_x" if asked == "x" else f"grad_{asked}[1]"])
    assert all(w.grad is None for w in (arguments["weight"][0], arguments["bias"][0]))


@pytest.mark.parametrize("strides", ["transposed", "expanded"])
def test_strided_gradient_of_output(device, strides, host):
    arguments = linear_arguments(device=device, host=host)
    leaves = [t.requires_grad_() for t in (arguments["x"], *arguments["weight"], *arguments["bias"])]
    y = mom.grouped_linear(**arguments)
    gradient = strided(cotangent(y), strides)
    wanted = torch.autograd.grad(y, leaves, gradient.contiguous(), retain_graph=True)
    for got, expected in zip(torch.autograd.grad(y, leaves, gradient), wanted, strict=True):
        assert torch.equal(got, expected)


def test_is_linear_with_one_modality(device, host):
    arguments = linear_arguments(modalities=1, padding=False, device=device, host=host)
    expected = F.linear(arguments["x"], arguments["weight"][0], arguments["bias"][0])
    torch.testing.assert_close(mom.grouped_linear(**arguments), expected, rtol=1e-5, atol=1e-5)


def test_host_and_device_offsets_agree(device):
    arguments = linear_arguments(modalities=3, in_features=32, out_features=16, device=device, dtype=torch.bfloat16)
    with_host = run(mom.grouped_linear, arguments)
    without = run(mom.grouped_linear, {**arguments, "host_offsets": None})
    assert_matches(without, with_host, arithmetic=1e-5, roundings=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_many_rows_do_not_depend_on_where_boundaries_are(device, dtype):
    """All modalities in one launch; other devices have a loop on one side and something else on the other."""
    facts = gather()
    if device.type == "cuda" and not (facts.capability == (9, 0) and any("90" in a for a in facts.cuda_architectures)):
        pytest.skip("products in one launch are for compute capability 9.0")
    sizes = {"batch": 2, "length": 700, "in_features": 72, "out_features": 136, "bias": False, "modalities": 3}
    arguments = linear_arguments(device=device, dtype=dtype, **sizes)
    with_host = run(mom.grouped_linear, arguments)
    without = run(mom.grouped_linear, {**arguments, "host_offsets": None})
    assert with_host.keys() == without.keys()
    for name, value in with_host.items():
        assert torch.equal(value, without[name]), name


def test_strided_offsets(device):
    arguments = linear_arguments(device=device, host=False)
    expected = mom.grouped_linear(**arguments)
    strided = arguments["offsets"].repeat_interleave(2)[::2]
    assert torch.equal(mom.grouped_linear(**{**arguments, "offsets": strided}), expected)


def test_offsets_in_int64(device):
    arguments = linear_arguments(device=device, host=False)
    expected = mom.grouped_linear(**arguments)
    assert torch.equal(mom.grouped_linear(**{**arguments, "offsets": arguments["offsets"].long()}), expected)


def test_views_are_not_copied(device):
    arguments = linear_arguments(strides="half", device=device)
    mom.grouped_linear(**arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        mom.grouped_linear(**arguments)
    assert not {"aten::clone", "aten::_to_copy"} & {event.key for event in profile.key_averages()}
