# SPDX-License-Identifier: Apache-2.0
"""The block as a composition of the other operators, and what being as exact as it means."""

from __future__ import annotations

from typing import Any

import torch
from support import Results
from torch import Tensor

import mixture_of_mamba as mom


def composed_block(
    x: Tensor,
    in_weight: list[Tensor],
    in_bias: list[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_weight: list[Tensor],
    dt_weight: list[Tensor],
    dt_bias: list[Tensor],
    A_log: Tensor,
    D: Tensor,
    out_weight: list[Tensor],
    out_bias: list[Tensor],
    *,
    rows: Tensor | None,
    offsets: Tensor | None,
    host_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    lean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One operator after the other."""
    tokens = x.shape[0] * x.shape[1]
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=x.device) if offsets is None else offsets
    host = torch.tensor([0, tokens]) if offsets is None else host_offsets
    time: dict[str, Any] = {"rows": rows, "offsets": offsets, "cu_seqlens": cu_seqlens}

    def project(x: Tensor, weight: list[Tensor], bias: list[Tensor] | None = None) -> Tensor:
        if len(weight) > 1:
            return mom.grouped_linear(x, weight, bias or None, bounds, host)
        ends = None if host is None else host[[0, -1]]
        return mom.grouped_linear(x, weight, bias or None, bounds[:: len(bounds) - 1].contiguous(), ends)

    x, z = project(x, in_weight, in_bias).chunk(2, dim=-1)
    u, new_conv_state = mom.causal_conv1d(x, conv_weight, conv_bias, initial_state=conv_state, **time)
    rank, states = dt_weight[0].shape[1], A_log.shape[1]
    dt, B, C = project(u, x_weight).split([rank, states, states], dim=-1)
    bias = torch.stack(dt_bias) if len(dt_bias) > 1 else dt_bias[0] if dt_bias else None
    A = -torch.exp(A_log if x.dtype == torch.float64 else A_log.float())
    y, new_ssm_state = mom.selective_scan(
        u, project(dt, dt_weight), A, B, C, D, z, bias, initial_state=ssm_state, **time
    )
    return project(y, out_weight, out_bias), new_conv_state, new_ssm_state


composed_block.__name__ = "mamba_block"  # by which `run` knows the names of the outputs


def assert_as_exact(actual: Results, composed: Results, truth: Results) -> None:
    """No further from the float64 truth than the composition, but for the luck of single roundings.

    In 16 bits what lies between the steps is rounded, and a rounding's way through the later steps is not known. So the
    measure is the composition, which rounds at the same places (and the gradient of u once more).
    """
    assert actual.keys() == composed.keys() == truth.keys()
    low = [value.dtype for value in actual.values() if value.element_size() == 2]
    unit = torch.finfo(low[0] if low else torch.float32).eps
    for name, value in actual.items():
        wanted = truth[name].to("cpu", torch.float64)
        assert value.shape == wanted.shape and value.dtype == composed[name].dtype, name
        assert value.is_contiguous(), f"{name}: not contiguous, strides {value.stride()}"
        if value.numel() == 0:
            continue
        error, usual = ((each.to("cpu", torch.float64) - wanted).abs() for each in (value, composed[name]))
        norm, largest = wanted.norm().clamp(min=wanted.numel() ** 0.5), wanted.abs().max().clamp(min=1)
        luck = 0.5 + 4 / value.numel() ** 0.5  # in units of rounding: the errors of few elements do not average
        again = 2 if name.startswith("grad_out_weight") else 1  # of a y that backward makes again, by its arithmetic
        allowed = 1.25 * again * usual.norm() + luck * unit * norm
        assert error.norm() <= allowed, f"{name}: norm of the error {error.norm():.3g}, allowed {allowed:.3g}"
        allowed = (8 if low else 256) * max(1, luck) * unit * norm
        assert error.norm() <= allowed, f"{name}: norm of the error {error.norm():.3g}, allowed {allowed:.3g}"
        allowed = 2 * again * usual.max() + 4 * unit * largest
        assert error.max() <= allowed, f"{name}: largest error {error.max():.3g}, allowed {allowed:.3g}"
