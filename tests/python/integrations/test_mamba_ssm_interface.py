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


def inner_problem(constant_B=False, constant_C=False, batch=2, d_model=4, channels=8, length=9, states=3, rank=2):
    tensors = {
        "xz": torch.randn(batch, 2 * channels, length),
        "conv1d_weight": torch.randn(channels, 1, 3),
        "conv1d_bias": torch.randn(channels),
        "x_proj_weight": torch.randn(rank + states * (2 - constant_B - constant_C), channels),
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
    return {name: value.double() for name, value in tensors.items()}


def inner_loop(t, eps=1e-6):
    """The definition of mamba_inner_fn, one line for each of its steps."""

    def norm(x, weight):  # over the second dimension
        if weight is None:
            return x
        return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.unsqueeze(-1)

    def read(name):
        matrix = rest.pop(0)
        if (bias := t.get(f"{name}_proj_bias")) is not None:
            matrix = matrix + bias.unsqueeze(-1)
        return norm(matrix, t.get(f"{name.lower()}_rms_weight"))

    x, z = t["xz"].chunk(2, dim=1)
    x = F.silu(F.conv1d(F.pad(x, (2, 0)), t["conv1d_weight"], t["conv1d_bias"], groups=x.shape[1]))
    low = torch.einsum("rc,bcl->brl", t["x_proj_weight"], x)
    rank, states = t["delta_proj_weight"].shape[1], t["A"].shape[1]
    delta = norm(torch.einsum("cr,brl->bcl", t["delta_proj_weight"], low[:, :rank]), t.get("dt_rms_weight"))
    rest = list(low[:, rank:].split(states, dim=1))
    B = t["B"] if "B" in t else read("B")
    C = t["C"] if "C" in t else read("C")
    y, _ = loop(x, delta, t["A"], B, C, t["D"], z, t["delta_bias"], delta_softplus=True)
    return torch.einsum("dc,bcl->bld", t["out_proj_weight"], y)


def assert_inner_is_the_loop(t, **options):
    t = {name: value.requires_grad_() for name, value in t.items()}
    out = mamba_inner_fn(**t, out_proj_bias=None, **options)
    expected = inner_loop(t, options.get("b_c_dt_rms_eps", 1e-6))
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, list(t.values()), grad)
    for name, got, want in zip(t, ours, torch.autograd.grad(expected, list(t.values()), grad), strict=True):
        torch.testing.assert_close(got, want, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("constant_B", [False, True])
@pytest.mark.parametrize("constant_C", [False, True])
def test_mamba_inner_fn(constant_B, constant_C):
    assert_inner_is_the_loop(inner_problem(constant_B, constant_C))


@pytest.mark.parametrize("checkpoint_lvl", [0, 1])
def test_mamba_inner_fn_with_biases_and_norms(checkpoint_lvl):
    """Every gradient, those of the norms' weights included."""
    sizes = {"B_proj_bias": 3, "C_proj_bias": 3, "b_rms_weight": 3, "c_rms_weight": 3, "dt_rms_weight": 8}
    t = inner_problem() | {name: torch.randn(size).double() for name, size in sizes.items()}
    assert_inner_is_the_loop(t, checkpoint_lvl=checkpoint_lvl, b_c_dt_rms_eps=1e-2)


def test_mamba_inner_fn_takes_the_originals_arguments_by_position():
    t = inner_problem()
    head = ("xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight", "out_proj_weight")
    weights = torch.rand(3).double(), torch.rand(3).double(), torch.rand(8).double()
    tail = (t["A"], None, None, t["D"], t["delta_bias"], None, None, True, 1, *weights, 1e-5)
    out = mamba_inner_fn(*(t[name] for name in head), None, *tail)
    names = ("b_rms_weight", "c_rms_weight", "dt_rms_weight")
    torch.testing.assert_close(out, inner_loop(t | dict(zip(names, weights, strict=True)), 1e-5))


def test_mamba_inner_fn_errors():
    t = inner_problem(constant_B=True) | {"out_proj_bias": None}
    with pytest.raises(ValueError, match=r"checkpoint_lvl must be 0 or 1, got 2"):
        mamba_inner_fn(**t, checkpoint_lvl=2)
    with pytest.raises(ValueError, match=r"for a B and C that are read off x_proj, got constant ones"):
        mamba_inner_fn(**t, b_rms_weight=torch.ones(3))


def test_errors():
    inputs = problem()
    with pytest.raises(NotImplementedError, match=r"A must be real-valued, got torch.complex128"):
        selective_scan_fn(**(inputs | {"A": inputs["A"].to(torch.complex128)}))
    with pytest.raises(ValueError, match=r"B must have shape \[batch, states, length\].*got \[10\]"):
        selective_scan_fn(**(inputs | {"B": torch.randn(10)}))
    for name, shape, message in (
        ("u", (8, 10), r"u must have shape \[batch, channels, length\], got \[8, 10\]"),
        ("A", (4, 8), r"A must have shape \[channels, states\] = \[8, states\], got \[4, 8\]"),
        ("B", (2, 10, 4), r"B must have shape \[batch, states, length\] = \[2, 4, 10\], .* got \[2, 10, 4\]"),
        ("C", (2, 3, 10), r"C must have shape \[batch, states, length\] = \[2, 4, 10\], .* got \[2, 3, 10\]"),
        ("delta", (2, 10, 8), r"delta must have shape \[batch, channels, length\] = \[2, 8, 10\], got \[2, 10, 8\]"),
        ("z", (2, 10, 8), r"z must have shape \[batch, channels, length\] = \[2, 8, 10\], got \[2, 10, 8\]"),
        ("D", (1, 8), r"D must have shape \[channels\] = \[8\], got \[1, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan_fn(**(inputs | {name: torch.randn(shape).double()}))
    with pytest.raises(ValueError, match=r"groups that divide the 8 channels, got 3"):
        selective_scan_fn(**(inputs | {"B": torch.randn(2, 3, 4, 10).double()}))


def test_one_graph_for_all_lengths():
    """Checks of shapes compare nothing that has nothing to do with each other, as lengths and states."""
    inputs = problem()
    names = ("u", "delta", "A", "B", "C")

    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan_fn(u, delta, A, B, C)

    length = torch.export.Dim("length", min=2, max=1000)
    shapes = {name: {inputs[name].dim() - 1: length} if name != "A" else None for name in names}
    program = torch.export.export(Scan(), tuple(inputs[name] for name in names), dynamic_shapes=shapes, strict=False)
    longer = [inputs[n] if n == "A" else torch.cat([inputs[n]] * 3, -1) for n in names]
    torch.testing.assert_close(program.module()(*longer), selective_scan_fn(*longer))
