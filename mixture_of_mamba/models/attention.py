# SPDX-License-Identifier: Apache-2.0
"""Causal attention and MLP over rows in sorted order, for hybrid stacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.models.config import DecoderConfig
from mixture_of_mamba.models.pictures import Pictures
from mixture_of_mamba.models.state import AttentionState
from mixture_of_mamba.nn import ModalityLinear
from mixture_of_mamba.nn.mixing import project
from mixture_of_mamba.routing import Routing

__all__ = ["MLP", "CausalAttention", "Scope", "make_scope"]


@dataclass(frozen=True)
class Scope:
    """Who attends to whom in one call, for all attention layers.

    Attributes:
        shape: ``(sequences, tokens)`` that attention sees; packed documents are one sequence.
        mask: bool ``[sequences, 1, tokens, past + tokens]`` in time order, or None for plain causal attention.
        seen: bool ``[sequences, past + tokens]``, which tokens are no padding.
    """

    shape: tuple[int, int]
    mask: Tensor | None
    seen: Tensor


def make_scope(routing: Routing, cu_seqlens: Tensor | None, seen: Tensor | None, pictures: Pictures | None) -> Scope:
    """A token attends to itself and to the real tokens before it in its document, and to all of its picture.

    Args:
        seen: of the state to go on from; None at a sequence's beginning.
        pictures: given when pictures shall be seen both ways.
    """
    batch, length = shape = routing.shape if cu_seqlens is None else (1, routing.num_tokens)
    real = (routing.rows < routing.offsets[-1]).view(shape)
    past = 0 if seen is None else seen.shape[1]
    all_seen = real if seen is None else torch.cat((seen, real), 1)
    if not routing.has_padding and cu_seqlens is None and seen is None and pictures is None:
        return Scope(shape, None, all_seen)
    time = torch.arange(past + length, device=real.device)
    queries = time[past:, None]
    reach = (time <= queries).expand(batch, -1, -1)
    if cu_seqlens is not None:
        document = interval_of(time, cu_seqlens)
        reach = reach & (document == document[past:, None])
    if pictures is not None:
        index = routing.unsort(pictures.index).view(shape)
        same = (index[:, :, None] == index[:, None, :]) & (index > 0)[:, :, None]
        reach = reach | F.pad(same, (past, 0))
    # A padding token attends to itself alone: a softmax over nothing has no value. Nobody reads its output.
    reach = (reach & all_seen[:, None, :]) | (time == queries)
    return Scope(shape, reach.unsqueeze(1), all_seen)


def _linear(config: DecoderConfig, in_features: int, out_features: int, **place: Any) -> nn.Module:
    """Per modality as in Mixture-of-Transformers (arXiv 2411.04996), when the Mamba mixers have any such projection."""
    if config.has_specific_projections:
        return ModalityLinear(in_features, out_features, config.num_modalities, bias=False, **place)
    return nn.Linear(in_features, out_features, bias=False, **place)


class CausalAttention(nn.Module):
    """Multi-head causal attention by torch's ``scaled_dot_product_attention``.

    There is no positional encoding: the Mamba layers around it know the order (as in Jamba, arXiv 2403.19887).
    """

    def __init__(self, config: DecoderConfig, **place: Any) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.head_dim = config.d_model // config.attention_heads
        self.qkv_proj = _linear(config, config.d_model, 3 * config.d_model, **place)
        self.out_proj = _linear(config, config.d_model, config.d_model, **place)

    def forward(
        self, x: Tensor, routing: Routing, scope: Scope, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState]:
        """``x`` and the result ``[batch, length, d_model]`` in sorted order."""
        qkv = routing.unsort(project(self.qkv_proj, x, routing))
        qkv = qkv.view(*scope.shape, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        queries, keys, values = qkv.unbind(0)
        if state is not None:
            keys, values = torch.cat((state.keys, keys), 2), torch.cat((state.values, values), 2)
        y = F.scaled_dot_product_attention(queries, keys, values, scope.mask, is_causal=scope.mask is None)
        y = y.transpose(1, 2).reshape(x.shape)
        return project(self.out_proj, routing.sort(y), routing), AttentionState(keys, values)


class MLP(nn.Module):
    """SwiGLU of 8/3 d_model, rounded up to a multiple of 64: 8 d_model^2 parameters, 12 with attention."""

    def __init__(self, config: DecoderConfig, **place: Any) -> None:
        super().__init__()
        hidden = -(-8 * config.d_model // (3 * 64)) * 64
        self.in_proj = _linear(config, config.d_model, 2 * hidden, **place)
        self.out_proj = _linear(config, hidden, config.d_model, **place)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        values, gate = project(self.in_proj, x, routing).chunk(2, dim=-1)
        return project(self.out_proj, values * F.silu(gate), routing)
