# SPDX-License-Identifier: Apache-2.0
"""Decoders written out: token by token, one sequence at a time, without routing, operators or state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_mamba.models import Decoder, DecoderConfig, TokenRange, Vocabulary

VOCABULARY = Vocabulary(
    (
        TokenRange("text", 12),
        TokenRange("image", 7, begin=1, end=2, length=3),
        TokenRange("speech", 5, begin=3, end=4),
    )
)

# What the settings of a decoder are tried with.
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "dense": {"decouple": ()},
    "some projections": {"decouple": ("in_proj", "dt_proj"), "mixers_per_layer": 1},
    "hybrid": {"layers": 3, "attention_every": 2, "attention_heads": 2},
    "dense hybrid": {"decouple": (), "attention_every": 1, "attention_heads": 4},
    "lean": {"memory": "lean", "d_state": 4, "d_conv": 3, "expand": 3},
    "shared experts": {"shared_expert": ("in_proj", "out_proj", "x_proj", "dt_proj")},
    "A and D": {"decouple": ("in_proj", "A_log", "D"), "shared_expert": ("in_proj",), "mixers_per_layer": 1},
    "norms and limits": {"bcdt_norm": True, "dt_limit": (0.005, 0.05), "attention_every": 2, "attention_heads": 2},
}

# All options of the layer at once, where pictures are seen both ways.
OPTIONS: dict[str, Any] = {
    "bidirectional": True,
    "modulated": True,
    "decouple": ("in_proj", "dt_proj", "A_log", "D"),
    "shared_expert": ("in_proj",),
    "bcdt_norm": True,
    "dt_limit": (0.005, 0.05),
}


def config(d_model: int = 8, layers: int = 2, num_modalities: int = 3, **settings: Any) -> DecoderConfig:
    return DecoderConfig(**{"d_model": d_model, "layers": layers, "num_modalities": num_modalities, **settings})


@torch.no_grad()
def disturb(module: nn.Module, scale: float = 0.2) -> nn.Module:
    """Every parameter random: nothing cancels by accident, nothing is zero."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
    return module


def make_decoder(**settings: Any) -> Decoder:
    return disturb(Decoder(config(**settings)).double())


def random_ids(batch: int, length: int, modalities: int = 3) -> Tensor:
    ids = torch.randint(-1, modalities, (batch, length))
    ids[0, 0], ids[0, 1] = -1, 0
    return ids


def reference_decoder(
    decoder: Decoder,
    x: Tensor,
    ids: Tensor,
    spans: Sequence[tuple[int, int, int]] = (),
    condition: Tensor | None = None,
) -> Tensor:
    """``x [batch, length, d_model]`` and ids in time order; 0 on padding. ``spans``: (row, begin, end) of pictures."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        times = [t for t in range(x.shape[1]) if ids[b, t] >= 0]
        picture = [next((p for p, (row, i, j) in enumerate(spans) if row == b and i <= t < j), -1) for t in times]
        modality = [int(ids[b, t]) for t in times]
        h = x[b, times]
        for layer in decoder.layers:
            h = _layer(decoder.config, layer, h, modality, picture, condition)
        if times:
            out[b, times] = _rms_norm(decoder.final_norm, h)
    return out


def _layer(
    settings: DecoderConfig, layer: Any, x: Tensor, modality: list[int], picture: list[int], condition: Tensor | None
) -> Tensor:
    both_ways = settings.bidirectional
    mixers = getattr(layer, "mixers", None) or (layer.attention, layer.mlp)
    for residual, mixer in zip(layer.residuals, mixers, strict=True):
        h, gate = _rms_norm(residual.norm, x), torch.ones_like(x)
        if residual.modulation is not None:
            gate = gate.clone()
            for t, p in enumerate(picture):
                if p >= 0:
                    scale, shift, gate_of = (
                        residual.modulation.weight @ F.silu(condition[p]) + residual.modulation.bias
                    ).chunk(3)
                    h[t] = h[t] * (1 + scale) + shift
                    gate[t] = gate_of
        if hasattr(mixer, "A_log"):
            y = _mamba(mixer, h, modality, picture, both_ways)
        elif hasattr(mixer, "qkv_proj"):
            y = _attention(mixer, h, modality, picture, both_ways)
        else:
            values, z = _each(mixer.in_proj, h, modality).chunk(2, -1)
            y = _each(mixer.out_proj, values * z * torch.sigmoid(z), modality)
        x = x + gate * y
    return x


def _each(projection: nn.Module, x: Tensor, modality: list[int]) -> Tensor:
    """Every token through its modality's weights, and the shared expert's."""
    linears = projection if isinstance(projection, nn.ModuleList) else [projection] * (max(modality, default=0) + 1)
    shared = getattr(projection, "shared", None)
    rows = [linears[m](row) + (0 if shared is None else shared(row)) for row, m in zip(x, modality, strict=True)]
    return torch.stack(rows) if rows else linears[0](x)


def _rms_norm(norm: nn.RMSNorm | None, x: Tensor) -> Tensor:
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def _mamba(mixer: Any, x: Tensor, modality: list[int], picture: list[int], both_ways: bool) -> Tensor:
    values, z = _each(mixer.in_proj, x, modality).chunk(2, -1)
    weight = mixer.conv1d.weight.squeeze(1)
    window = F.pad(values, (0, 0, weight.shape[1] - 1, 0))
    u = [(window[t : t + weight.shape[1]] * weight.T).sum(0) + mixer.conv1d.bias for t in range(len(x))]
    u = F.silu(torch.stack(u)) if u else values
    low, B, C = _each(mixer.x_proj, u, modality).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
    low, B, C = (
        _rms_norm(getattr(mixer, f"{n}_layernorm"), part) for n, part in zip(("dt", "b", "c"), (low, B, C), strict=True)
    )
    delta = F.softplus(_each(mixer.dt_proj, low, modality))
    if mixer.dt_limit is not None:
        delta = delta.clamp(*mixer.dt_limit)
    A = [-A_log.exp() for A_log in mixer.A_log.expand(mixer.num_modalities, mixer.d_inner, mixer.d_state)]
    D = mixer.D.expand(mixer.num_modalities, mixer.d_inner)

    def scan(order: list[int]) -> dict[int, Tensor]:
        h, out = torch.zeros_like(A[0]), {}
        for t in order:
            h = (delta[t, :, None] * A[modality[t]]).exp() * h + (delta[t] * u[t])[:, None] * B[t]
            out[t] = h @ C[t]
        return out

    y = [value + D[modality[t]] * u[t] for t, value in scan(list(range(len(x)))).items()]
    for p in sorted({p for p in picture if p >= 0}) if both_ways else ():
        for t, value in scan([t for t in reversed(range(len(x))) if picture[t] == p]).items():
            y[t] = y[t] + value
    y = torch.stack(y) if y else u
    return _each(mixer.out_proj, y * F.silu(z), modality)


def _attention(mixer: Any, x: Tensor, modality: list[int], picture: list[int], both_ways: bool) -> Tensor:
    queries, keys, values = (
        part.unflatten(-1, (mixer.heads, -1)) for part in _each(mixer.qkv_proj, x, modality).chunk(3, -1)
    )
    out = []
    for t in range(len(x)):
        same = [s for s in range(len(x)) if both_ways and picture[t] >= 0 and picture[s] == picture[t]]
        seen = sorted({*range(t + 1), *same})
        scores = torch.einsum("hd,shd->hs", queries[t], keys[seen]) / queries.shape[-1] ** 0.5
        out.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values[seen]).flatten())
    return _each(mixer.out_proj, torch.stack(out) if out else x, modality)
