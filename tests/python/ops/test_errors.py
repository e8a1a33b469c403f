# SPDX-License-Identifier: Apache-2.0
"""Every refusal names the operator, the argument, what was required, and what came."""

from __future__ import annotations

import re

import pytest
import torch
from support import block_arguments, conv_arguments, linear_arguments, operator_arguments, randn, scan_arguments

import mixture_of_mamba as mom

OPS = torch.ops.mixture_of_mamba
MAKERS = {
    "selective_scan": scan_arguments,
    "causal_conv1d": conv_arguments,
    "grouped_linear": linear_arguments,
    "mamba_block": block_arguments,
}
FLOAT = "must be float32, bfloat16, float16 or float64, got"


def integers(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=dtype)


def indices(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def refuses(name: str, message: str, call, *arguments, **named) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"mixture_of_mamba::{name}: {message}")):
        call(*arguments, **named)


# Base sizes: batch 2, length 37, 74 tokens; scan 12 channels, 4 states; conv 12 channels, width 4;
# linear 12 -> 7 features; 2 modalities. Those of the block are in test_mamba_block_errors.py.
ORDER = {
    "rows float": ({"rows": randn(74)}, "rows must be int32 or int64, got float32"),
    "rows bool": ({"rows": torch.zeros(74, dtype=torch.bool)}, "rows must be int32 or int64, got bool"),
    "rows matrix": ({"rows": integers(2, 37)}, "rows must have one dimension, got shape [2, 37]"),
    "rows short": ({"rows": integers(73)}, "rows must have batch * length = 74 elements, got 73"),
    "rows negative": ({"rows": integers(74) - 1}, "rows must lie in 0 .. 73, got -1 at position 0"),
    "rows large": ({"rows": torch.arange(1, 75)}, "rows must lie in 0 .. 73, got 74 at position 73"),
    "offsets float": ({"offsets": randn(3)}, "offsets must be int32 or int64, got float32"),
    "offsets matrix": ({"offsets": integers(1, 3)}, "offsets must have one dimension, got shape [1, 3]"),
    "offsets of nothing": ({"offsets": integers(0)}, "offsets must have num_modalities + 1 >= 2 elements, got 0"),
    "offsets of one": ({"offsets": integers(1)}, "offsets must have num_modalities + 1 >= 2 elements, got 1"),
    "offsets begin": ({"offsets": indices(1, 2, 3)}, "offsets must begin with 0, got 1"),
    "offsets order": (
        {"offsets": indices(0, 9, 8)},
        "offsets must not decrease, got 9 before 8 at position 2",
    ),
    "offsets end": ({"offsets": indices(0, 9, 75)}, "offsets must end at most at 74 (batch * length), got 75"),
    "cu_seqlens short type": (
        {"cu_seqlens": integers(3, dtype=torch.int16)},
        "cu_seqlens must be int32 or int64, got",
    ),
    "cu_seqlens matrix": ({"cu_seqlens": integers(1, 3)}, "cu_seqlens must have one dimension, got shape [1, 3]"),
    "cu_seqlens of one": ({"cu_seqlens": integers(1)}, "cu_seqlens must have sequences + 1 >= 2 elements, got 1"),
    "cu_seqlens begin": ({"cu_seqlens": indices(-1, 74)}, "cu_seqlens must begin with 0, got -1"),
    "cu_seqlens order": (
        {"cu_seqlens": indices(0, 50, 40, 74)},
        "cu_seqlens must not decrease, got 50 before 40 at position 2",
    ),
    "cu_seqlens beyond int32": (
        {"cu_seqlens": torch.tensor([0, 2**32 + 74])},
        "cu_seqlens must hold values below 2^31, got 4294967370 at position 1",
    ),
    "cu_seqlens end": ({"cu_seqlens": indices(0, 50, 73)}, "cu_seqlens must end with 74 (batch * length), got 73"),
}


@pytest.mark.parametrize(("change", "message"), ORDER.values(), ids=ORDER)
@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d", "mamba_block"])
def test_token_order(name, change, message):
    refuses(name, message, getattr(mom, name), **{**MAKERS[name](), **change})


