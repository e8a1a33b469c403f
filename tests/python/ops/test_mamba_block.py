# SPDX-License-Identifier: Apache-2.0
"""mamba_block against its definition and against the operators one by one: outputs, states and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_support import assert_as_exact, composed_block
from support import (
    FLOATS,
    PROJECTIONS,
    STRIDES,
    assert_bitwise_equal,
    assert_matches,
    block_arguments,
    cotangent,
    lower,
    run,
    strided,
    truth,
)

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned", "full_precision_matmul")

VARIATIONS = {
    "base": {},
    "one token": {"batch": 1, "length": 1},
    "one token of two sequences": {"length": 1},
    "a tile and one": {"batch": 1, "length": 17},
    "more than a tile": {"batch": 3, "length": 50},
    "odd sizes": {"width": 7, "inner": 13, "states": 5, "rank": 2},
    "aligned sizes": {"width": 32, "inner": 64, "states": 16, "rank": 8},
    "one channel": {"inner": 1},
    "one of everything": {"width": 1, "inner": 1, "states": 1, "rank": 1},
    "many states": {"states": 40, "length": 20},
    "no taps into the past": {"taps": 1},
    "two taps": {"taps": 2},
    "five taps": {"taps": 5},
    "more taps than tokens": {"taps": 9, "length": 4},
    "one modality": {"modalities": 1},
    "four modalities, one empty": {"modalities": 4},
    "more modalities than tokens": {"modalities": 9, "batch": 1, "length": 3},
    "no padding": {"padding": False},
    "time order": {"order": "time"},
    "rows without offsets": {"order": "rows", "padding": False},
    "offsets without rows": {"order": "offsets"},
    "packed": {"packed": True},
    "packed in time order": {"packed": True, "order": "time"},
    "packed, four modalities": {"packed": True, "modalities": 4},
    "no biases of projections": {"in_bias": False, "out_bias": False},
    "no bias of the convolution": {"conv_bias": False},
    "no bias of dt": {"dt_bias": False},
    "no initial state": {"initial_state": False},
    "bare": {
        "in_bias": False,
        "conv_bias": False,
        "dt_bias": False,
        "out_bias": False,
        "initial_state": False,
        "order": "time",
    },
    "dense, padded": {"several": ()},
    "dense, no padding": {"several": (), "padding": False},
    "parameters in half": {"parameter_dtype": torch.bfloat16},
    "matrices in float": {"weight_dtype": torch.float32},
}
SUBSETS = [subset for n in range(5) for subset in itertools.combinations(PROJECTIONS, n)]


def subset_name(subset: tuple[str, ...]) -> str:
    return "+".join(subset) or "none"


@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
def test_matches_definition_in_double(variation, lean):
    arguments = lower(block_arguments(dtype=torch.float64, lean=lean, **variation), torch.float64)
    results = run(mom.mamba_block, arguments)
    assert_matches(results, truth("mamba_block", arguments))
    assert_matches(results, run(composed_block, arguments))


@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_is_as_exact_as_the_operators_one_by_one(device, dtype, variation):
    arguments = block_arguments(dtype=dtype, device=device, **variation)
    results = run(mom.mamba_block, arguments)
    assert results["y"].dtype == results["new_conv_state"].dtype == dtype
    assert results["new_ssm_state"].dtype == torch.float32
    assert_as_exact(results, run(composed_block, arguments), truth("mamba_block", arguments))


@pytest.mark.parametrize("subset", SUBSETS, ids=subset_name)
def test_every_subset_of_projections_per_modality(device, subset):
    for options in ({}, {"padding": False, "packed": True}):
        arguments = block_arguments(modalities=3, several=subset, device=device, **options)
        assert [len(arguments[f"{name}_weight"]) for name in PROJECTIONS] == [
            1 + 2 * (p in subset) for p in PROJECTIONS
        ]
        expected = truth("mamba_block", arguments)
        assert_as_exact(run(mom.mamba_block, arguments), run(composed_block, arguments), expected)
        if device.type == "cpu":
            precise = lower(arguments, torch.float64)
            assert_matches(run(mom.mamba_block, precise), expected)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(device, dtype, strides):
    arguments = block_arguments(batch=3, strides=strides, dtype=dtype, device=device)
    assert_as_exact(run(mom.mamba_block, arguments), run(composed_block, arguments), truth("mamba_block", arguments))


def test_strided_parameters_and_indices(device):
    arguments = block_arguments(packed=True, device=device)
    expected = run(mom.mamba_block, arguments)
    for name, value in arguments.items():
        if isinstance(value, list):
            arguments[name] = [torch.stack((each, each), dim=-1)[..., 0] for each in value]
        elif torch.is_tensor(value) and name != "x":
            arguments[name] = torch.stack((value, value), dim=-1)[..., 0]
    assert not arguments["A_log"].is_contiguous() and not arguments["in_weight"][0].is_contiguous()
    assert_matches(run(mom.mamba_block, arguments), expected, arithmetic=1e-5)
    for name, value in arguments.items():
        if name.endswith("_weight") or name == "A_log":
            values = value if isinstance(value, list) else [value]
            turned = [each.t().contiguous().t() for each in values]
            arguments[name] = turned if isinstance(value, list) else turned[0]
    assert_matches(run(mom.mamba_block, arguments), expected, arithmetic=1e-5)


def test_indices_in_int64(device):
    arguments = block_arguments(packed=True, device=device)
    expected = run(mom.mamba_block, arguments)
    wide = {name: arguments[name].long() for name in ("rows", "offsets", "cu_seqlens")}
    narrow = {"host_offsets": arguments["host_offsets"].int()}
    assert_bitwise_equal(run(mom.mamba_block, {**arguments, **wide, **narrow}), expected)


@pytest.mark.parametrize("host", [True, False], ids=["host offsets", "none"])
def test_strided_indices(device, host):
    arguments = block_arguments(packed=True, device=device, host=host)
    expected = run(mom.mamba_block, arguments)
    for name in ("rows", "offsets", "cu_seqlens"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    assert_bitwise_equal(run(mom.mamba_block, arguments), expected)


def test_boundaries_on_the_cpu_are_host_offsets():
    arguments = block_arguments(modalities=3)
    expected = run(mom.mamba_block, arguments)
    assert_bitwise_equal(run(mom.mamba_block, {**arguments, "host_offsets": None}), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("modalities", [1, 3])
@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_boundaries_that_only_the_device_knows(dtype, lean, modalities):
    """Products of row ranges in their other forms; in bfloat16 sizes that they have a library's for."""
    device = torch.device("cuda")
    sizes = {"width": 16, "inner": 32, "rank": 8} if dtype == torch.bfloat16 else {}
    options = {"modalities": modalities, "packed": True, "lean": lean, "dtype": dtype, **sizes}
    arguments = {**block_arguments(**options, device=device), "host_offsets": None}
    results = run(mom.mamba_block, arguments)
    assert_as_exact(results, run(composed_block, arguments), truth("mamba_block", arguments))
    assert_bitwise_equal(run(mom.mamba_block, arguments), results)


