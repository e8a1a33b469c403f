# SPDX-License-Identifier: Apache-2.0
"""A Mixture-of-Mamba layer written out: every token goes through its modality's weights, one sequence at a time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mixture_of_mamba as mom
from mixture_of_mamba import reference
from mixture_of_mamba.nn.mixing import block_parameters


def random_ids(batch: int, length: int, modalities: int, *, padding: bool = True) -> Tensor:
    return torch.randint(-1 if padding else 0, modalities, (batch, length))


def make_layer(d_model: int = 16, modalities: int = 3, decouple: tuple[str, ...] | None = None, **options: Any) -> Any:
    """A layer in float64 whose parameters, the shared ones too, are random: nothing cancels by accident."""
    if decouple is not None:
        options["decouple"] = decouple
    layer = mom.MixtureOfMamba(d_model, modalities, **options).double()
    with torch.no_grad():
        for name in layer.shared_expert:
            getattr(layer, name).shared.weight.normal_(std=0.2)
        layer.A_log.add_(torch.rand_like(layer.A_log) * 0.3)
        layer.D.add_(torch.randn_like(layer.D) * 0.3)
    return layer


class Calls(TorchDispatchMode):
    """Counts the library's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "mixture_of_mamba":
            self.counts[function._opname] += 1
        return function(*args, **(kwargs or {}))


def is_one_operator(layer: Any, x: Tensor, routing: mom.Routing | None) -> bool:
    return block_parameters(layer, x, routing) is not None


def _project(projection: nn.Module, x: Tensor, modality: int) -> Tensor:
    if not isinstance(projection, nn.ModuleList):
        return projection(x)
    return projection[modality](x) + (0 if projection.shared is None else projection.shared(x))


def _rms_norm(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def _scan_by_tokens(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One sequence ``[length, channels]`` with an A for every token, ``[length, channels, states]``."""
    h, y = torch.zeros_like(A[0]), []
    for t in range(len(u)):
        h = torch.exp(delta[t, :, None] * A[t]) * h + (delta[t] * u[t])[:, None] * B[t]
        y.append(h @ C[t])
    return torch.stack(y)


def reference_layer(layer: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Per sequence, without its padding tokens: they do not exist for the others."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        times = [t for t in range(x.shape[1]) if ids[b, t] >= 0]
        if not times:
            continue
        modality = [int(ids[b, t]) for t in times]

        def per_token(projection: nn.Module, rows: Tensor, modality: list[int] = modality) -> Tensor:
            return torch.stack([_project(projection, row, m) for row, m in zip(rows, modality, strict=True)])

        xz = per_token(layer.in_proj, x[b, times])
        u, z = xz.chunk(2, dim=-1)
        weight = layer.conv1d.weight.squeeze(1)
        u, _ = reference.causal_conv1d(u.unsqueeze(0), weight, layer.conv1d.bias)
        low, B, C = per_token(layer.x_proj, u[0]).split([layer.dt_rank, layer.d_state, layer.d_state], dim=-1)
        dt = per_token(layer.dt_proj, _rms_norm(layer.dt_layernorm, low))
        B, C = _rms_norm(layer.b_layernorm, B), _rms_norm(layer.c_layernorm, C)
        delta = nn.functional.softplus(dt).clamp(*(layer.dt_limit or (0, None)))
        delta, B, C, z = (value.unsqueeze(0) for value in (delta, B, C, z))
        A = -torch.exp(layer.A_log)
        if "A_log" in layer.decouple:
            y = _scan_by_tokens(u[0], delta[0], A[modality], B[0], C[0]).unsqueeze(0)
        else:
            y, _ = reference.selective_scan(u, delta, A, B, C, None, None, softplus=False)
        y = (y + (layer.D[modality] if "D" in layer.decouple else layer.D) * u) * nn.functional.silu(z)
        out[b, times] = per_token(layer.out_proj, y[0])
    return out
