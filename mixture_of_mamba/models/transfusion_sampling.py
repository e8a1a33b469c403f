# SPDX-License-Identifier: Apache-2.0
"""Generation of text and pictures with a Transfusion model, sequence by sequence at its own pace."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixture_of_mamba.models.checks import check_new_tokens, check_tokens
from mixture_of_mamba.models.placement import Latents, Positions
from mixture_of_mamba.models.sampling import Sampling, draw
from mixture_of_mamba.models.state import DecoderState
from mixture_of_mamba.routing import Routing

if TYPE_CHECKING:
    from mixture_of_mamba.models.transfusion import Transfusion
    from mixture_of_mamba.models.transfusion_results import TransfusionOutput

__all__ = ["Generated", "generate"]


@dataclass(frozen=True)
class Generated:
    """What was generated after the prompts, in the form in which a model takes it.

    Attributes:
        tokens: int64 ``[batch, length]``; -1 where a sequence had nothing to say, ``null`` in pictures.
        latents: ``[pictures, *grid, dim_latent]``, clean.
        positions: int64 ``[pictures, 2]``, row and offset of each picture's first token.
    """

    tokens: Tensor
    latents: Tensor
    positions: Tensor


class _Writer:
    """The sequences of one call: their states, what came out last, what has been written.

    Under guidance a second copy of each sequence, which sees no text, follows in the same batch: 2 x batch states.
    """

    def __init__(self, model: Transfusion, prompt: TransfusionOutput, tokens: Tensor, branches: int) -> None:
        self.model = model
        self.batch = tokens.shape[0]
        self.branches = branches
        self.state = _state(prompt)
        routing, length = prompt.routing, tokens.shape[1]
        rows = routing.rows.view(-1, length)[: self.batch]
        time = torch.arange(length, device=tokens.device)
        last = torch.where(rows < routing.offsets[-1], time, -1).max(1, keepdim=True).values
        if bool((last < 0).any()):
            raise ValueError("tokens must have a token that is no padding in every prompt, got a prompt without")
        last_rows = rows.gather(1, last).squeeze(1)
        self.hidden = prompt.hidden.flatten(0, 1)[last_rows.long()]  # [batch, d_model]
        is_text = last_rows < routing.offsets[1]
        self.waits = is_text & (tokens.gather(1, last).squeeze(1) == model.config.boi)  # for a picture
        self.columns: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.positions: list[Tensor] = []

    @property
    def length(self) -> int:
        return sum(column.shape[1] for column in self.columns)

    def write_text(self, tokens: Tensor) -> None:
        """The next token of every sequence, int64 ``[batch]``; -1 for those that wait."""
        self.columns.append(tokens.unsqueeze(1))
        self.waits = self.waits | (tokens == self.model.config.boi)
        column = self._branched(tokens.unsqueeze(1))
        out = self.model(column, state=self.state, return_state=True)
        self.state = _state(out)
        hidden = out.routing.unsort(out.hidden)[: self.batch, 0]
        self.hidden = torch.where((tokens >= 0).unsqueeze(1), hidden, self.hidden)

    def draw_pictures(self, sequences: Tensor, noise: Tensor, steps: int, guidance: float) -> None:
        """Pictures for some sequences, int64 ``[n]``, out of noise ``[n, *grid, dim_latent]``; then EOI."""
        model, device = self.model, noise.device
        branches = self.branches
        rows = torch.cat([sequences + branch * self.batch for branch in range(branches)])
        at_begin = self.state.select(rows)
        length = math.prod(side // model.config.patch_size for side in noise.shape[1:-1])
        blank = torch.full((len(rows), length), model.config.null, device=device)
        positions = torch.tensor([(row, 0) for row in range(len(rows))])
        routing = Routing.from_ids(torch.ones(blank.shape, dtype=torch.int64), 2, device=device)

        def run(x: Tensor, time: Tensor) -> TransfusionOutput:
            latents = x.repeat(branches, *[1] * (x.dim() - 1))
            return model(blank, latents, positions, time.expand(len(rows)), routing, state=at_begin, return_state=True)

        def predict(x: Tensor, time: Tensor) -> Tensor:
            predicted = run(x, time).predictions[0].to(x.dtype)
            if branches == 1:
                return predicted
            conditional, without = predicted.chunk(2)
            return without + guidance * (conditional - without)

        x = model.diffusion.denoise(noise, steps, predict)
        self.state = self.state.restore(rows, _state(run(x, x.new_zeros(()))))

        self.latents.append(x)
        self.positions.append(torch.stack((sequences, torch.full_like(sequences, self.length)), 1))
        column = torch.full((self.batch, length), -1, device=device)
        self.columns.append(column.index_fill(0, sequences, model.config.null))
        self.waits = self.waits.index_fill(0, sequences, False)
        ends = torch.full((self.batch,), -1, device=device)
        self.write_text(ends.index_fill(0, sequences, model.config.eoi))

    def _branched(self, tokens: Tensor) -> Tensor:
        return tokens if self.branches == 1 else torch.cat((tokens, self.model.without_text(tokens)))


@torch.no_grad()
def generate(
    model: Transfusion,
    tokens: Tensor,
    new_tokens: int,
    grid: tuple[int, ...],
    *,
    latents: Latents,
    positions: Positions,
    sampling: Sampling,
    steps: int,
    guidance: float,
    stop: int | None,
    may_begin: bool,
    generator: torch.Generator | None,
) -> Generated:
    """See :meth:`Transfusion.generate`."""
    check_tokens(tokens)
    check_new_tokens(new_tokens)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    batch, device, config = tokens.shape[0], tokens.device, model.config
    branches = 1 if guidance == 1 else 2
    writer = _Writer(model, _read(model, tokens, latents, positions, branches), tokens, branches)
    shape = (*grid, config.dim_latent)

    legal = torch.ones(config.text_size, dtype=torch.bool, device=device)
    legal[[config.eoi, config.null]] = False
    legal[config.boi] = may_begin
    left = torch.full((batch,), new_tokens, device=device)
    while True:
        writes = (left > 0) & ~writer.waits
        if bool(writes.any()):
            token = draw(model.text_logits(writer.hidden).masked_fill(~legal, -torch.inf), sampling)
            token = torch.where(writes, token, -1)
            writer.write_text(token)
            left = left - writes.long()
            if stop is not None:
                left = left.masked_fill(token == stop, 0)
        elif bool(writer.waits.any()):
            sequences = writer.waits.nonzero().squeeze(1)
            dtype = torch.promote_types(model.embedding.weight.dtype, torch.float32)
            noise = torch.randn(len(sequences), *shape, device=device, dtype=dtype, generator=generator)
            writer.draw_pictures(sequences, noise, steps, guidance)
        else:
            break
    return Generated(
        torch.cat([tokens.new_empty(batch, 0), *writer.columns], 1),
        torch.cat([torch.empty(0, *shape, device=device), *writer.latents]),
        torch.cat([tokens.new_empty(0, 2), *writer.positions]),
    )


def _read(
    model: Transfusion, tokens: Tensor, latents: Latents, positions: Positions, branches: int
) -> TransfusionOutput:
    """The prompts, and under guidance the prompts without their text after them."""
    if branches == 1:
        return model(tokens, latents, positions, return_state=True)
    where = torch.as_tensor(positions, dtype=torch.int64).reshape(-1, 2)
    shifted = where + where.new_tensor([tokens.shape[0], 0])
    both = torch.cat((tokens, model.without_text(tokens)))
    latents = torch.cat((latents, latents)) if isinstance(latents, Tensor) else [*latents, *latents]
    return model(both, latents, torch.cat((where, shifted)), return_state=True)


def _state(out: TransfusionOutput) -> DecoderState:
    assert out.state is not None  # it was asked for
    return out.state