@pytest.mark.cuda
def test_an_empty_modality_and_no_tokens_on_the_device():
    device = torch.device("cuda")
    arguments = {**block_arguments(modalities=3, device=device), "host_offsets": None}
    end = arguments["offsets"][-1]
    arguments["offsets"][1:3] = end  # all valid rows are of the first
    gradients = run(mom.mamba_block, arguments)
    assert not any(gradients[f"grad_in_weight[{m}]"].any() for m in (1, 2))
    none = {**block_arguments(batch=0, modalities=3, device=device), "host_offsets": None}
    assert run(mom.mamba_block, none)["y"].shape[0] == 0


@pytest.mark.parametrize("broadcast", [False, True])
def test_strided_gradients_of_outputs(device, broadcast):
    arguments = block_arguments(device=device)
    leaves = leaves_of(arguments)
    outputs = mom.mamba_block(**arguments)
    dense = [torch.ones_like(output) for output in outputs]
    seeds = [x.new_ones(()).expand_as(x) for x in dense] if broadcast else [strided(x, "transposed") for x in dense]
    wanted = torch.autograd.grad(outputs, leaves, dense, retain_graph=True)
    got = torch.autograd.grad(outputs, leaves, seeds)
    assert all(torch.equal(actual, expected) for actual, expected in zip(got, wanted, strict=True))


def leaves_of(arguments: dict) -> list[torch.Tensor]:
    """All floating arguments, which from now on require a gradient."""
    values = itertools.chain.from_iterable(v if isinstance(v, list) else [v] for v in arguments.values())
    return [value.requires_grad_() for value in values if torch.is_tensor(value) and value.is_floating_point()]


@pytest.mark.parametrize("matrices", [torch.float32, torch.float16], ids=str)
def test_mixed_dtypes(device, matrices):
    """Matrices and biases are cast to the dtype of x, states and parameters to theirs; gradients come as the inputs."""
    arguments = block_arguments(dtype=torch.bfloat16, weight_dtype=matrices, device=device)
    arguments |= {
        "A_log": arguments["A_log"].double(),
        "D": arguments["D"].half(),
        "conv_weight": arguments["conv_weight"].bfloat16(),
        "conv_state": arguments["conv_state"].float(),
        "ssm_state": arguments["ssm_state"].bfloat16(),
    }
    results = run(mom.mamba_block, arguments)
    assert results["y"].dtype == results["new_conv_state"].dtype == torch.bfloat16
    for name, value in arguments.items():
        for i, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if torch.is_tensor(each) and each.is_floating_point():
                assert results[f"grad_{name}" if i is None else f"grad_{name}[{i}]"].dtype == each.dtype, name
    same = {key: lower(arguments[key], torch.bfloat16, device) for key in arguments if "_weight" in key}
    same |= {key: lower(arguments[key], torch.bfloat16, device) for key in ("x", "in_bias", "out_bias", "conv_state")}
    rounded = {**arguments, **same}
    assert_as_exact(results, run(composed_block, arguments), truth("mamba_block", rounded))


