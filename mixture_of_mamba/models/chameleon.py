# SPDX-License-Identifier: Apache-2.0
"""Chameleon (arXiv 2405.09818): every modality is discrete tokens of one vocabulary, predicted one after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixture_of_mamba.models.checks import check_ids, check_new_tokens, check_tokens
from mixture_of_mamba.models.config import DecoderConfig
from mixture_of_mamba.models.decoder import Decoder
from mixture_of_mamba.models.losses import ModalityLosses, modality_losses, next_tokens
from mixture_of_mamba.models.sampling import Regions, Sampling, draw
from mixture_of_mamba.models.state import DecoderState
from mixture_of_mamba.models.vocabulary import Vocabulary
from mixture_of_mamba.routing import Routing
from mixture_of_mamba.routing_forms import kind_of

__all__ = ["Chameleon"]

EMBEDDING_STD = 0.02


class Chameleon(nn.Module):
    """Causal language model over the tokens of all modalities.

    Token ids are those of the vocabulary, in time order, and -1 is padding: left, right or in between. Which modality a
    token has, its id says.

    Args:
        config: of the decoder; ``num_modalities`` must be the vocabulary's.
        vocabulary: ranges of tokens.
        tied: the head is the embedding.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: DecoderConfig,
        vocabulary: Vocabulary,
        *,
        tied: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if config.num_modalities != vocabulary.num_modalities:
            raise ValueError(
                f"config.num_modalities must be the vocabulary's, {vocabulary.num_modalities}, "
                f"got {config.num_modalities}"
            )
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary.size, config.d_model, device=device, dtype=dtype)
        self.decoder = Decoder(config, device=device, dtype=dtype)
        self.head = None
        if not tied:
            self.head = nn.Linear(config.d_model, vocabulary.size, bias=False, device=device, dtype=dtype)
        self._initialise_embeddings()

    @property
    def config(self) -> DecoderConfig:
        return self.decoder.config

    def _initialise_embeddings(self) -> None:
        for module in (self.embedding, self.head):
            if module is not None:
                nn.init.normal_(module.weight, std=EMBEDDING_STD)

    def reset_parameters(self) -> None:
        """Initialise, as on construction: for a model that was made on the meta device."""
        self.decoder.reset_parameters()
        self._initialise_embeddings()

    def routing(self, tokens: Tensor, modality: Tensor | Routing | None = None) -> Routing:
        """The routing of tokens ``[batch, length]``, for their device.

        Args:
            modality: their modality ids ``[batch, length]`` if the data loader has them: on the CPU, they spare the GPU
                what is not known on the host (see ``Routing``). Or the routing itself.
        """
        self._check(tokens)
        if isinstance(modality, Routing):
            return modality
        ids = self.vocabulary.modality_of(tokens) if modality is None else modality
        if ids.shape != tokens.shape:
            raise ValueError(f"modality must have the shape of tokens, {list(tokens.shape)}, got {list(ids.shape)}")
        return Routing.from_ids(ids, self.vocabulary.num_modalities, device=tokens.device)

    @overload
    def forward(
        self,
        tokens: Tensor,
        modality: Tensor | Routing | None = ...,
        *,
        cu_seqlens: Tensor | None = ...,
        state: DecoderState | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        tokens: Tensor,
        modality: Tensor | Routing | None = ...,
        *,
        cu_seqlens: Tensor | None = ...,
        state: DecoderState | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, DecoderState]: ...
    def forward(
        self,
        tokens: Tensor,
        modality: Tensor | Routing | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: DecoderState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, DecoderState]:
        """Logits ``[batch, length, vocabulary]`` of the token after each, in time order; anything on padding.

        Args:
            tokens: int64 ``[batch, length]``, a whole sequence or the next chunk of it.
            modality: see :meth:`routing`.
            cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed documents in flat time order.
            state, return_state: to go on, as in :class:`Decoder`.
        """
        routing = self.routing(tokens, modality)
        x = self._embedded(tokens, routing)
        if not return_state:
            hidden = self.decoder(x, routing, cu_seqlens=cu_seqlens, state=state)
            return self._logits(routing.unsort(hidden))
        hidden, new_state = self.decoder(x, routing, cu_seqlens=cu_seqlens, state=state, return_state=True)
        return self._logits(routing.unsort(hidden)), new_state

    def loss(
        self,
        tokens: Tensor,
        modality: Tensor | Routing | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        rows_at_once: int | None = None,
    ) -> ModalityLosses:
        """Next-token losses by modality of the label; ``.total()`` is what is minimised.

        Every token is input; labels are sorted and hidden states are not moved.

        Args:
            tokens, modality, cu_seqlens: as in :meth:`forward`.
            rows_at_once: logits of so many tokens are in memory at a time, and computed again for backward. Of 16,384
                tokens and a vocabulary of 65,536 all of them take 4 GiB in float32, several times.
        """
        if rows_at_once is not None and rows_at_once < 1:
            raise ValueError(f"rows_at_once must be at least 1, got {rows_at_once}")
        routing = self.routing(tokens, modality)
        hidden = self.decoder(self._embedded(tokens, routing), routing, cu_seqlens=cu_seqlens).flatten(0, 1)
        labels = routing.sort(next_tokens(tokens, cu_seqlens)).flatten()
        if rows_at_once is None:
            return self._losses(hidden, labels)
        parts = zip(hidden.split(rows_at_once), labels.split(rows_at_once), strict=True)
        losses = [checkpoint(self._losses, *part, use_reentrant=False) for part in parts]
        return ModalityLosses(
            cross_entropy=torch.stack([one.cross_entropy for one in losses]).sum(0),
            z=torch.stack([one.z for one in losses]).sum(0),
            count=torch.stack([one.count for one in losses]).sum(0),
        )

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: int | None = None,
        regions: bool = True,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Continue prompts of any lengths, one token at a time from the state.

        Only what may follow is drawn: text and the beginnings of regions in text, a region's codes in the region, its
        end when it is complete (or, with no fixed length, at any time). A prompt that ends with BOI is continued with a
        picture.

        Args:
            tokens: int64 ``[batch, length]``, prompts padded with -1 on any side; each has a token at least.
            new_tokens: how many to draw for each.
            sampling: by default plain sampling at temperature 1.
            stop: a token after which a sequence is complete; -1 follows.
            regions: whether text may begin regions (images, speech) by itself.
            cu_seqlens: the prompts are packed into ``tokens``, with these boundaries.

        Returns:
            int64 ``[sequences, new_tokens]``.
        """
        self._check(tokens)
        check_new_tokens(new_tokens)
        sampling = sampling or Sampling()
        prompts = _unpacked(tokens, cu_seqlens)
        if not bool((prompts >= 0).any(1).all()):
            raise ValueError("tokens must have a token that is no padding in every prompt, got a prompt without")
        where = Regions(self.vocabulary, len(prompts), tokens.device, free=regions)
        where.advance(prompts)
        if cu_seqlens is not None and self.config.attention_every:  # the state of packed documents has no one length
            tokens, cu_seqlens = prompts, None
        routing = self.routing(tokens)
        x = self._embedded(tokens, routing)
        hidden, state = self.decoder(x, routing, cu_seqlens=cu_seqlens, return_state=True)
        last = _last_tokens(tokens, cu_seqlens)
        hidden = hidden.flatten(0, 1)[routing.rows[last].long()]

        drawn: list[Tensor] = []
        done = torch.zeros(len(prompts), dtype=torch.bool, device=tokens.device)
        for i in range(new_tokens):
            token = draw(where.mask(self._logits(hidden)), sampling).masked_fill(done, -1)
            drawn.append(token)
            if stop is not None:
                done = done | (token == stop)
            if i + 1 == new_tokens or (stop is not None and bool(done.all())):
                break
            step = token.unsqueeze(1)
            where.advance(step)
            routing = self.routing(step)
            hidden, state = self.decoder(self._embedded(step, routing), routing, state=state, return_state=True)
            hidden = routing.unsort(hidden).squeeze(1)
        out = torch.stack(drawn, 1) if drawn else tokens.new_empty(len(prompts), 0)
        return F.pad(out, (0, new_tokens - out.shape[1]), value=-1)

    def _check(self, tokens: Tensor) -> None:
        check_tokens(tokens)
        check_ids(tokens, self.vocabulary.size, "vocabulary.size")

    def _embedded(self, tokens: Tensor, routing: Routing) -> Tensor:
        return self.embedding(routing.sort(tokens).clamp(min=0))

    def _losses(self, hidden: Tensor, labels: Tensor) -> ModalityLosses:
        logits = self._logits(hidden)
        return modality_losses(logits, labels, self.vocabulary.modality_of(labels), self.vocabulary.num_modalities)

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)


def _unpacked(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``[sequences, longest]``, padded on the right."""
    if cu_seqlens is None:
        return tokens
    parts = tokens.flatten().split(_lengths(tokens, cu_seqlens))
    return nn.utils.rnn.pad_sequence(list(parts), batch_first=True, padding_value=-1)


def _lengths(tokens: Tensor, cu_seqlens: Tensor) -> list[int]:
    """Of packed sequences; known on the host, as generation waits for the device anyway."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens must be an int32 tensor [sequences + 1], got {kind_of(cu_seqlens)}")
    ends: list[int] = cu_seqlens.tolist()
    if len(ends) < 2 or ends != sorted(ends) or (ends[0], ends[-1]) != (0, tokens.numel()):
        raise ValueError(f"cu_seqlens must rise from 0 to batch * length = {tokens.numel()}, got {ends}")
    return [end - begin for begin, end in pairwise(ends)]


def _last_tokens(tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Flat time of the last token of each sequence that is no padding, int64 ``[sequences]``."""
    time = torch.arange(tokens.numel(), device=tokens.device)
    time = torch.where(tokens.flatten() < 0, -1, time)
    if cu_seqlens is None:
        return time.view(tokens.shape).max(1).values
    return torch.stack([part.max() for part in time.split(_lengths(tokens, cu_seqlens))])