SCAN = {
    "u int": ({"u": integers(2, 37, 12)}, f"u {FLOAT} int32"),
    "dt int": ({"dt": integers(2, 37, 12, dtype=torch.int64)}, f"dt {FLOAT} int64"),
    "B int": ({"B": integers(2, 37, 4)}, f"B {FLOAT} int32"),
    "C bool": ({"C": integers(2, 37, 4).bool()}, f"C {FLOAT} bool"),
    "z int": ({"z": integers(2, 37, 12)}, f"z {FLOAT} int32"),
    "A int": ({"A": integers(12, 4)}, f"A {FLOAT} int32"),
    "D int": ({"D": integers(12)}, f"D {FLOAT} int32"),
    "dt_bias int": ({"dt_bias": integers(2, 12)}, f"dt_bias {FLOAT} int32"),
    "initial_state int": ({"initial_state": integers(2, 12, 4)}, f"initial_state {FLOAT} int32"),
    "u matrix": ({"u": randn(37, 12)}, "u must have shape [batch, length, channels], got [37, 12]"),
    "dt shape": (
        {"dt": randn(2, 36, 12)},
        "dt must have shape [batch, length, channels] = [2, 37, 12], got [2, 36, 12]",
    ),
    "B shape": ({"B": randn(2, 37, 5)}, "B must have shape [batch, length, states] = [2, 37, 4], got [2, 37, 5]"),
    "C groups": (
        {"C": randn(2, 37, 1, 4)},
        "C must have shape [batch, length, states] = [2, 37, 4], got [2, 37, 1, 4]",
    ),
    "z shape": ({"z": randn(2, 37, 1)}, "z must have shape [batch, length, channels] = [2, 37, 12], got [2, 37, 1]"),
    "A vector": ({"A": randn(12)}, "A must have shape [channels, states], got [12]"),
    "A channels": ({"A": randn(11, 4)}, "A must have shape [channels, states] = [12, 4], got [11, 4]"),
    "D shape": ({"D": randn(12, 1)}, "D must have shape [channels] = [12], got [12, 1]"),
    "dt_bias vector": ({"dt_bias": randn(11)}, "dt_bias must have shape [channels] = [12], got [11]"),
    "dt_bias matrix": (
        {"dt_bias": randn(3, 12)},
        "dt_bias must have shape [num_modalities, channels] = [2, 12], got [3, 12]",
    ),
    "dt_bias without offsets": (
        {"offsets": None},
        "offsets must be given with a per-modality dt_bias of shape [2, 12], got None",
    ),
    "initial_state": (
        {"initial_state": randn(3, 12, 4)},
        "initial_state must have shape [sequences, channels, states] = [2, 12, 4], got [3, 12, 4]",
    ),
    "initial_state of packed sequences": (
        {"cu_seqlens": indices(0, 74)},
        "initial_state must have shape [sequences, channels, states] = [1, 12, 4], got [2, 12, 4]",
    ),
}


@pytest.mark.parametrize(("change", "message"), SCAN.values(), ids=SCAN)
def test_selective_scan(change, message):
    refuses("selective_scan", message, mom.selective_scan, **{**scan_arguments(), **change})


CONV = {
    "x int": ({"x": integers(2, 37, 12)}, f"x {FLOAT} int32"),
    "x matrix": ({"x": randn(37, 12)}, "x must have shape [batch, length, channels], got [37, 12]"),
    "weight of conv1d": (
        {"weight": randn(12, 1, 4)},
        "weight must have shape [channels, width] = [12, >= 1], got [12, 1, 4]",
    ),
    "weight channels": ({"weight": randn(11, 4)}, "weight must have shape [channels, width] = [12, >= 1], got [11, 4]"),
    "no width": ({"weight": randn(12, 0)}, "weight must have shape [channels, width] = [12, >= 1], got [12, 0]"),
    "weight int": ({"weight": integers(12, 4)}, f"weight {FLOAT} int32"),
    "bias shape": ({"bias": randn(11)}, "bias must have shape [channels] = [12], got [11]"),
    "bias int": ({"bias": integers(12)}, f"bias {FLOAT} int32"),
    "initial_state": (
        {"initial_state": randn(2, 4, 12)},
        "initial_state must have shape [sequences, width - 1, channels] = [2, 3, 12], got [2, 4, 12]",
    ),
    "initial_state int": ({"initial_state": integers(2, 3, 12)}, f"initial_state {FLOAT} int32"),
}


@pytest.mark.parametrize(("change", "message"), CONV.values(), ids=CONV)
def test_causal_conv1d(change, message):
    refuses("causal_conv1d", message, mom.causal_conv1d, **{**conv_arguments(), **change})


