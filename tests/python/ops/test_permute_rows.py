# SPDX-License-Identifier: Apache-2.0
"""permute_rows against its definition."""

from __future__ import annotations

import pytest
import torch
from support import STRIDES, randn, strided

import mixture_of_mamba as mom
from mixture_of_mamba import reference

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
)


def permutation(rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    index = torch.randperm(rows)
    return index.int().to(device), index.argsort().int().to(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 37, 12), (2, 37, 1), (1, 1, 5), (74, 33), (2, 3, 4, 7), (5, 1000, 3)], ids=str)
def test_matches_definition(device, dtype, shape):
    x = (randn(*shape) * 50).to(dtype).to(device)
    index, inverse = permutation(x[..., 0].numel(), device)
    out = mom.permute_rows(x, index, inverse)
    assert out.is_contiguous() and out.dtype == dtype
    assert torch.equal(out, reference.permute_rows(x, index, inverse))


@pytest.mark.parametrize(
    "dtype",
    [torch.complex32, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.uint64],
    ids=str,
)
def test_dtypes_that_are_only_moved(device, dtype):
    x = torch.randint(0, 100, (2, 5, 16 * dtype.itemsize), dtype=torch.uint8, device=device)
    index, inverse = permutation(10, device)
    out = mom.permute_rows(x.view(dtype), index, inverse)
    assert out.dtype == dtype and torch.equal(out.view(torch.uint8), mom.permute_rows(x, index, inverse))


@pytest.mark.parametrize("strides", STRIDES)
def test_strides(device, strides):
    x = strided(randn(3, 37, 12, device=device), strides)
    index, inverse = permutation(3 * 37, device)
    assert torch.equal(mom.permute_rows(x, index, inverse), reference.permute_rows(x, index, inverse))
    stride_two = torch.stack((index, index), dim=1).flatten()[::2]
    assert torch.equal(mom.permute_rows(x, stride_two, inverse), mom.permute_rows(x, index, inverse))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0)], ids=str)
def test_empty(device, shape):
    x = randn(*shape, device=device).requires_grad_()
    index, inverse = permutation(shape[0] * shape[1], device)
    out = mom.permute_rows(x, index, inverse)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient(device, dtype):
    x = randn(2, 37, 12, dtype=dtype, device=device)
    index, inverse = permutation(74, device)
    gradients = []
    for function in (mom.permute_rows, reference.permute_rows):
        leaf = x.clone().requires_grad_()
        out = function(leaf, index, inverse)
        gradients.append(torch.autograd.grad(out, leaf, strided(out.detach(), "transposed"))[0])
    assert torch.equal(*gradients)


def test_gradcheck_twice():
    """It is linear in x, and its gradient is the same op, so it can be differentiated again."""
    x = randn(2, 4, 3, dtype=torch.float64).requires_grad_()
    index, inverse = permutation(8, torch.device("cpu"))
    assert torch.autograd.gradcheck(mom.permute_rows, (x, index, inverse))
    assert torch.autograd.gradgradcheck(mom.permute_rows, (x, index, inverse))


def test_round_trip(device):
    x = randn(3, 20, 9, device=device)
    index, inverse = permutation(60, device)
    assert torch.equal(mom.permute_rows(mom.permute_rows(x, index, inverse), inverse, index), x)


def test_rows_with_an_index_out_of_range_are_zero(device):
    x = randn(1, 4, 3, device=device)
    index = torch.tensor([1, -1, 4, 0], dtype=torch.int32, device=device)
    out = mom.permute_rows(x, index, index)
    assert torch.equal(out[0, 0], x[0, 1]) and torch.equal(out[0, 3], x[0, 0])
    assert not out[0, 1:3].any()
    assert torch.equal(out, reference.permute_rows(x, index, index))
