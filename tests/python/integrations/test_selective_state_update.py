# SPDX-License-Identifier: Apache-2.0
"""The scan's decode step under the signature of state-spaces/mamba, against its definition in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_mamba import selective_scan_fn, selective_state_update


class Names(TorchDispatchMode):
    """Of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def plain(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """Output and new state, in float64."""
    dtype = x.dtype
    state, x, dt, A, B, C = (t.double() for t in (state, x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = F.softplus(dt)
    state = torch.exp(dt.unsqueeze(-1) * A) * state + (dt * x).unsqueeze(-1) * B.unsqueeze(1)
    y = (state * C.unsqueeze(1)).sum(-1)
    if D is not None:
        y = y + D.double() * x
    if z is not None:
        y = y * F.silu(z.double())
    return y.to(dtype), state


def problem(batch=3, channels=10, states=5, dtype=torch.float32, device="cpu"):
    def normal(*size, dtype=dtype):
        return torch.randn(*size, dtype=torch.float64).to(device, dtype)

    parameters = torch.promote_types(dtype, torch.float32)
    return {
        "state": normal(batch, channels, states, dtype=parameters),
        "x": normal(batch, channels),
        "dt": normal(batch, channels),
        "A": -normal(channels, states, dtype=parameters).exp(),
        "B": normal(batch, states),
        "C": normal(batch, states),
        "D": normal(channels, dtype=parameters),
        "z": normal(batch, channels),
        "dt_bias": normal(channels, dtype=parameters),
    }


@pytest.mark.parametrize("absent", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
@pytest.mark.parametrize("dt_softplus", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_is_the_definition(absent, dt_softplus, dtype, device):
    if dtype == torch.float64 and device.type != "cpu":
        pytest.skip("float64 exists on the CPU")
    t = {name: value for name, value in problem(dtype=dtype, device=device).items() if name not in absent}
    if not dt_softplus:
        t["dt"] = t["dt"].abs()
        t |= {"dt_bias": t["dt_bias"].abs()} if "dt_bias" in t else {}
    expected, expected_state = plain(**t, dt_softplus=dt_softplus)
    state = t["state"]
    out = selective_state_update(**t, dt_softplus=dt_softplus)
    assert out.dtype == dtype and out.shape == t["x"].shape
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state.to(state.dtype))


def test_takes_the_originals_arguments_by_position():
    t = problem()
    expected, _ = plain(**t, dt_softplus=True)
    names = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    torch.testing.assert_close(selective_state_update(*(t[name] for name in names), True), expected)


@pytest.mark.parametrize("layout", ["slice", "transposed", "bfloat16", "float64"])
def test_states_of_other_layouts_and_dtypes(layout):
    """What lies beside the state stays as it is."""
    t = problem()
    pool = torch.full((3, 2, 10, 5), 7.0)
    state = {
        "slice": pool[:, 1],
        "transposed": torch.empty(3, 5, 10).transpose(1, 2),
        "bfloat16": torch.empty(3, 10, 5, dtype=torch.bfloat16),
        "float64": torch.empty(3, 10, 5, dtype=torch.float64),
    }[layout].copy_(t["state"])
    t["state"] = state
    expected, expected_state = plain(**t, dt_softplus=True)
    out = selective_state_update(**t, dt_softplus=True)
    torch.testing.assert_close(out, expected)
    computed = torch.bfloat16 if layout == "bfloat16" else torch.float32
    torch.testing.assert_close(state.to(computed), expected_state.to(computed))
    assert (pool[:, 0] == 7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_state_in_the_dtype_of_x_is_updated_where_it_lies(dtype, device):
    """As the original keeps it: rounded once a token."""
    t = problem(dtype=dtype, device=device)
    t["state"] = state = t["state"].to(dtype)
    expected, expected_state = plain(**t, dt_softplus=True)
    wide = t["state"].float()
    selective_state_update(**{**t, "state": wide}, dt_softplus=True)
    with Names() as called:
        out = selective_state_update(**t, dt_softplus=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(state, expected_state.to(dtype))
    assert torch.equal(state, wide.to(dtype))
    assert not any("copy" in name for name in called.names), "by way of a copy"


def test_token_by_token_is_the_scan():
    t = problem()
    state = torch.zeros_like(t["state"])
    u, delta, z = torch.randn(3, 3, 10, 6)
    B, C = torch.randn(2, 3, 5, 6)
    fixed = {"D": t["D"], "dt_softplus": True, "dt_bias": t["dt_bias"]}
    outs = [
        selective_state_update(state, u[..., i], delta[..., i], t["A"], B[..., i], C[..., i], z=z[..., i], **fixed)
        for i in range(6)
    ]
    whole, last = selective_scan_fn(u, delta, t["A"], B, C, t["D"], z, t["dt_bias"], True, True)
    torch.testing.assert_close(torch.stack(outs, -1), whole)
    torch.testing.assert_close(state, last)


def test_parameters_that_require_gradients_are_read():
    t = problem()
    t["A"].requires_grad_()
    expected, _ = plain(**t)
    out = selective_state_update(**t)
    assert not out.requires_grad
    torch.testing.assert_close(out, expected.detach())


def test_errors():
    t = problem()
    with pytest.raises(ValueError, match=r"state must have 3 dimensions \(Mamba-1.*got \[3, 1, 10, 5\]"):
        selective_state_update(**(t | {"state": t["state"].unsqueeze(1)}))
    with pytest.raises(ValueError, match=r"B must have 2 dimensions.*got \[3, 1, 5\]"):
        selective_state_update(**(t | {"B": t["B"].unsqueeze(1)}))
    with pytest.raises(NotImplementedError, match=r"A must be real-valued, got torch.complex64"):
        selective_state_update(**(t | {"A": t["A"].to(torch.complex64)}))