ROW = [0, 20, 30]
LINEAR = {
    "x int": ({"x": integers(2, 37, 12)}, f"x {FLOAT} int32"),
    "x vector": ({"x": randn(12)}, "x must have shape [..., in_features] with at least two dimensions, got [12]"),
    "no weight": ({"weight": []}, "weight must hold one matrix per modality, got an empty list"),
    "weight vector": (
        {"weight": [randn(7), randn(7)]},
        "weight[0] must have shape [out_features, in_features], got [7]",
    ),
    "weight features": (
        {"weight": [randn(7, 12), randn(7, 11)]},
        "weight[1] must have shape [out_features, in_features] = [7, 12], got [7, 11]",
    ),
    "weight int": ({"weight": [integers(7, 12), integers(7, 12)]}, f"weight[0] {FLOAT} int32"),
    "one bias": ({"bias": [randn(7)]}, "bias must be empty or hold one vector per weight (2), got 1"),
    "bias shape": ({"bias": [randn(7), randn(8)]}, "bias[1] must have shape [out_features] = [7], got [8]"),
    "bias int": ({"bias": [integers(7), integers(7)]}, f"bias[0] {FLOAT} int32"),
    "offsets of three": ({"offsets": integers(4)}, "offsets must have num_modalities + 1 = 3 elements, got [4]"),
    "offsets float": ({"offsets": randn(3)}, "offsets must be int32 or int64, got float32"),
    "host_offsets of three": (
        {"host_offsets": integers(4)},
        "host_offsets must have num_modalities + 1 = 3 elements, got [4]",
    ),
    "host_offsets float": ({"host_offsets": randn(3)}, "host_offsets must be int32 or int64, got float32"),
    "host_offsets begin": (
        {"host_offsets": torch.tensor([1, 2, 3])},
        "host_offsets must begin with 0 and end at most at 74 (the rows of x), got 1 and 3",
    ),
    "host_offsets end": (
        {"host_offsets": torch.tensor([0, 2, 75])},
        "host_offsets must begin with 0 and end at most at 74 (the rows of x), got 0 and 75",
    ),
    "host_offsets order": (
        {"host_offsets": torch.tensor([0, 9, 8])},
        "host_offsets must not decrease, got 9 before 8",
    ),
    "offsets order": (
        {"offsets": indices(0, 9, 8), "host_offsets": None},
        "offsets must not decrease, got 9 before 8",
    ),
}


@pytest.mark.parametrize(("change", "message"), LINEAR.values(), ids=LINEAR)
def test_grouped_linear(change, message):
    refuses("grouped_linear", message, mom.grouped_linear, **{**linear_arguments(), **change})


ROUTING = {
    "float": (torch.zeros(3), 2, "ids must be an integer tensor, got float32"),
    "bool": (torch.zeros(3, dtype=torch.bool), 2, "ids must be an integer tensor, got bool"),
    "no modality": (integers(3), 0, "num_modalities must be in 1 .. 1024, got 0"),
    "many modalities": (integers(3), 1025, "num_modalities must be in 1 .. 1024, got 1025"),
    "too large": (
        torch.tensor([[0, 1], [2, 0]]),
        2,
        "ids must lie in -1 .. num_modalities - 1 = 1 (-1 is padding), got 2 at flat position 2",
    ),
    "too small": (
        torch.tensor([0, -2]),
        2,
        "ids must lie in -1 .. num_modalities - 1 = 1 (-1 is padding), got -2 at flat position 1",
    ),
    "too many": (
        integers(1).expand(2**31),
        2,
        "ids must have fewer than 2^31 elements, got 2147483648",
    ),
}


@pytest.mark.parametrize(("ids", "modalities", "message"), ROUTING.values(), ids=ROUTING)
def test_modality_routing(ids, modalities, message):
    refuses("modality_routing", message, mom.modality_routing, ids, modalities)


def test_permute_rows():
    x, index = randn(2, 3, 4), integers(6)
    rule = "must be int32 with one element per row of x ([6]), got"
    message = "x must have shape [..., channels] with at least two dimensions, got [4]"
    refuses("permute_rows", message, mom.permute_rows, randn(4), index, index)
    refuses("permute_rows", f"index {rule} int64 [6]", mom.permute_rows, x, index.long(), index)
    refuses("permute_rows", f"index {rule} int32 [5]", mom.permute_rows, x, index[:5], index)
    refuses("permute_rows", f"inverse {rule} int32 [2, 3]", mom.permute_rows, x, index, index.view(2, 3))
    refuses("permute_rows", f"inverse {rule} float32 [6]", mom.permute_rows, x, index, index.float())


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d", "mamba_block"])
def test_too_many_tokens(name):
    """Sizes are refused before anything is read, so expanded tensors of 2^31 tokens cost nothing."""
    arguments = MAKERS[name](1, 1, 1, order="time", initial_state=False)
    arguments = {
        key: value.expand(1, 2**31, value.shape[2]) if key in ("u", "dt", "B", "C", "z", "x") else value
        for key, value in arguments.items()
    }
    message = "batch * length must be below 2^31 tokens, got 2147483648"
    refuses(name, message, getattr(mom, name), **arguments)


