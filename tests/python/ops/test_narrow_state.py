# SPDX-License-Identifier: Apache-2.0
"""The scan's state in 16 bits: what the step in float32 gives, rounded to nearest once per call."""

from __future__ import annotations

import pytest
import torch
from step_support import of_a_step, replayed_step, step
from support import Arguments, assert_bitwise_equal, assert_matches, lower, scan_arguments

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned")

NARROW = (torch.bfloat16, torch.float16)
USUAL = {"length": 1, "channels": 33, "states": 16}
VARIATIONS = {
    "base": USUAL,
    "time order": {**USUAL, "order": "time"},
    "no padding": {**USUAL, "padding": False},
    "five modalities": {**USUAL, "batch": 9, "modalities": 5},
    "bare": {**USUAL, "D": False, "z": False, "dt_bias": None, "order": "time"},
    "shared dt bias": {**USUAL, "dt_bias": "shared"},
    "no softplus": {**USUAL, "softplus": False},
    "views": {**USUAL, "strides": "half"},
    "channel-first": {**USUAL, "strides": "transposed", "length": 2},
    "no sequences": {**USUAL, "batch": 0},
    "no tokens": {**USUAL, "length": 0},
    "more sequences than threads go through at once": {**USUAL, "batch": 70, "channels": 2050},
    "a delta in float32": {**USUAL, "dt_dtype": torch.float32},
    **{f"{n} tokens": {**USUAL, "length": n} for n in (2, 3, 4, 5)},
    **{f"{n} states": {**USUAL, "states": n, "length": 2} for n in (0, 1, 4, 5, 8, 12, 17, 32, 64, 128, 129)},
}


def arguments_of(aligned: bool = False, **options) -> Arguments:
    """Of a step, with an initial state that has 16 bits. ``aligned``: B and C in whole words, as a block has them."""
    arguments = scan_arguments(**options)
    if aligned:
        arguments["B"], arguments["C"] = arguments["B"].contiguous(), arguments["C"].contiguous()
    arguments["initial_state"] = arguments["initial_state"].to(options["dtype"])
    return arguments


@pytest.mark.parametrize("aligned", [False, True], ids=["B and C unaligned", "aligned"])
@pytest.mark.parametrize("variation", VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_is_the_float32_step_rounded(device, dtype, variation, aligned):
    arguments = arguments_of(aligned, dtype=dtype, device=device, **variation)
    results = step(mom.selective_scan_step, arguments)
    wide = step(mom.selective_scan_step, arguments, torch.float32)
    assert results["state"].dtype == dtype and wide["state"].dtype == torch.float32
    assert torch.equal(results["state"], wide["state"].to(dtype))
    # On a GPU the threads of a channel add y up in another order.
    torch.testing.assert_close(results["out"], wide["out"])
    assert_matches(results, step(reference.selective_scan_step, lower(arguments, torch.float64)))


@pytest.mark.parametrize("states", [5, 16])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_padding_tokens_leave_the_state_bitwise(device, dtype, states):
    arguments = arguments_of(True, dtype=dtype, length=3, states=states, device=device)
    arguments["offsets"] = torch.zeros_like(arguments["offsets"])
    results = step(mom.selective_scan_step, arguments)
    assert torch.equal(results["state"].view(torch.int16), arguments["initial_state"].view(torch.int16))
    assert not results["out"].any()


@pytest.mark.parametrize("states", [4, 16])
def test_state_of_other_sequences_is_untouched(device, states):
    """A slice of a cache; with 4 states of one channel it begins at no 16-byte word."""
    arguments = arguments_of(True, batch=2, length=1, channels=1, states=states, dtype=torch.bfloat16, device=device)
    cache = torch.full((4, 1, states), 7.0, dtype=torch.bfloat16, device=device)
    expected = step(mom.selective_scan_step, arguments)
    cache[1:3] = arguments["initial_state"]
    with torch.no_grad():
        out = mom.selective_scan_step(state=cache[1:3], **of_a_step(arguments))
    torch.testing.assert_close(out, expected["out"])
    assert torch.equal(cache[1:3], expected["state"])
    assert bool((cache[0] == 7).all()) and bool((cache[3] == 7).all())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_several_calls_round_several_times(device, dtype):
    """Two calls of one token are not one of two: the state between them is rounded."""
    arguments = arguments_of(dtype=dtype, batch=3, length=2, channels=40, order="time", device=device)
    names = ("u", "dt", "B", "C", "z")
    state = arguments["initial_state"]
    for t in range(2):
        token = {name: arguments[name][:, t : t + 1] for name in names}
        results = step(mom.selective_scan_step, {**arguments, **token, "initial_state": state})
        state = results["state"]
    whole = step(mom.selective_scan_step, arguments)["state"]
    assert not torch.equal(state, whole)
    torch.testing.assert_close(state, whole, atol=torch.finfo(dtype).eps * 4, rtol=torch.finfo(dtype).eps * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_whole_scans_start_from_any_dtype(device, dtype):
    """And end in float32."""
    arguments = scan_arguments(dtype=torch.bfloat16, device=device)
    start = arguments["initial_state"].to(dtype)
    got = mom.selective_scan(**{**arguments, "initial_state": start})
    expected = mom.selective_scan(**{**arguments, "initial_state": start.float()})
    names = ("out", "final_state")
    assert got[1].dtype == torch.float32
    assert_bitwise_equal(dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)))


@pytest.mark.parametrize(
    ("u_dtype", "state_dtype", "allowed"),
    [
        (torch.bfloat16, torch.float16, "float32 or bfloat16"),
        (torch.float16, torch.bfloat16, "float32 or float16"),
        (torch.bfloat16, torch.float64, "float32 or bfloat16"),
        (torch.bfloat16, torch.int32, "float32 or bfloat16"),
        (torch.float32, torch.bfloat16, "float32"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(device, u_dtype, state_dtype, allowed):
    arguments = scan_arguments(dtype=u_dtype, length=1, device=device)
    name = str(state_dtype).removeprefix("torch.")
    message = rf"state is updated in place and must be contiguous {allowed}, got contiguous {name}$"
    with pytest.raises(RuntimeError, match=message):
        step(mom.selective_scan_step, arguments, state_dtype)


def test_strided_states_are_refused(device):
    arguments = arguments_of(dtype=torch.bfloat16, length=1, device=device)
    message = r"must be contiguous float32 or bfloat16, got strided bfloat16"
    with pytest.raises(RuntimeError, match=message):
        mom.selective_scan_step(state=arguments["initial_state"].mT.contiguous().mT, **of_a_step(arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1, 5])
def test_cuda_graph(length):
    """A captured step, with the state in the kernel's words and by way of a copy."""
    first, second = (arguments_of(True, batch=3, length=length, dtype=torch.bfloat16, device="cuda") for _ in "ab")
    assert_bitwise_equal(replayed_step(first, second), step(mom.selective_scan_step, second))
