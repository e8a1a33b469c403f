# SPDX-License-Identifier: Apache-2.0
"""The stack of layers that all models share: hidden states in, hidden states out, in sorted order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from mixture_of_mamba.models.attention import MLP, CausalAttention, Scope, make_scope
from mixture_of_mamba.models.config import DecoderConfig
from mixture_of_mamba.models.pictures import Pictures, mix_both_ways
from mixture_of_mamba.models.state import AttentionState, DecoderState
from mixture_of_mamba.nn import MambaState, MixtureOfMamba
from mixture_of_mamba.nn.checks import check_cu_seqlens
from mixture_of_mamba.ops import sac_save_list
from mixture_of_mamba.routing import Routing
from mixture_of_mamba.routing_forms import kind_of

__all__ = ["Decoder"]


class Modulation(nn.Linear):
    """Scale, shift and gate of picture tokens, from their picture's condition: adaLN-zero (DiT, arXiv 2212.09748).

    All three begin at 0, so that a picture's tokens begin as they are. Other tokens have scale 0, shift 0, gate 1.
    """

    def __init__(self, d_model: int, **place: Any) -> None:
        super().__init__(d_model, 3 * d_model, **place)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, pictures: Pictures) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Each ``[batch, length, d_model]``, in sorted order."""
        assert pictures.condition is not None
        table = super().forward(F.silu(pictures.condition))
        others = F.pad(table.new_ones(1, self.in_features), (2 * self.in_features, 0))
        return F.embedding(pictures.index, torch.cat((others, table))).chunk(3, dim=-1)


class Residual(nn.Module):
    """``x + mix(norm(x))``, modulated inside pictures where there is a modulation and a condition."""

    def __init__(self, config: DecoderConfig, **place: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, **place)
        self.modulation = Modulation(config.d_model, **place) if config.modulated else None

    def enter(self, x: Tensor, pictures: Pictures | None) -> tuple[Tensor, Tensor | None]:
        """What goes into the mixer, and the gate of what comes out."""
        x = self.norm(x)
        if self.modulation is None or pictures is None:
            return x, None
        scale, shift, gate = self.modulation(pictures)
        return x * (1 + scale) + shift, gate

    @staticmethod
    def leave(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
        return x + y if gate is None else x + gate * y


class MambaLayer(nn.Module):
    """Mamba mixers one after the other, each with its norm and residual."""

    def __init__(self, config: DecoderConfig, first_mixer: int, **place: Any) -> None:
        super().__init__()
        self.both_ways = config.bidirectional
        count = config.mixers_per_layer
        self.residuals = nn.ModuleList(Residual(config, **place) for _ in range(count))
        self.mixers = nn.ModuleList(
            MixtureOfMamba(
                config.d_model,
                config.num_modalities,
                config.decouple,
                d_state=config.d_state,
                d_conv=config.d_conv,
                expand=config.expand,
                layer_idx=first_mixer + index,
                memory=config.memory,
                bcdt_norm=config.bcdt_norm,
                dt_limit=config.dt_limit,
                shared_expert=config.shared_expert,
                **place,
            )
            for index in range(count)
        )

    def forward(
        self,
        x: Tensor,
        routing: Routing | None,
        cu_seqlens: Tensor | None,
        pictures: Pictures | None,
        states: Sequence[MambaState] | None,
    ) -> tuple[Tensor, list[MambaState]]:
        new_states = []
        for i, (residual, mixer) in enumerate(zip(self.residuals, self.mixers, strict=True)):
            state = None if states is None else states[i]
            h, gate = cast(Residual, residual).enter(x, pictures)
            if self.both_ways and pictures is not None:
                assert routing is not None
                y, state = mix_both_ways(cast(MixtureOfMamba, mixer), h, routing, cu_seqlens, state, pictures)
            else:
                y, state = mixer(h, routing, sorted=True, cu_seqlens=cu_seqlens, state=state, return_state=True)
            x = Residual.leave(x, y, gate)
            new_states.append(state)
        return x, new_states


class AttentionLayer(nn.Module):
    """Attention and an MLP, each with its norm and residual."""

    def __init__(self, config: DecoderConfig, **place: Any) -> None:
        super().__init__()
        self.residuals = nn.ModuleList(Residual(config, **place) for _ in range(2))
        self.attention = CausalAttention(config, **place)
        self.mlp = MLP(config, **place)

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        scope: Scope,
        pictures: Pictures | None,
        state: AttentionState | None,
    ) -> tuple[Tensor, AttentionState]:
        first, second = (cast(Residual, residual) for residual in self.residuals)
        h, gate = first.enter(x, pictures)
        y, new_state = self.attention(h, routing, scope, state)
        x = Residual.leave(x, y, gate)
        h, gate = second.enter(x, pictures)
        return Residual.leave(x, self.mlp(h, routing), gate), new_state


