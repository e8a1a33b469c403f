# SPDX-License-Identifier: Apache-2.0
"""Transfusion (arXiv 2408.11039): text is predicted token by token, pictures are denoised as continuous latents."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixture_of_mamba.models.checks import check_ids, check_times, check_tokens
from mixture_of_mamba.models.decoder import Decoder
from mixture_of_mamba.models.diffusion import Diffusion
from mixture_of_mamba.models.losses import IGNORED, next_tokens
from mixture_of_mamba.models.patches import LinearPatches, TimeEmbedding, UNetPatches, grid_waves
from mixture_of_mamba.models.pictures import Pictures
from mixture_of_mamba.models.placement import Group, Latents, Placement, Positions, sequence_of_tokens
from mixture_of_mamba.models.sampling import Sampling
from mixture_of_mamba.models.state import DecoderState
from mixture_of_mamba.models.transfusion_config import TransfusionConfig
from mixture_of_mamba.models.transfusion_results import TransfusionLosses, TransfusionOutput
from mixture_of_mamba.models.transfusion_sampling import Generated, generate
from mixture_of_mamba.routing import Routing

__all__ = ["Transfusion"]

EMBEDDING_STD = 0.02


class Transfusion(nn.Module):
    """One decoder for text tokens and continuous latents.

    A batch is token ids ``[batch, length]`` in time order (-1 is padding), in which each picture has a stretch of as
    many tokens as patches, whose ids do not matter; the latents of all pictures; and where the stretches begin. By
    custom BOI is before a picture and EOI after it; only generation insists.

    Args:
        config: sizes and settings.
        device, dtype: of the parameters.
    """

    def __init__(self, config: TransfusionConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.diffusion = Diffusion(config.prediction)
        d_model, place = config.decoder.d_model, {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(config.text_size, d_model, **place)
        self.decoder = Decoder(config.decoder, **place)
        self.time = TimeEmbedding(d_model, **place)
        sizes = (d_model, config.dim_latent, config.patch_size)
        self.patches: LinearPatches | UNetPatches
        if config.patches == "linear":
            self.patches = LinearPatches(*sizes, config.grid_dimensions, **place)
        else:
            self.patches = UNetPatches(*sizes, config.unet_channels, **place)
        self.head = None if config.tied else nn.Linear(d_model, config.text_size, bias=False, **place)
        self._initialise_embeddings()

    def _initialise_embeddings(self) -> None:
        for module in (self.embedding, self.head):
            if module is not None:
                nn.init.normal_(module.weight, std=EMBEDDING_STD)

    def reset_parameters(self) -> None:
        """Initialise, as on construction: for a model that was made on the meta device."""
        for module in (*self.patches.modules(), *self.time.modules()):
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.GroupNorm)):
                module.reset_parameters()
        self.decoder.reset_parameters()
        self._initialise_embeddings()

    def forward(
        self,
        tokens: Tensor,
        latents: Latents = (),
        positions: Positions = (),
        times: Tensor | None = None,
        modality: Tensor | Routing | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        state: DecoderState | None = None,
        return_state: bool = False,
    ) -> TransfusionOutput:
        """Any number of tokens: a batch, a chunk of it, one token; a picture is in one call as a whole.

        Args:
            tokens: int64 ``[batch, length]``.
            latents: noised, ``[pictures, *grid, dim_latent]``, or a list of ``[*grid, dim_latent]`` of any sizes.
            positions: ``[pictures, 2]``, row of the batch and offset of the first token of each picture.
            times: ``[pictures]`` of diffusion; 0 by default, which is clean.
            modality: ids ``[batch, length]`` (1 in pictures) if the data loader has them on the CPU, or the routing.
            cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed documents in flat time order.
            state, return_state: to go on, as in :class:`Decoder`.
        """
        placement, tokens = self._placement(tokens, latents, positions)
        if times is None:
            times = torch.zeros(placement.count, device=tokens.device)
        check_times(times, placement.count)
        routing = self._routing(tokens, placement, modality)
        return self._run(tokens, placement, times, routing, cu_seqlens, state, return_state)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """``[.., d_model]`` -> ``[.., text_size]``."""
        return F.linear(hidden, self.embedding.weight if self.head is None else self.head.weight)

    def loss(
        self,
        tokens: Tensor,
        latents: Latents = (),
        positions: Positions = (),
        modality: Tensor | Routing | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        times: Tensor | None = None,
        noise: Latents | None = None,
        dropped: Tensor | None = None,
    ) -> TransfusionLosses:
        """Noise the pictures, predict text and noise, compare; ``.total()`` is what is minimised.

        Args:
            tokens, latents, positions, modality, cu_seqlens: as in :meth:`forward`, but the latents are clean.
            times: ``[pictures]``; by default uniform. (Transfusion keeps pictures that come before their caption at
                times of at most 0.5.)
            noise: with the form of the latents; by default normal.
            dropped: bool ``[sequences]``, whose text becomes ``null`` and is left out of the loss, as guidance needs;
                by default drawn in training with ``condition_dropout``, among sequences with pictures.
        """
        placement, tokens = self._placement(tokens, latents, positions)
        if times is None:
            times = torch.rand(placement.count, device=tokens.device) * self.diffusion.last_time
        check_times(times, placement.count)
        routing = self._routing(tokens, placement, modality)
        clean = [group.latents for group in placement.groups]
        if noise is None:
            noises = [torch.randn_like(one) for one in clean]
        else:
            noises = [group.latents for group in self._placement(tokens, noise, positions, "noise")[0].groups]
            wanted, got = ([list(one.shape) for one in some] for some in (clean, noises))
            if got != wanted:
                raise ValueError(f"noise must have the form of latents, {wanted}, got {got}")
        noisy = [
            replace(group, latents=self.diffusion.add_noise(group.latents, one, times[group.pictures]))
            for group, one in zip(placement.groups, noises, strict=True)
        ]
        is_text = placement.modality(tokens) == 0
        labels = next_tokens(torch.where(is_text, tokens, IGNORED), cu_seqlens)
        sequence, count = sequence_of_tokens(tokens.shape, cu_seqlens, tokens.device)
        if dropped is None and self.training and self.config.condition_dropout:
            dropped = torch.rand(count, device=tokens.device) < self.config.condition_dropout
            dropped &= torch.zeros_like(dropped).index_fill(0, sequence[placement.begin], True)
        if dropped is not None:
            if dropped.shape != (count,):
                raise ValueError(f"dropped must have shape [sequences = {count}], got {list(dropped.shape)}")
            of_token = dropped[sequence].view(tokens.shape)
            tokens = torch.where(of_token & is_text, self.without_text(tokens), tokens)
            labels = labels.masked_fill(of_token, IGNORED)

        out = self._run(tokens, replace(placement, groups=noisy), times, routing, cu_seqlens)
        text, text_count = self._text_loss(out.hidden, routing.sort(labels), routing)
        errors = out.hidden.new_zeros((), dtype=torch.promote_types(out.hidden.dtype, torch.float32))
        for group, one, prediction in zip(placement.groups, noises, out.predictions, strict=True):
            target = self.diffusion.target(group.latents, one, times[group.pictures])
            difference = prediction.to(errors.dtype) - target.to(errors.dtype)
            errors = errors + difference.square().flatten(1).mean(1).sum()
        diffusion = errors / max(placement.count, 1)
        return TransfusionLosses(text, diffusion, text_count, placement.count, self.config.diffusion_weight)

    def without_text(self, tokens: Tensor) -> Tensor:
        """Tokens as the unconditional branch of guidance sees them: text but BOI and EOI becomes ``null``."""
        structure = (tokens < 0) | (tokens == self.config.boi) | (tokens == self.config.eoi)
        return torch.where(structure, tokens, self.config.null)

    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        grid: tuple[int, ...],
        *,
        latents: Latents = (),
        positions: Positions = (),
        sampling: Sampling | None = None,
        steps: int = 250,
        guidance: float = 1.0,
        stop: int | None = None,
        pictures: bool = True,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Continue prompts of any lengths with text and pictures, from the state.

        Text is drawn token by token. After BOI, the picture begins as noise and is computed again from the state at BOI
        in every step of ``Diffusion.denoise``; the state goes on after a last pass over the clean picture, and EOI
        follows.

        Args:
            tokens, latents, positions: the prompts, padded with -1 on any side, with their clean pictures, as in
                :meth:`forward`; a prompt that ends with BOI is continued with a picture.
            new_tokens: how many text tokens to draw at most for each; BOI counts, EOI and pictures do not.
            grid: of the latents that are drawn, ``(height, width)``.
            sampling: of text.
            steps: of denoising; Transfusion takes 250.
            guidance: w of ``u + w (c - u)``, c predicted with the text and u without (arXiv 2207.12598); 1 is c.
                Needs a model that was trained with ``condition_dropout``. Transfusion takes 3 to 5.
            stop: a text token after which a sequence is complete.
            pictures: whether text may begin pictures by itself.
            generator: of the noise, on the device of the tokens.
        """
        return generate(
            self,
            tokens,
            new_tokens,
            grid,
            latents=latents,
            positions=positions,
            sampling=sampling or Sampling(),
            steps=steps,
            guidance=guidance,
            stop=stop,
            may_begin=pictures,
            generator=generator,
        )

    def _placement(
        self, tokens: Tensor, latents: Latents, positions: Positions, name: str = "latents"
    ) -> tuple[Placement, Tensor]:
        """Where the pictures are, and the tokens without the ids in them, which do not matter."""
        check_tokens(tokens)
        sizes = (self.config.dim_latent, self.config.patch_size, self.config.grid_dimensions)
        placement = Placement.of(tokens.shape, tokens.device, latents, positions, *sizes, name)
        tokens = placement.filled(tokens, self.config.null)
        check_ids(tokens, self.config.text_size, "text_size")
        return placement, tokens

    def _routing(self, tokens: Tensor, placement: Placement, modality: Tensor | Routing | None) -> Routing:
        if isinstance(modality, Routing):
            return modality
        ids = placement.modality(tokens) if modality is None else modality
        if ids.shape != tokens.shape:
            raise ValueError(f"modality must have the shape of tokens, {list(tokens.shape)}, got {list(ids.shape)}")
        return Routing.from_ids(ids, 2, device=tokens.device)

    def _run(
        self,
        tokens: Tensor,
        placement: Placement,
        times: Tensor,
        routing: Routing,
        cu_seqlens: Tensor | None,
        state: DecoderState | None = None,
        return_state: bool = False,
    ) -> TransfusionOutput:
        placement.require_in_documents(cu_seqlens)
        x = self.embedding(routing.sort(tokens).clamp(min=0))
        flat = x.flatten(0, 1)
        if not placement.count and not torch.is_grad_enabled():  # with gradients, all parameters take part
            y, new_state = self._decoded(x, routing, cu_seqlens, None, state, return_state)
            return TransfusionOutput(y, [], placement, routing, new_state)
        time = self.time(times)
        pictures = Pictures.from_spans(placement.begin, placement.lengths, routing, time)
        rows, kept = [routing.rows[group.places.flatten()].long() for group in placement.groups], []
        for group, where in zip(placement.groups, rows, strict=True):
            patches, skipped = self._patches_of(group, time[group.pictures])
            flat = flat.index_copy(0, where, patches.flatten(0, 1).to(flat.dtype))
            kept.append(skipped)
        y, new_state = self._decoded(flat.view(x.shape), routing, cu_seqlens, pictures, state, return_state)
        predictions = []
        for group, where, skipped in zip(placement.groups, rows, kept, strict=True):
            made = y.flatten(0, 1).index_select(0, where).view(*group.places.shape, y.shape[-1])
            predictions.append(self.patches.decode(made, skipped, group.grid, time[group.pictures]))
        return TransfusionOutput(y, predictions, placement, routing, new_state)

    def _decoded(
        self,
        x: Tensor,
        routing: Routing,
        cu_seqlens: Tensor | None,
        pictures: Pictures | None,
        state: DecoderState | None,
        return_state: bool,
    ) -> tuple[Tensor, DecoderState | None]:
        if return_state:
            return self.decoder(x, routing, cu_seqlens=cu_seqlens, pictures=pictures, state=state, return_state=True)
        return self.decoder(x, routing, cu_seqlens=cu_seqlens, pictures=pictures, state=state), None

    def _patches_of(self, group: Group, time: Tensor) -> tuple[Tensor, list[Tensor]]:
        patches, skipped = self.patches.encode(group.latents.to(self.embedding.weight.dtype), time)
        patches = patches + grid_waves(group.tokens_grid, patches.shape[-1], patches.device).to(patches.dtype)
        return (patches if self.config.decoder.modulated else patches + time[:, None]), skipped

    def _text_loss(self, hidden: Tensor, labels: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of sorted labels, and their number. Text has the first rows: only those need logits."""
        flat, labels = hidden.flatten(0, 1), labels.flatten()
        if routing.host_offsets is not None and not torch.compiler.is_compiling():
            texts = int(routing.host_offsets[1])
            flat, labels = flat[:texts], labels[:texts]
        logits = self.text_logits(flat)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = (labels >= 0).sum()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / count.clamp(min=1), count
