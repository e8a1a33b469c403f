# SPDX-License-Identifier: Apache-2.0
"""Every refusal of mamba_block names the operator, the argument, what was required, and what came."""

from __future__ import annotations

import re

import pytest
import torch
from support import block_arguments, operator_arguments, randn

import mixture_of_mamba as mom

OPS = torch.ops.mixture_of_mamba
FLOAT = "must be float32, bfloat16, float16 or float64, got"


def integers(*sizes: int) -> torch.Tensor:
    return torch.zeros(*sizes, dtype=torch.int32)


def pair(*sizes: int) -> list[torch.Tensor]:
    return [randn(*sizes), randn(*sizes)]


# Base sizes: batch 2, length 37, 74 tokens; d_model 10, d_inner 12, 4 states, rank 3, width 4; 2 modalities.
CALLS = {
    "x int": ({"x": integers(2, 37, 10)}, f"x {FLOAT} int32"),
    "x matrix": ({"x": randn(37, 10)}, "x must have shape [batch, length, d_model], got [37, 10]"),
    "conv_weight of conv1d": (
        {"conv_weight": randn(12, 1, 4)},
        "conv_weight must have shape [d_inner, width >= 1], got [12, 1, 4]",
    ),
    "no width": ({"conv_weight": randn(12, 0)}, "conv_weight must have shape [d_inner, width >= 1], got [12, 0]"),
    "conv_weight int": ({"conv_weight": integers(12, 4)}, f"conv_weight {FLOAT} int32"),
    "conv_bias shape": ({"conv_bias": randn(11)}, "conv_bias must have shape [d_inner] = [12], got [11]"),
    "conv_bias int": ({"conv_bias": integers(12)}, f"conv_bias {FLOAT} int32"),
    "A_log vector": ({"A_log": randn(12)}, "A_log must have shape [d_inner, d_state], got [12]"),
    "A_log channels": ({"A_log": randn(11, 4)}, "A_log must have shape [d_inner, d_state] = [12, 4], got [11, 4]"),
    "A_log int": ({"A_log": integers(12, 4)}, f"A_log {FLOAT} int32"),
    "D shape": ({"D": randn(12, 1)}, "D must have shape [d_inner] = [12], got [12, 1]"),
    "D int": ({"D": integers(12)}, f"D {FLOAT} int32"),
    "no dt_weight": ({"dt_weight": []}, "dt_weight must hold matrices [d_inner, dt_rank], got an empty list"),
    "dt_weight vector": ({"dt_weight": pair(12)}, "dt_weight must hold matrices [d_inner, dt_rank], got [12]"),
    "dt_weight features": (
        {"dt_weight": [randn(12, 3), randn(11, 3)]},
        "dt_weight[1] must have shape [d_inner, dt_rank] = [12, 3], got [11, 3]",
    ),
    "dt_weight int": ({"dt_weight": [integers(12, 3)] * 2}, f"dt_weight[0] {FLOAT} int32"),
    "three of two in_weight": (
        {"in_weight": [randn(24, 10)] * 3},
        "in_weight must hold 1 or num_modalities = 2 tensors, got 3",
    ),
    "no in_weight": ({"in_weight": []}, "in_weight must hold 1 or num_modalities = 2 tensors, got 0"),
    "in_weight without z": (
        {"in_weight": pair(12, 10)},
        "in_weight[0] must have shape [2 * d_inner, d_model] = [24, 10], got [12, 10]",
    ),
    "in_weight int": ({"in_weight": [randn(24, 10), integers(24, 10)]}, f"in_weight[1] {FLOAT} int32"),
    "x_weight features": (
        {"x_weight": pair(10, 12)},
        "x_weight[0] must have shape [dt_rank + 2 * d_state, d_inner] = [11, 12], got [10, 12]",
    ),
    "no x_weight": ({"x_weight": []}, "x_weight must hold 1 or num_modalities = 2 tensors, got 0"),
    "no out_weight": ({"out_weight": []}, "out_weight must hold 1 or num_modalities = 2 tensors, got 0"),
    "out_weight vector": (
        {"out_weight": [randn(12)]},
        "out_weight[0] must have shape [d_model, d_inner] = [any, 12], got [12]",
    ),
    "out_weight scalar": (
        {"out_weight": [torch.tensor(1.0)]},
        "out_weight[0] must have shape [d_model, d_inner] = [any, 12], got []",
    ),
    "out_weight features": (
        {"out_weight": [randn(10, 12), randn(9, 12)]},
        "out_weight[1] must have shape [d_model, d_inner] = [10, 12], got [9, 12]",
    ),
    "one of two in_bias": (
        {"in_bias": [randn(24)]},
        "in_bias must be empty or hold as many tensors as in_weight (2), got 1",
    ),
    "in_bias shape": ({"in_bias": [randn(24), randn(1)]}, "in_bias[1] must have shape [2 * d_inner] = [24], got [1]"),
    "in_bias int": ({"in_bias": [integers(24)] * 2}, f"in_bias[0] {FLOAT} int32"),
    "stacked dt_bias": (
        {"dt_bias": [randn(2, 12)]},
        "dt_bias must be empty or hold as many tensors as dt_weight (2), got 1",
    ),
    "dt_bias shape": ({"dt_bias": pair(3)}, "dt_bias[0] must have shape [d_inner] = [12], got [3]"),
    "out_bias shape": ({"out_bias": pair(12)}, "out_bias[0] must have shape [d_model] = [10], got [12]"),
    "several without offsets": (
        {"offsets": None, "host_offsets": None},
        "in_weight must hold 1 or num_modalities = 1 tensors, got 2",
    ),
    "host_offsets alone": ({"offsets": None}, "offsets must be given beside host_offsets, got None"),
    "host_offsets of three": (
        {"host_offsets": integers(4)},
        "host_offsets must have num_modalities + 1 = 3 elements, got [4]",
    ),
    "host_offsets matrix": (
        {"host_offsets": integers(1, 3)},
        "host_offsets must have num_modalities + 1 = 3 elements, got [1, 3]",
    ),
    "host_offsets float": ({"host_offsets": randn(3)}, "host_offsets must be int32 or int64, got float32"),
    "host_offsets begin": (
        {"host_offsets": torch.tensor([1, 2, 3])},
        "host_offsets must begin with 0 and end at most at 74 (batch * length), got 1 and 3",
    ),
    "host_offsets end": (
        {"host_offsets": torch.tensor([0, 2, 75])},
        "host_offsets must begin with 0 and end at most at 74 (batch * length), got 0 and 75",
    ),
    "host_offsets order": (
        {"host_offsets": torch.tensor([0, 9, 8])},
        "host_offsets must not decrease, got 9 before 8",
    ),
    "conv_state": (
        {"conv_state": randn(2, 4, 12)},
        "conv_state must have shape [sequences, width - 1, channels] = [2, 3, 12], got [2, 4, 12]",
    ),
    "conv_state int": ({"conv_state": integers(2, 3, 12)}, f"conv_state {FLOAT} int32"),
    "ssm_state": (
        {"ssm_state": randn(2, 4, 12)},
        "ssm_state must have shape [sequences, channels, states] = [2, 12, 4], got [2, 4, 12]",
    ),
    "ssm_state int": ({"ssm_state": integers(2, 12, 4)}, f"ssm_state {FLOAT} int32"),
    "conv_state of packed sequences": (
        {"cu_seqlens": torch.tensor([0, 74])},
        "conv_state must have shape [sequences, width - 1, channels] = [1, 3, 12], got [2, 3, 12]",
    ),
}


