# SPDX-License-Identifier: Apache-2.0
"""The definitions themselves: the operators' signatures, any dtype and device, and a hand-made example of each."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from support import FLOATS, block_arguments, conv_arguments, linear_arguments, lower, scan_arguments

import mixture_of_mamba as mom
from mixture_of_mamba import reference


@pytest.mark.parametrize("name", reference.__all__)
def test_signatures_are_the_operators(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(mom, name))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make", [scan_arguments, conv_arguments, linear_arguments, block_arguments], ids=lambda f: f.__name__
)
def test_any_dtype_and_device(device, dtype, make):
    names = {
        scan_arguments: "selective_scan",
        conv_arguments: "causal_conv1d",
        linear_arguments: "grouped_linear",
        block_arguments: "mamba_block",
    }
    name = names[make]
    arguments = make(dtype=dtype, device=device)
    outputs = getattr(reference, name)(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert outputs[0].dtype == dtype and outputs[0].device.type == device.type
    if name in ("selective_scan", "mamba_block"):
        assert outputs[-1].dtype == torch.promote_types(dtype, torch.float32)
    precise = getattr(reference, name)(**lower(arguments, torch.float64))
    precise = precise if isinstance(precise, tuple) else (precise,)
    for output, wanted in zip(outputs, precise, strict=True):
        torch.testing.assert_close(output.cpu().double(), wanted, rtol=2e-2, atol=2e-2)


def test_routing_example():
    ids = torch.tensor([[1, 0, 0], [0, -1, 1]])
    rows, order, offsets = reference.modality_routing(ids, 2)
    assert rows.tolist() == [3, 0, 1, 2, 5, 4]
    assert order.tolist() == [1, 2, 3, 0, 5, 4]
    assert offsets.tolist() == [0, 3, 5]
    with pytest.raises(RuntimeError, match="got \\[0, 2\\]"):
        reference.modality_routing(torch.tensor([0, 2]), 2)


def test_permutation_example():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    index = torch.tensor([2, 0, 7], dtype=torch.int32)
    assert reference.permute_rows(x, index, index).flatten().tolist() == [3, 1, 0]


def test_projection_example():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    weight = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 10.0]])]
    bias = [torch.tensor([0.5]), torch.tensor([0.25])]
    y = reference.grouped_linear(x, weight, bias, torch.tensor([0, 1, 2]))
    assert y.flatten().tolist() == [1.5, 40.25, 0]


def test_convolution_example():
    """Two taps over 1 2 3 | 4 with padding in the middle of the first sequence."""
    x = torch.tensor([[[1.0], [9.0], [2.0], [3.0], [4.0]]])
    weight, bias = torch.tensor([[10.0, 1.0]]), torch.tensor([0.5])
    routing = mom.Routing.from_ids(torch.tensor([[0, -1, 0, 0, 0]]), 1)
    y, final_state = reference.causal_conv1d(
        routing.sort(x),
        weight,
        bias,
        rows=routing.rows,
        offsets=routing.offsets,
        cu_seqlens=torch.tensor([0, 4, 5]),
        initial_state=torch.tensor([[[7.0]], [[8.0]]]),
        silu=False,
    )
    assert routing.unsort(y).flatten().tolist() == [71.5, 0, 12.5, 23.5, 84.5]
    assert final_state.flatten().tolist() == [3, 4]


def test_scan_example():
    """A decay of one half per step, steps of 1, no softplus: h = 0.5 h + u, out = h (+ 3 u)."""
    u = torch.tensor([[[1.0], [2.0], [4.0]]])
    ones = torch.ones_like(u)
    half = torch.full((1, 1), -math.log(2))
    scan = {"softplus": False, "initial_state": torch.tensor([[[2.0]]])}
    out, final_state = reference.selective_scan(u, ones, half, ones, ones, **scan)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 3.0, 5.5]))
    torch.testing.assert_close(final_state.flatten(), torch.tensor([5.5]))
    out, final_state = reference.selective_scan(u, ones, half, ones, ones, torch.tensor([3.0]), reverse=True, **scan)
    torch.testing.assert_close(out.flatten(), torch.tensor([3.25 + 3, 4.5 + 6, 5 + 12]))
    torch.testing.assert_close(final_state.flatten(), torch.tensor([3.25]))