def test_steps():
    scan = scan_arguments(batch=2, length=1)
    conv = conv_arguments(batch=2, length=1)

    def scan_step(state):
        OPS.selective_scan_step.default(*operator_arguments("selective_scan_step", scan, state=state))

    def conv_step(state):
        OPS.causal_conv1d_step.default(*operator_arguments("causal_conv1d_step", conv, state=state))

    message = "state is updated in place and must be contiguous float32, got"
    refuses("selective_scan_step", f"{message} contiguous bfloat16", scan_step, randn(2, 12, 4).bfloat16())
    refuses("selective_scan_step", f"{message} strided float32", scan_step, randn(2, 4, 12).transpose(1, 2))
    message = "state must have shape [sequences, channels, states] = [2, 12, 4], got [1, 12, 4]"
    refuses("selective_scan_step", message, scan_step, randn(1, 12, 4))
    message = "state is updated in place and must be contiguous float32, got"
    refuses("causal_conv1d_step", f"{message} contiguous float16", conv_step, randn(2, 3, 12).half())
    refuses("causal_conv1d_step", f"{message} strided float32", conv_step, randn(2, 12, 3).transpose(1, 2))
    message = "state must have shape [sequences, width - 1, channels] = [2, 3, 12], got [2, 2, 12]"
    refuses("causal_conv1d_step", message, conv_step, randn(2, 2, 12))


BACKWARD = {
    "scan grad_out": (
        "selective_scan",
        {"grad_out": randn(2, 37, 11)},
        "grad_out must have shape [batch, length, channels] = [2, 37, 12], got [2, 37, 11]",
    ),
    "scan grad_out int": ("selective_scan", {"grad_out": integers(2, 37, 12)}, f"grad_out {FLOAT} int32"),
    "scan grad_final_state": (
        "selective_scan",
        {"grad_out": randn(2, 37, 12), "grad_final_state": randn(2, 12)},
        "grad_final_state must have shape [sequences, channels, states] = [2, 12, 4], got [2, 12]",
    ),
    "scan checkpoints": (
        "selective_scan",
        {"grad_out": randn(2, 37, 12), "checkpoints": randn(5, 12, 4)},
        "checkpoints must be what selective_scan returned: float32 [6, 12, 4], got float32 [5, 12, 4]",
    ),
    "scan checkpoints in half": (
        "selective_scan",
        {"grad_out": randn(2, 37, 12), "checkpoints": randn(6, 12, 4).half()},
        "checkpoints must be what selective_scan returned: float32 [6, 12, 4], got float16 [6, 12, 4]",
    ),
    "conv grad_y": (
        "causal_conv1d",
        {"grad_y": randn(2, 37)},
        "grad_y must have shape [batch, length, channels] = [2, 37, 12], got [2, 37]",
    ),
    "conv grad_y int": ("causal_conv1d", {"grad_y": integers(2, 37, 12)}, f"grad_y {FLOAT} int32"),
    "conv grad_final_state": (
        "causal_conv1d",
        {"grad_y": randn(2, 37, 12), "grad_final_state": randn(1, 3, 12)},
        "grad_final_state must have shape [sequences, width - 1, channels] = [2, 3, 12], got [1, 3, 12]",
    ),
    "linear grad": (
        "grouped_linear",
        {"grad": randn(2, 37, 12)},
        "grad must have shape [..., out_features] with 74 rows of 7, got [2, 37, 12]",
    ),
    "linear grad int": ("grouped_linear", {"grad": integers(2, 37, 7)}, f"grad {FLOAT} int32"),
}


@pytest.mark.parametrize(("name", "more", "message"), BACKWARD.values(), ids=BACKWARD)
def test_backward(name, more, message):
    needs = {"needs_x": True, "needs_weight": True, "needs_bias": True}
    given = {**MAKERS[name](), **needs, **more}
    name = f"{name}_backward"
    refuses(name, message, getattr(OPS, name).default, *operator_arguments(name, given))