class Decoder(nn.Module):
    """Layers of (RMSNorm -> Mamba -> residual), some of attention if asked for, and a final norm.

    The residual stream is in the routing's sorted order from the first layer to the last, so no layer moves a row; sort
    token ids before the embedding and labels before the loss, which costs nothing. As in the paper's code, the norms
    are shared by the modalities.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters; A_log and D are float32 whatever ``dtype`` is.
    """

    def __init__(self, config: DecoderConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        place = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        mixers = 0
        for index in range(config.layers):
            if config.is_attention(index):
                layers.append(AttentionLayer(config, **place))
            else:
                layers.append(MambaLayer(config, mixers, **place))
                mixers += config.mixers_per_layer
        self.layers = nn.ModuleList(layers)
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps, **place)
        self._scale_down()

    @torch.no_grad()
    def _scale_down(self) -> None:
        """What is added to the stream shrinks with the number of additions, as GPT-2 and ``mamba_ssm`` begin."""
        for name, parameter in self.layers.named_parameters():
            if "out_proj" in name and name.endswith("weight"):
                parameter.mul_(self.config.residuals**-0.5)

    def reset_parameters(self) -> None:
        """Initialise, as on construction: for a decoder that was made on the meta device."""
        _reset(self)
        self._scale_down()

    @overload
    def forward(
        self,
        x: Tensor,
        routing: Routing | None,
        *,
        cu_seqlens: Tensor | None = ...,
        pictures: Pictures | None = ...,
        state: DecoderState | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        routing: Routing | None,
        *,
        cu_seqlens: Tensor | None = ...,
        pictures: Pictures | None = ...,
        state: DecoderState | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, DecoderState]: ...
    def forward(
        self,
        x: Tensor,
        routing: Routing | None,
        *,
        cu_seqlens: Tensor | None = None,
        pictures: Pictures | None = None,
        state: DecoderState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, DecoderState]:
        """Any number of tokens: a whole sequence, a chunk of it, one token.

        Args:
            x: ``[batch, length, d_model]``, rows in the routing's sorted order.
            routing: of the batch. May be None when there is one modality, no attention and no picture.
            cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed documents in flat time order.
            pictures: where pictures are, for decoders that are ``bidirectional`` or ``modulated``.
            state: where the sequences start from.
            return_state: also return the state after the last token.

        Returns:
            Normalised hidden states with the shape and order of ``x``, or those and the state. Rows of padding hold
            nothing of use.

        Raises:
            ValueError, RuntimeError: naming the argument, what was required, and what came.
        """
        config = self.config
        if x.dim() != 3 or x.shape[-1] != config.d_model:
            raise ValueError(f"x must have shape [batch, length, d_model = {config.d_model}], got {list(x.shape)}")
        hybrid = config.attention_every > 0
        needed = config.num_modalities > 1 or hybrid or pictures is not None
        if not isinstance(routing, Routing) and (needed or routing is not None):
            raise ValueError(
                "routing must be a Routing, whose sorted order x has, or None when there is one modality, no attention "
                f"and no picture, got {kind_of(routing)}"
            )
        check_cu_seqlens(cu_seqlens)
        if hybrid and cu_seqlens is not None and (state is not None or return_state):
            raise ValueError("cu_seqlens must come without state and return_state where there is attention")
        if config.modulated and pictures is not None and pictures.condition is None:
            raise ValueError("pictures must have a condition, since the decoder is modulated, got None")
        scope = None
        if hybrid:
            assert routing is not None
            both_ways = pictures if config.bidirectional else None
            scope = make_scope(routing, cu_seqlens, None if state is None else state.seen, both_ways)
        mamba_states: list[MambaState] = []
        attention_states: list[AttentionState] = []
        for layer in self.layers:
            if isinstance(layer, AttentionLayer):
                old = None if state is None else state.attention[len(attention_states)]
                x, kept = self._run(layer, x, routing, scope, pictures, old)
                attention_states.append(kept)
            else:
                done = len(mamba_states)
                olds = None if state is None else state.mamba[done : done + config.mixers_per_layer]
                x, kept = self._run(layer, x, routing, cu_seqlens, pictures, olds)
                mamba_states += kept
        y = self.final_norm(x)
        if not return_state:
            return y
        return y, DecoderState(mamba_states, attention_states, None if scope is None else scope.seen)

    def _run(self, layer: nn.Module, *arguments: Any) -> tuple[Tensor, Any]:
        how = self.config.checkpointing
        if how == "none" or not torch.is_grad_enabled():
            return layer(*arguments)
        if how == "full":
            return checkpoint(layer, *arguments, use_reentrant=False)
        contexts = partial(create_selective_checkpoint_contexts, sac_save_list())
        return checkpoint(layer, *arguments, use_reentrant=False, context_fn=contexts)


def _reset(module: nn.Module) -> None:
    for child in module.children():
        if isinstance(child, (MixtureOfMamba, nn.Linear, nn.RMSNorm)):  # a mixer initialises what is in it
            child.reset_parameters()
        else:
            _reset(child)
