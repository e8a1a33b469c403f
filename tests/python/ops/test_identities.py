# SPDX-License-Identifier: Apache-2.0
"""Identities of the scan and the convolution: chunks, steps, packing, padding, order, relabelling, reversal."""

from __future__ import annotations

import pytest
import torch
from support import (
    Arguments,
    Results,
    assert_bitwise_equal,
    assert_matches,
    conv_arguments,
    ids_with,
    run,
    scan_arguments,
)
from torch.nn import functional as F

import mixture_of_mamba as mom

FUNCTIONS = {mom.selective_scan: scan_arguments, mom.causal_conv1d: conv_arguments}
ACTIVATIONS = ("u", "dt", "B", "C", "z", "x")

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=FUNCTIONS, ids=lambda function: function.__name__)
def function(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


CLOSE = 1e-5


def output_name(function) -> str:
    return "out" if function is mom.selective_scan else "y"


def in_time_order(function, device, dtype=torch.float32, **options) -> Arguments:
    return FUNCTIONS[function](order="time", dtype=dtype, device=device, **options)


def rewrite(arguments: Arguments, change) -> Arguments:
    """``change`` applied to every activation."""
    return {k: change(v) if k in ACTIVATIONS and v is not None else v for k, v in arguments.items()}


def sort(arguments: Arguments, routing: mom.Routing) -> Arguments:
    """Arguments in time order -> in sorted order, with their routing."""
    return rewrite(arguments, routing.sort) | {"rows": routing.rows, "offsets": routing.offsets}


def around(function, before, after, after_state=lambda state: state):
    """``function`` between two changes, under its own name, so that gradients come in terms of the outside."""

    def changed(**arguments):
        out, final_state = function(**before(arguments))
        return after(out), after_state(final_state)

    changed.__name__ = function.__name__
    return changed


def through(routing: mom.Routing, function):
    """``function`` on sorted rows, for arguments in time order."""
    return around(function, lambda arguments: sort(arguments, routing), routing.unsort)


def assert_same(actual: Results, expected: Results) -> None:
    """Bit by bit on the CPU; a GPU may choose another kernel for another layout."""
    if next(iter(expected.values())).device.type == "cpu":
        assert_bitwise_equal(actual, expected)
    else:
        assert_matches(actual, expected, arithmetic=CLOSE, roundings=2)


@pytest.mark.parametrize("cuts", [(1,), (16,), (5, 6, 20, 36), tuple(range(1, 37))], ids=str)
def test_whole_is_chunked(device, dtype, function, cuts):
    """State out of one chunk, into the next."""
    whole = in_time_order(function, device, dtype)
    expected = function(**whole)
    outputs, state = [], whole["initial_state"]
    for begin, end in zip((0, *cuts), (*cuts, 37), strict=True):
        chunk = rewrite(whole, lambda x, begin=begin, end=end: x[:, begin:end])
        out, state = function(**{**chunk, "initial_state": state})
        outputs.append(out)
    name = output_name(function)
    chunked = {name: torch.cat(outputs, 1), "final_state": state}
    assert_matches(chunked, dict(zip((name, "final_state"), expected, strict=True)), arithmetic=CLOSE, roundings=2)


def test_gradients_flow_through_chunks(device, function):
    whole = in_time_order(function, device)

    def chunked(**arguments):
        first = rewrite(arguments, lambda x: x[:, :20])
        second = rewrite(arguments, lambda x: x[:, 20:])
        begin, state = function(**first)
        end, state = function(**{**second, "initial_state": state})
        return torch.cat((begin, end), 1), state

    chunked.__name__ = function.__name__
    assert_matches(run(chunked, whole), run(function, whole), arithmetic=CLOSE)


def test_whole_is_stepped(device, dtype, function):
    ids = ids_with(2, 37, 2, padding=True)
    routing = mom.Routing.from_ids(ids, 2, device=device)
    arguments = in_time_order(function, device, dtype)
    if function is mom.selective_scan:
        arguments["dt_bias"] = torch.randn(2, 12, device=device)
    expected = through(routing, function)(**arguments)
    state = arguments["initial_state"].clone()
    step = mom.selective_scan_step if function is mom.selective_scan else mom.causal_conv1d_step
    outputs = []
    for t in range(37):
        token = rewrite(arguments, lambda x, t=t: x[:, t : t + 1].contiguous())
        token_routing = mom.Routing.from_ids(ids[:, t : t + 1], 2, device=device)
        given = {
            k: v for k, v in sort(token, token_routing).items() if k not in ("cu_seqlens", "initial_state", "reverse")
        }
        outputs.append(token_routing.unsort(step(state=state, **given)))
    name = output_name(function)
    actual = {name: torch.cat(outputs, 1), "final_state": state}
    wanted = dict(zip((name, "final_state"), expected, strict=True))
    assert_matches(actual, wanted, arithmetic=CLOSE, roundings=2)


@pytest.mark.parametrize("reverse", [False, True])
def test_packed_is_separate(device, dtype, function, reverse):
    lengths = [5, 0, 1, 16, 15]
    options = {"reverse": True} if reverse and function is mom.selective_scan else {}
    packed = in_time_order(function, device, dtype, batch=1, packed=True, **options)
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    packed["cu_seqlens"] = boundaries.int().to(device)
    out, final_state = function(**packed)
    for s, length in enumerate(lengths):
        begin = int(boundaries[s])
        alone = rewrite(packed, lambda x, begin=begin, length=length: x[:, begin : begin + length])
        alone |= {"cu_seqlens": None, "initial_state": packed["initial_state"][s : s + 1]}
        separate, separate_state = function(**alone)
        name = output_name(function)
        actual = {name: out[:, begin : begin + length], "final_state": final_state[s : s + 1]}
        assert_matches(actual, {name: separate, "final_state": separate_state}, arithmetic=CLOSE, roundings=2)


def test_equal_lengths_are_a_packing(device, dtype, function):
    arguments = in_time_order(function, device, dtype, batch=3)
    packed = {**arguments, "cu_seqlens": torch.tensor([0, 37, 74, 111], dtype=torch.int32, device=device)}
    assert_matches(run(function, packed), run(function, arguments), arithmetic=CLOSE, roundings=2)


def test_padded_is_unpadded(device, dtype, function):
    """Tokens with id -1, wherever they stand, are as if they were not there."""
    dense = in_time_order(function, device, dtype, batch=1)
    places = torch.randperm(60)[:37].sort().values
    padded = rewrite(dense, lambda x: x.new_full((1, 60, x.shape[2]), 3.0).index_copy(1, places.to(device), x))
    ids = torch.full((1, 60), -1)
    ids[0, places] = 0
    routing = mom.Routing.from_ids(ids, 1, device=device)
    out, final_state = through(routing, function)(**padded)
    name = output_name(function)
    expected = dict(zip((name, "final_state"), function(**dense), strict=True))
    actual = {name: out[:, places.to(device)], "final_state": final_state}
    assert_matches(actual, expected, arithmetic=CLOSE, roundings=2)
    padding = torch.ones(60, dtype=torch.bool)
    padding[places] = False
    assert not out[:, padding.to(device)].any()


@pytest.mark.parametrize("packed", [False, True])
def test_sorted_is_time_order(device, dtype, function, packed):
    arguments = in_time_order(function, device, dtype, packed=packed)
    routing = mom.Routing.from_ids(ids_with(2, 37, 3), 3, device=device)
    assert_same(run(through(routing, function), arguments), run(function, arguments))


def test_one_modality_is_dense(device, dtype, function):
    arguments = in_time_order(function, device, dtype)
    routing = mom.Routing.from_ids(torch.zeros(2, 37, dtype=torch.int64), 1, device=device)
    assert torch.equal(routing.rows.cpu(), torch.arange(74, dtype=torch.int32))
    assert_same(run(through(routing, function), arguments), run(function, arguments))
    if function is mom.selective_scan:
        per_modality = run(through(routing, function), arguments | {"dt_bias": arguments["dt_bias"][None]})
        per_modality["grad_dt_bias"] = per_modality["grad_dt_bias"][0]
        assert_same(per_modality, run(function, arguments))


def test_one_modality_is_the_published_recurrence(device):
    """Written once more, after algorithm 2 of arXiv 2312.00752 with its skip and gate, on whole tensors."""
    a = in_time_order(mom.selective_scan, device, initial_state=False)
    delta = F.softplus(a["dt"] + a["dt_bias"])
    decay = torch.exp(torch.einsum("bld,dn->bldn", delta, a["A"]))
    drive = torch.einsum("bld,bln,bld->bldn", delta, a["B"], a["u"])
    h, outputs = torch.zeros_like(drive[:, 0]), []
    for t in range(37):
        h = decay[:, t] * h + drive[:, t]
        outputs.append(torch.einsum("bdn,bn->bd", h, a["C"][:, t]))
    expected = (torch.stack(outputs, 1) + a["u"] * a["D"]) * F.silu(a["z"])
    out, final_state = mom.selective_scan(**a)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final_state, h, rtol=1e-4, atol=1e-4)