GRADCHECKS = ("base", "packed", "four modalities, one empty", "bare", "dense, padded", "five taps", "time order")


@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, lean):
    sizes = {"batch": 2, "length": 4, "width": 2, "inner": 3, "states": 2, "rank": 2, "taps": 2}
    arguments = block_arguments(dtype=torch.float64, lean=lean, **{**sizes, **VARIATIONS[name]})
    leaves = tuple(leaves_of(arguments))

    def block(*values):
        remaining = iter(values)

        def renewed(value):
            if isinstance(value, list):
                return [renewed(each) for each in value]
            return next(remaining) if torch.is_tensor(value) and value.is_floating_point() else value

        return mom.mamba_block(**{key: renewed(value) for key, value in arguments.items()})

    assert torch.autograd.gradcheck(block, leaves, fast_mode=name not in ("base", "bare"))


EMPTY = [
    {"batch": 0},
    {"length": 0},
    {"batch": 0, "length": 0},
    {"length": 0, "packed": True},
    {"length": 0, "modalities": 4},
    {"width": 0},
    {"inner": 0},
    {"states": 0},
    {"rank": 0},
]


@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
def test_empty(device, sizes, lean):
    arguments = block_arguments(device=device, lean=lean, **sizes)
    results, expected = run(mom.mamba_block, arguments), truth("mamba_block", arguments)
    assert_as_exact(results, run(composed_block, arguments), expected)
    if arguments["x"].shape[:2].numel() == 0:
        assert torch.equal(results["new_ssm_state"], arguments["ssm_state"])
        assert torch.equal(results["new_conv_state"], arguments["conv_state"])


def test_gradients_of_modalities_without_tokens_are_zeros(device):
    """Zeros, not None: all ranks of a training run must bring the same gradients."""
    arguments = block_arguments(modalities=4, device=device)
    leaves_of(arguments)
    y, *_ = mom.mamba_block(**arguments)
    y.backward(cotangent(y))
    for name in ("in_weight", "in_bias", "x_weight", "dt_weight", "dt_bias", "out_weight", "out_bias"):
        used, empty = arguments[name][0].grad, arguments[name][3].grad
        assert used.any() and empty is not None and not empty.any(), name


def test_all_padding(device):
    arguments = block_arguments(packed=True, device=device)
    for name in ("offsets", "host_offsets"):
        arguments[name] = torch.zeros_like(arguments[name])
    results = run(mom.mamba_block, arguments)
    assert not results["y"].any()
    for name in ("conv_state", "ssm_state"):
        assert torch.equal(results[f"new_{name}"], arguments[name])
    gradients = {name for name in results if name.startswith("grad_")}
    assert all(not results[name].any() for name in gradients - {"grad_conv_state", "grad_ssm_state"})


@pytest.mark.parametrize("several", [PROJECTIONS, ()], ids=subset_name)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_of_padding_rows_do_not_matter(device, poison, several):
    """Neither those of the input nor those of the gradient of the output."""
    arguments = block_arguments(several=several, modalities=3, device=device)
    leaves = leaves_of(arguments)
    real = int(arguments["offsets"][-1])
    assert real < 74

    def results(fill):
        with torch.no_grad():
            arguments["x"].flatten(0, 1)[real:] = fill
        outputs = mom.mamba_block(**arguments)
        seeds = [cotangent(output) for output in outputs]
        seeds[0].flatten(0, 1)[real:] = fill
        return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]

    clean = results(0.0)
    assert not clean[0].flatten(0, 1)[real:].any()
    assert all(torch.equal(got, expected) for got, expected in zip(results(poison), clean, strict=True))


@pytest.mark.parametrize("wanted", range(3), ids=["y", "conv state", "ssm state"])
def test_gradient_of_one_output(device, wanted):
    arguments = block_arguments(device=device)

    def one(function):
        def call(**given):
            outputs = function(**given)
            return tuple(out if i == wanted else out.detach() for i, out in enumerate(outputs))

        call.__name__ = "mamba_block"
        return call

    expected = run(one(reference.mamba_block), lower(arguments, torch.float64))
    assert_as_exact(run(one(mom.mamba_block), arguments), run(one(composed_block), arguments), expected)
