# SPDX-License-Identifier: Apache-2.0
"""torch.vmap over the operators and over their gradients: a mapped call is a loop of calls."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support import block_arguments, conv_arguments, linear_arguments, randn, scan_arguments
from torch.func import vmap

import mixture_of_mamba as mom

MAPPED = 3


def stack_of(make, names, device, **options):
    """Arguments with ``names`` mapped over a new dimension, and the same as a list of separate calls."""
    shared = make(device=device, **options)
    mapped = {name: torch.stack([make(device=device, **options)[name] for _ in range(MAPPED)]) for name in names}
    separate = [{**shared, **{name: value[i] for name, value in mapped.items()}} for i in range(MAPPED)]
    return shared, mapped, separate


CASES = {
    "activations": (("u", "z"), {}),
    "parameters": (("A", "D", "dt_bias"), {}),
    "one of each": (("u", "A", "initial_state"), {"packed": False}),
    "B and C": (("B", "C"), {"order": "time"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("in_dim", [0, 1])
def test_selective_scan(device, case, in_dim):
    names, options = case
    shared, mapped, separate = stack_of(scan_arguments, names, device, **options)

    def scan(mapped):
        return mom.selective_scan(**{**shared, **mapped})

    moved = {name: value.movedim(0, in_dim) for name, value in mapped.items()}
    out, final_state = vmap(scan, in_dims=in_dim)(moved)
    for i, arguments in enumerate(separate):
        expected, expected_state = mom.selective_scan(**arguments)
        torch.testing.assert_close(out[i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final_state[i], expected_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("x",), ("weight", "bias"), ("x", "initial_state")], ids=str)
def test_causal_conv1d(device, names):
    shared, mapped, separate = stack_of(conv_arguments, names, device)
    y, final_state = vmap(lambda mapped: mom.causal_conv1d(**{**shared, **mapped}))(mapped)
    for i, arguments in enumerate(separate):
        expected, expected_state = mom.causal_conv1d(**arguments)
        torch.testing.assert_close(y[i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(final_state[i], expected_state)


def test_grouped_linear(device):
    arguments = linear_arguments(device=device)
    x = randn(MAPPED, *arguments["x"].shape, device=device)
    y = vmap(lambda x: mom.grouped_linear(**{**arguments, "x": x}))(x)
    for i in range(MAPPED):
        torch.testing.assert_close(y[i], mom.grouped_linear(**{**arguments, "x": x[i]}))


def test_grouped_linear_over_weights(device):
    """An ensemble: stacked weights of every modality."""
    arguments = linear_arguments(device=device)
    weight = [randn(MAPPED, 7, 12, device=device) for _ in range(2)]
    y = vmap(lambda weight: mom.grouped_linear(**{**arguments, "weight": weight}))(weight)
    for i in range(MAPPED):
        expected = mom.grouped_linear(**{**arguments, "weight": [w[i] for w in weight]})
        torch.testing.assert_close(y[i], expected)


@pytest.mark.parametrize("names", [("x",), ("conv_weight", "A_log", "D"), ("x", "ssm_state")], ids=str)
def test_mamba_block(device, names):
    shared, mapped, separate = stack_of(block_arguments, names, device)
    y, conv_state, ssm_state = vmap(lambda mapped: mom.mamba_block(**{**shared, **mapped}))(mapped)
    for i, arguments in enumerate(separate):
        for got, expected in zip((y[i], conv_state[i], ssm_state[i]), mom.mamba_block(**arguments), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_mamba_block_over_weights(device):
    """An ensemble: stacked matrices and biases of every modality, of one projection and of all."""
    arguments = block_arguments(device=device)
    for names in (
        ("x_weight",),
        ("in_weight", "in_bias", "x_weight", "dt_weight", "dt_bias", "out_weight", "out_bias"),
    ):
        stacks = {name: [randn(MAPPED, *w.shape, device=device, scale=0.3) for w in arguments[name]] for name in names}
        y, *_ = vmap(lambda stacks: mom.mamba_block(**{**arguments, **stacks}))(stacks)
        for i in range(MAPPED):
            own = {name: [each[i] for each in stack] for name, stack in stacks.items()}
            torch.testing.assert_close(y[i], mom.mamba_block(**{**arguments, **own})[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_permute_rows(device, in_dim):
    index = torch.randperm(10)
    index, inverse = index.int().to(device), index.argsort().int().to(device)
    x = randn(MAPPED, 2, 5, 4, device=device)
    out = vmap(lambda x: mom.permute_rows(x, index, inverse), in_dims=in_dim)(x.movedim(0, in_dim))
    for i in range(MAPPED):
        assert torch.equal(out[i], mom.permute_rows(x[i], index, inverse))


def test_permute_rows_by_mapped_permutations(device):
    index = torch.stack([torch.randperm(10) for _ in range(MAPPED)])
    index, inverse = index.int().to(device), index.argsort(-1).int().to(device)
    x = randn(2, 5, 4, device=device)
    out = vmap(lambda index, inverse: mom.permute_rows(x, index, inverse))(index, inverse)
    for i in range(MAPPED):
        assert torch.equal(out[i], mom.permute_rows(x, index[i], inverse[i]))


def test_modality_routing(device):
    ids = torch.randint(-1, 3, (MAPPED, 2, 9), device=device)
    rows, order, offsets = vmap(lambda ids: mom.modality_routing(ids, 3))(ids)
    for i in range(MAPPED):
        for got, expected in zip((rows[i], order[i], offsets[i]), mom.modality_routing(ids[i], 3), strict=True):
            assert torch.equal(got, expected)


BATCHED = {
    "scan": (scan_arguments, mom.selective_scan, ("u", "A", "dt_bias", "initial_state")),
    "scan, bare": (partial(scan_arguments, D=False, z=False), mom.selective_scan, ("dt", "B")),
    "conv": (conv_arguments, mom.causal_conv1d, ("x", "weight", "bias")),
}


@pytest.mark.parametrize("case", BATCHED.values(), ids=BATCHED)
def test_many_gradients_at_once(device, case):
    """``is_grads_batched`` maps the backward operators, as vectorised Jacobians do."""
    make, function, names = case
    arguments = make(device=device)
    leaves = [arguments[name].requires_grad_() for name in names]
    out, _ = function(**arguments)
    seeds = randn(MAPPED, *out.shape, device=device)
    together = torch.autograd.grad(out, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for i in range(MAPPED):
        alone = torch.autograd.grad(out, leaves, seeds[i], retain_graph=True)
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-5, atol=1e-5)


LISTS = {
    "linear": (linear_arguments, mom.grouped_linear, ("x", "weight", "bias")),
    "block": (block_arguments, mom.mamba_block, ("x", "in_weight", "dt_bias", "A_log", "conv_state")),
    "block, lean, shared": (partial(block_arguments, lean=True, several=()), mom.mamba_block, ("x_weight", "D")),
}


@pytest.mark.parametrize("case", LISTS.values(), ids=LISTS)
def test_many_gradients_of_lists_at_once(device, case):
    """Backward operators that take and return lists. ``is_grads_batched`` is torch's older vmap, which takes none."""
    make, function, names = case
    arguments = make(device=device)
    values = [arguments[name] if isinstance(arguments[name], list) else [arguments[name]] for name in names]
    leaves = [each.requires_grad_() for value in values for each in value]
    out = function(**arguments)
    out = out[0] if isinstance(out, tuple) else out

    def gradients(seed):
        return torch.autograd.grad(out, leaves, seed, retain_graph=True)

    seeds = randn(MAPPED, *out.shape, device=device)
    together = vmap(gradients)(seeds)
    for i in range(MAPPED):
        for got, expected in zip(together, gradients(seeds[i]), strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-5, atol=1e-5)


def test_vectorised_jacobian(device):
    arguments = scan_arguments(1, 3, 2, 2, device=device)

    def out(D):
        return mom.selective_scan(**{**arguments, "D": D})[0]

    jacobian = torch.autograd.functional.jacobian(out, arguments["D"], vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(out, arguments["D"]))
