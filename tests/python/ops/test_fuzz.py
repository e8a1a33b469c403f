# SPDX-License-Identifier: Apache-2.0
"""Random configurations against the float64 truth: ``pytest --fuzz 10000 tests/python/ops/test_fuzz.py``."""

from __future__ import annotations

import pytest
import torch
from block_support import assert_as_exact, composed_block
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FLOATS,
    ORDERS,
    PROJECTIONS,
    STRIDES,
    assert_bitwise_equal,
    assert_matches,
    block_arguments,
    conv_arguments,
    linear_arguments,
    lower,
    randn,
    run,
    scan_arguments,
    strided,
    truth,
)

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned", "full_precision_matmul")

SEEDS = st.integers(0, 2**32)
BATCH = st.integers(0, 4)
LENGTH = st.one_of(st.integers(0, 40), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 100]))
CHANNELS = st.one_of(st.integers(0, 40), st.sampled_from([63, 64, 65, 128]))
MODALITIES = st.integers(1, 6)

LAYOUT = {
    "batch": BATCH,
    "length": LENGTH,
    "channels": CHANNELS,
    "modalities": MODALITIES,
    "order": st.sampled_from(ORDERS),
    "padding": st.booleans(),
    "packed": st.booleans(),
    "strides": st.sampled_from(STRIDES),
    "parameter_dtype": st.sampled_from([None, None, None, torch.float32, torch.bfloat16, torch.float16]),
    "initial_state": st.booleans(),
}
SCAN = {
    "states": st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 24, 32, 64])),
    "D": st.booleans(),
    "z": st.booleans(),
    "dt_bias": st.sampled_from([None, "shared", "modality"]),
    "dt_dtype": st.sampled_from([None, None, torch.float32, torch.bfloat16, torch.float16]),
    "softplus": st.sampled_from([True, True, True, False]),
    "reverse": st.booleans(),
}
CONV = {
    "width": st.one_of(st.integers(1, 6), st.sampled_from([7, 8, 9, 16, 50])),
    "bias": st.booleans(),
    "silu": st.booleans(),
}
LINEAR = {
    "batch": BATCH,
    "length": LENGTH,
    "in_features": CHANNELS,
    "out_features": CHANNELS,
    "modalities": MODALITIES,
    "padding": st.booleans(),
    "strides": st.sampled_from(STRIDES),
    "bias": st.booleans(),
    "host": st.booleans(),
}
BLOCK = {
    **{name: strategy for name, strategy in LAYOUT.items() if name != "channels"},
    "width": CHANNELS,
    "inner": CHANNELS,
    "states": st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 32])),
    "rank": st.integers(0, 9),
    "taps": st.integers(1, 6),
    "several": st.sets(st.sampled_from(PROJECTIONS)),
    "weight_dtype": st.sampled_from([None, None, torch.float32]),
    "in_bias": st.booleans(),
    "conv_bias": st.booleans(),
    "dt_bias": st.booleans(),
    "out_bias": st.booleans(),
    "lean": st.booleans(),
}


def configurations(device: torch.device, options: dict) -> st.SearchStrategy:
    dtypes = (*FLOATS, torch.float64) if device.type == "cpu" else FLOATS
    return st.fixed_dictionaries({**options, "dtype": st.sampled_from(dtypes)})


def expands_nothing(configuration: dict) -> dict:
    """A sequence cannot be repeated where there is none."""
    if configuration["batch"] == 0 and configuration["strides"] == "expanded":
        return {**configuration, "strides": "contiguous"}
    return configuration


def matches_truth(function, arguments: dict, **tolerance) -> None:
    results = run(function, arguments)
    expected = truth(function.__name__, arguments)
    if any(value.dtype == torch.float64 for value in results.values()):  # all of it, then
        arguments = lower(arguments, torch.float64)
        results, tolerance = run(function, arguments), {}
        expected = truth(function.__name__, arguments)
    assert_matches(results, expected, **tolerance)
    assert_bitwise_equal(run(function, arguments), results)


def test_selective_scan(device, fuzz):
    @settings(**fuzz(0.4))
    @given(configuration=configurations(device, LAYOUT | SCAN), seed=SEEDS)
    def check(configuration, seed):
        torch.manual_seed(seed)
        arguments = scan_arguments(**expands_nothing(configuration), device=device)
        matches_truth(mom.selective_scan, arguments)

    check()


def test_causal_conv1d(device, fuzz):
    @settings(**fuzz(0.2))
    @given(configuration=configurations(device, LAYOUT | CONV), seed=SEEDS)
    def check(configuration, seed):
        torch.manual_seed(seed)
        arguments = conv_arguments(**expands_nothing(configuration), device=device)
        matches_truth(mom.causal_conv1d, arguments)

    check()


def test_grouped_linear(device, fuzz):
    @settings(**fuzz(0.1))
    @given(configuration=configurations(device, LINEAR), seed=SEEDS)
    def check(configuration, seed):
        torch.manual_seed(seed)
        arguments = linear_arguments(**expands_nothing(configuration), device=device)
        matches_truth(mom.grouped_linear, arguments, arithmetic=1e-5, roundings=2)

    check()


def test_mamba_block(device, fuzz):
    @settings(**fuzz(0.15))
    @given(configuration=configurations(device, BLOCK), seed=SEEDS)
    def check(configuration, seed):
        torch.manual_seed(seed)
        arguments = block_arguments(**expands_nothing(configuration), device=device)
        if configuration["dtype"] == torch.float64:  # all of it, then
            arguments = lower(arguments, torch.float64)
        results, expected = run(mom.mamba_block, arguments), truth("mamba_block", arguments)
        if configuration["dtype"] == torch.float64:
            assert_matches(results, expected)
        else:
            assert_as_exact(results, run(composed_block, arguments), expected)
        assert_bitwise_equal(run(mom.mamba_block, arguments), results)
        assert_bitwise_equal(run(mom.mamba_block, {**arguments, "lean": not arguments["lean"]}), results)

    check()


def test_routing(device, fuzz):
    """Ids of any dtype and shape, sorted; rows of any dtype and strides, moved there and back."""

    @settings(**fuzz(0.15))
    @given(
        batch=BATCH,
        length=st.one_of(LENGTH, st.sampled_from([255, 256, 257, 1024, 5000])),
        channels=st.integers(0, 20),
        modalities=st.one_of(MODALITIES, st.sampled_from([31, 32, 33, 100])),
        ids_dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
        dtype=st.sampled_from([*FLOATS, torch.int64, torch.uint8]),
        strides=st.sampled_from([strides for strides in STRIDES if strides != "expanded"]),
        hostile=st.booleans(),
        seed=SEEDS,
    )
    def check(batch, length, channels, modalities, ids_dtype, dtype, strides, hostile, seed):
        torch.manual_seed(seed)
        outside = 3 if hostile else 0
        ids = torch.randint(-1 - outside, modalities + outside, (batch, length)).to(ids_dtype)
        rows, order, offsets = mom.modality_routing(ids.to(device), modalities, checked=not hostile)
        expected = reference.modality_routing(ids, modalities, checked=False)
        for actual, wanted in zip((rows, order, offsets), expected, strict=True):
            assert torch.equal(actual.cpu(), wanted)

        x = strided((randn(batch, length, channels) * 9).to(dtype).to(device), strides)
        sorted_x = mom.permute_rows(x, order, rows)
        assert torch.equal(sorted_x, reference.permute_rows(x, order, rows))
        assert torch.equal(mom.permute_rows(sorted_x, rows, order), x)

    check()