def test_permuting_sequences_permutes_outputs(device, dtype, function):
    arguments = in_time_order(function, device, dtype, batch=5)
    shuffle = torch.randperm(5).to(device)
    shuffled = rewrite(arguments, lambda x: x[shuffle])
    shuffled["initial_state"] = arguments["initial_state"][shuffle]
    out, final_state = function(**arguments)
    shuffled_out, shuffled_state = function(**shuffled)
    assert torch.equal(shuffled_out, out[shuffle])
    assert torch.equal(shuffled_state, final_state[shuffle])


def test_relabelling_modalities_changes_nothing(device, dtype):
    """With their dt bias, and their weights, relabelled alike."""
    arguments = in_time_order(mom.selective_scan, device, dtype)
    arguments["dt_bias"] = torch.randn(3, 12, device=device)
    weight = [torch.randn(5, 12, device=device, dtype=dtype) for _ in range(3)]
    ids = ids_with(2, 37, 4, padding=True)
    relabel = torch.tensor([2, 0, 1])
    other_ids = torch.where(ids < 0, ids, relabel[ids])
    inverse = relabel.argsort().to(device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    other = mom.Routing.from_ids(other_ids, 3, device=device)
    results = run(through(routing, mom.selective_scan), arguments)
    relabelled = run(through(other, mom.selective_scan), arguments | {"dt_bias": arguments["dt_bias"][inverse]})
    relabelled["grad_dt_bias"] = relabelled["grad_dt_bias"][relabel.to(device)]
    assert_same(relabelled, results)

    def project(routing, weight):
        return routing.unsort(
            mom.grouped_linear(routing.sort(arguments["u"]), weight, None, routing.offsets, routing.host_offsets)
        )

    y, other_y = project(routing, weight), project(other, [weight[int(m)] for m in inverse])
    assert_matches({"": other_y}, {"": y}, roundings=2)


@pytest.mark.parametrize("packed", [False, True])
def test_reverse_is_flip_forward_flip(device, dtype, packed):
    arguments = in_time_order(mom.selective_scan, device, dtype, batch=1, packed=packed, reverse=True)

    def flip(arguments):
        flipped = rewrite(arguments, lambda x: x.flip(1)) | {"reverse": False}
        if packed:
            flipped["cu_seqlens"] = 37 - arguments["cu_seqlens"].flip(0)
            flipped["initial_state"] = arguments["initial_state"].flip(0)
        return flipped

    def unflip_sequences(final_state):
        return final_state.flip(0) if packed else final_state

    turned = around(mom.selective_scan, flip, lambda out: out.flip(1), unflip_sequences)
    assert_matches(run(turned, arguments), run(mom.selective_scan, arguments), arithmetic=CLOSE, roundings=2)


def test_zero_state_is_no_state(device, dtype, function):
    arguments = in_time_order(function, device, dtype, initial_state=False)
    zero = torch.zeros_like(function(**arguments)[1])
    results = run(function, {**arguments, "initial_state": zero})
    del results["grad_initial_state"]
    assert_bitwise_equal(results, run(function, arguments))


def test_no_gate_is_a_gate_of_one(device):
    """silu(x) = 1 at x = 1.2784645427610738."""
    arguments = in_time_order(mom.selective_scan, device, z=False)
    gated = {**arguments, "z": torch.full_like(arguments["u"], 1.2784645427610738)}
    results = run(mom.selective_scan, gated)
    del results["grad_z"]
    assert_matches(results, run(mom.selective_scan, arguments), arithmetic=CLOSE)
