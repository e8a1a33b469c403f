# SPDX-License-Identifier: Apache-2.0
"""The scan under the names and layouts of state-spaces/mamba, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixture_of_mamba import mamba_inner_fn, selective_scan_fn


def per_token(matrix, channels, length):
    """B or C in any of its forms as [batch or 1, channels, length, states]."""
    if matrix.dim() == 2:
        return matrix[None, :, None, :].expand(1, channels, length, -1)
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    return matrix.transpose(2, 3).repeat_interleave(channels // matrix.shape[1], dim=1)


def loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    batch, channels, length = u.shape
    if delta_bias is not None:
        delta = delta + delta_bias.unsqueeze(-1)
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = per_token(B, channels, length), per_token(C, channels, length)
    h = u.new_zeros(batch, channels, A.shape[1])
    outs = []
    for t in range(length):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * u[:, :, t, None] * B[:, :, t]
        outs.append((h * C[:, :, t]).sum(-1))
    y = torch.stack(outs, -1)
    if D is not None:
        y = y + D.unsqueeze(-1) * u
    return (y if z is None else y * F.silu(z)), h


def problem(form_B="variable", form_C="variable", batch=2, channels=8, length=10, states=4):
    def matrix(form):
        sizes = {
            "constant": (channels, states),
            "variable": (batch, states, length),
            "groups": (batch, 2, states, length),
        }[form]
        return torch.randn(*sizes).double()

    return {
        "u": torch.randn(batch, channels, length).double(),
        "delta": torch.rand(batch, channels, length).double() * 0.5,
        "A": -torch.rand(channels, states).double(),
        "B": matrix(form_B),
        "C": matrix(form_C),
        "D": torch.randn(channels).double(),
        "z": torch.randn(batch, channels, length).double(),
        "delta_bias": torch.rand(channels).double() * 0.5,
    }


FORMS = ["constant", "variable", "groups"]


@pytest.mark.parametrize("form_C", FORMS)
@pytest.mark.parametrize("form_B", FORMS)
@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_selective_scan_fn(form_B, form_C, absent):
    inputs = {name: t.requires_grad_() for name, t in problem(form_B, form_C).items() if name not in absent}
    out, last = selective_scan_fn(**inputs, delta_softplus=True, return_last_state=True)
    expected, expected_last = loop(**inputs, delta_softplus=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected_last)
    grads = [torch.randn_like(out), torch.randn_like(last)]
    ours = torch.autograd.grad([out, last], list(inputs.values()), grads)
    wanted = torch.autograd.grad([expected, expected_last], list(inputs.values()), grads)
    for name, got, want in zip(inputs, ours, wanted, strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def test_without_softplus_and_last_state():
    inputs = problem()
    out = selective_scan_fn(**inputs)
    torch.testing.assert_close(out, loop(**inputs)[0])


@pytest.mark.parametrize("constant_B", [False, True])
@pytest.mark.parametrize("constant_C", [False, True])
def test_mamba_inner_fn(constant_B, constant_C):
    batch, d_model, channels, length, states, rank = 2, 4, 8, 9, 3, 2
    read = rank + states * (2 - constant_B - constant_C)
    tensors = {
        "xz": torch.randn(batch, 2 * channels, length),
        "conv1d_weight": torch.randn(channels, 1, 3),
        "conv1d_bias": torch.randn(channels),
        "x_proj_weight": torch.randn(read, channels),
        "delta_proj_weight": torch.randn(channels, rank),
        "out_proj_weight": torch.randn(d_model, channels),
        "A": -torch.rand(channels, states),
        "D": torch.randn(channels),
        "delta_bias": torch.rand(channels) * 0.5,
    }
    if constant_B:
        tensors["B"] = torch.randn(channels, states)
    if constant_C:
        tensors["C"] = torch.randn(channels, states)
    t = {name: value.double().requires_grad_() for name, value in tensors.items()}
    out = mamba_inner_fn(**t, out_proj_bias=None)

    x, z = t["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (2, 0)), t["conv1d_weight"], t["conv1d_bias"], groups=channels))
    low = torch.einsum("rc,bcl->brl", t["x_proj_weight"], x)
    delta = torch.einsum("cr,brl->bcl", t["delta_proj_weight"], low[:, :rank])
    rest = list(low[:, rank:].split(states, dim=1)) if read > rank else []
    B = t["B"] if constant_B else rest.pop(0)
    C = t["C"] if constant_C else rest.pop(0)
    y, _ = loop(x, delta, t["A"], B, C, t["D"], z, t["delta_bias"], delta_softplus=True)
    expected = torch.einsum("dc,bcl->bld", t["out_proj_weight"], y)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(t.values()), grad)
    for name, got, want in zip(t, ours, torch.autograd.grad(expected, list(t.values()), grad), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


def test_errors():
    inputs = problem()
    with pytest.raises(NotImplementedError, match=r"A must be real-valued, got torch.complex128"):
        selective_scan_fn(**(inputs | {"A": inputs["A"].to(torch.complex128)}))
    with pytest.raises(ValueError, match=r"B must have shape \[batch, states, length\].*got \[10\]"):
        selective_scan_fn(**(inputs | {"B": torch.randn(10)}))
    with pytest.raises(ValueError, match=r"groups that divide the 8 channels, got 3"):
        selective_scan_fn(**(inputs | {"B": torch.randn(2, 3, 4, 10).double()}))