@pytest.mark.parametrize(("change", "message"), CALLS.values(), ids=CALLS)
def test_calls(change, message):
    with pytest.raises(RuntimeError, match=re.escape(f"mixture_of_mamba::mamba_block: {message}")):
        mom.mamba_block(**{**block_arguments(), **change})


KEPT = "xz, x_dbl, u and checkpoints must be what mamba_block returned with keep, got "
BACKWARD = {
    "grad_y": (
        {"grad_y": randn(2, 37, 12)},
        "grad_y must have shape [batch, length, d_model] = [2, 37, 10], got [2, 37, 12]",
    ),
    "grad_y int": ({"grad_y": integers(2, 37, 10)}, f"grad_y {FLOAT} int32"),
    "grad_conv_state": (
        {"grad_conv_state": randn(2, 12)},
        "grad_conv_state must have shape [sequences, width - 1, d_inner] = [2, 3, 12], got [2, 12]",
    ),
    "grad_conv_state int": ({"grad_conv_state": integers(2, 3, 12)}, f"grad_conv_state {FLOAT} int32"),
    "grad_ssm_state": (
        {"grad_ssm_state": randn(1, 12, 4)},
        "grad_ssm_state must have shape [sequences, d_inner, d_state] = [2, 12, 4], got [1, 12, 4]",
    ),
    "grad_ssm_state int": ({"grad_ssm_state": integers(2, 12, 4)}, f"grad_ssm_state {FLOAT} int32"),
    "not kept": (
        {"xz": randn(0), "x_dbl": randn(0), "u": randn(0), "checkpoints": randn(0)},
        f"{KEPT}[0], [0], [0] and [0]",
    ),
    "xz of another shape": ({"xz": randn(24, 74)}, f"{KEPT}[24, 74], [74, 11], [74, 12] and [6, 12, 4]"),
    "xz of another dtype": ({"xz": randn(74, 24).half()}, KEPT),
    "xz with other strides": ({"xz": randn(24, 74).t()}, KEPT),
    "x_dbl": ({"x_dbl": randn(74, 12)}, f"{KEPT}[74, 24], [74, 12], [74, 12] and [6, 12, 4]"),
    "checkpoints": ({"checkpoints": randn(5, 12, 4)}, f"{KEPT}[74, 24], [74, 11], [74, 12] and [5, 12, 4]"),
    "checkpoints in half": ({"checkpoints": randn(6, 12, 4).half()}, KEPT),
    "checkpoints alone": ({"u": randn(0)}, f"{KEPT}[74, 24], [74, 11], [0] and [6, 12, 4]"),
}


@pytest.mark.parametrize(("change", "message"), BACKWARD.values(), ids=BACKWARD)
def test_backward(change, message):
    arguments = block_arguments()
    *_, xz, x_dbl, u, checkpoints = OPS.mamba_block.default(*operator_arguments("mamba_block", arguments, keep=True))
    kept = {"xz": xz, "x_dbl": x_dbl, "u": u, "checkpoints": checkpoints}
    given = {**arguments, **kept, "grad_y": randn(2, 37, 10), "needs": 31, **change}
    with pytest.raises(RuntimeError, match=re.escape(f"mixture_of_mamba::mamba_block_backward: {message}")):
        OPS.mamba_block_backward.default(*operator_arguments("mamba_block_backward", given))


def test_gradients_of_a_call_that_keeps_nothing():
    """Autograd keeps what it needs, whatever the call said."""
    arguments = block_arguments()
    arguments["x"].requires_grad_()
    (expected,) = torch.autograd.grad(mom.mamba_block(**arguments)[0].sum(), arguments["x"])
    y, *_ = OPS.mamba_block.default(*operator_arguments("mamba_block", arguments, keep=False))
    assert torch.equal(torch.autograd.grad(y.sum(), arguments["x"])[0], expected)
