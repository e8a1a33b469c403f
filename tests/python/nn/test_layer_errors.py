# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are named, with what was required and what came."""

from __future__ import annotations

import pytest
import torch

import mixture_of_mamba as mom


def call(**changes):
    layer = mom.MixtureOfMamba(8, 2)
    arguments = {"x": torch.randn(2, 5, 8), "modality": torch.zeros(2, 5, dtype=torch.int64)} | changes
    return layer(**arguments)


CALLS = {
    "width": ({"x": torch.randn(2, 5, 9)}, r"x must have shape \[batch, length, d_model = 8\], got \[2, 5, 9\]"),
    "dimensions": ({"x": torch.randn(5, 8)}, r"x must have shape \[batch, length, d_model = 8\], got \[5, 8\]"),
    "no ids": ({"modality": None}, r"modality must be ids \[batch, length\] or a Routing.* 2 modalities, got None"),
    "other length": (
        {"modality": torch.zeros(2, 4, dtype=torch.int64)},
        r"modality must have the batch and length of x, \[2, 5\], got \[2, 4\]",
    ),
    "other modalities": (
        {"modality": mom.Routing.from_ids(torch.zeros(2, 5, dtype=torch.int64), 3)},
        r"modality must be a Routing of 2 modalities, got 3",
    ),
    "ids of three dimensions": (
        {"modality": torch.zeros(2, 5, 1, dtype=torch.int64)},
        r"ids must have shape \[batch, length\], got \[2, 5, 1\]",
    ),
    "id out of range": ({"modality": torch.full((2, 5), 2)}, r"ids must lie in -1 .* got 2"),
    "fractional ids": ({"modality": torch.zeros(2, 5)}, r"ids must .*integer.*got float32"),
    "state of another batch": (
        {"state": mom.MixtureOfMamba(8, 2).allocate_state(3)},
        r"conv_state must have shape .*got \[3,",
    ),
    "boundaries of another dtype": ({"cu_seqlens": torch.tensor([0.0, 10.0])}, r"cu_seqlens must be int32"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case):
    changes, message = CALLS[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decouple": ("in_proj", "conv")}, r"decouple must name projections among .* got \['conv'\]"),
        ({"num_modalities": 0}, r"num_modalities must be at least 1, got 0"),
        ({"dt_init": "uniform"}, r'dt_init must be "random" or "constant", got \'uniform\''),
        ({"memory": "low"}, r'memory must be "default" or "lean", got \'low\''),
        ({"memory": None}, r'memory must be "default" or "lean", got None'),
    ],
)
def test_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        mom.MixtureOfMamba(**({"d_model": 8, "num_modalities": 2} | arguments))


def test_memory_of_the_dense_block():
    with pytest.raises(ValueError, match=r'memory must be "default" or "lean", got \'tiny\''):
        mom.Mamba(8, memory="tiny")


def test_permuting_a_tensor_of_another_batch():
    routing = mom.Routing.from_ids(torch.zeros(2, 3, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match=r"x must have shape .*\[2, 3\], got \[3, 2, 4\]"):
        routing.sort(torch.randn(3, 2, 4))


def test_steps_do_not_pretend_to_be_differentiable():
    layer = mom.MixtureOfMamba(8, 2)
    y = layer.step(torch.randn(1, 1, 8), layer.allocate_state(1), torch.zeros(1, 1, dtype=torch.int64))
    assert not y.requires_grad
