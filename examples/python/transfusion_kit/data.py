# SPDX-License-Identifier: Apache-2.0
"""Scenes as text around a picture of latents, with the noise that is put on it.

<bos> caption <boi> 64 latents <eoi> <eos>        <bos> <boi> 64 latents <eoi> caption <eos>
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emoji_scenes import Scenes, SceneSource, render
from scene_streams.layout import HOLE, SLOT, arrange
from scene_streams.patches import PatchLatents
from scene_streams.vocabulary import BOI, BOS, EOI, EOS, NULL, Vocabulary
from torch import Tensor
from training_kit.task import Batch
from training_kit.transfer import to_device

from mixture_of_mamba import Routing

__all__ = ["LatentStreams"]

NOISE, TIMES = 1, 2  # of the random numbers of a step
LATEST_TIME = (1.0, 0.5)  # caption first, picture first: as in Transfusion, a caption must be readable off its picture
DROPPED = 0.1  # of the samples with the caption first, their text is taken away: guidance needs to know the difference


@dataclass(frozen=True)
class LatentStreams:
    """Scenes as samples of text and latents, on the device of ``sprites``; ``side`` latents along each side."""

    vocabulary: Vocabulary
    latents: PatchLatents
    sprites: Tensor
    side: int

    def batch(self, source: SceneSource, step: int, size: int, share: slice, *, drop: bool = False) -> Batch:
        """What :meth:`Transfusion.loss` takes: tokens, latents, positions, routing, times, noise, dropped.

        Args:
            source, step, size: which scenes, and how many.
            share: of them, what is on this device.
            drop: take the text of some samples away, as in training.
        """
        scenes = source.batch(step, size)
        one = {i: np.full((size, 1), i) for i in (BOS, EOS, BOI, EOI)}
        slots = np.full((size, self.side**2), SLOT)
        image = np.concatenate((one[BOI], slots, one[EOI]), 1)
        orders = [(0, 1, 2, 3), (0, 2, 1, 3)]
        rows = arrange([one[BOS], self.vocabulary.captions(scenes), image, one[EOS]], orders, step)
        picture_first = (np.arange(size) + step) % 2

        random = np.random.default_rng([source.seed, source.stream, step, TIMES])
        times = (random.random(size) * np.take(LATEST_TIME, picture_first)).astype(np.float32)
        dropped = (random.random(size) < DROPPED) & (picture_first == 0) & drop

        mine = rows[share]
        modality = torch.from_numpy(np.where(mine == SLOT, 1, np.where(mine == HOLE, -1, 0)))
        offsets = (mine == SLOT).argmax(1)
        device = self.sprites.device
        inputs = (
            to_device(np.where(mine == SLOT, NULL, mine), device),
            self.picture_latents(scenes[share]),
            torch.from_numpy(np.stack((np.arange(len(mine)), offsets), 1)),
            Routing.from_ids(modality, 2, device=device),
            to_device(times[share], device),
            self._noise(source, step, size)[share],
            to_device(dropped[share], device),
        )
        return Batch(inputs, int((rows != HOLE).sum()))

    def picture_latents(self, scenes: Scenes) -> Tensor:
        """``[scenes, side, side, latents]``."""
        return self.latents.encode(render(scenes, self.sprites)).unflatten(1, (self.side, self.side))

    def pictures(self, latents: Tensor) -> Tensor:
        """The inverse: ``[scenes, 3, height, width]``."""
        return self.latents.decode(latents.flatten(1, 2))

    def _noise(self, source: SceneSource, step: int, size: int) -> Tensor:
        """From a generator of this step alone, on the device."""
        words = np.random.SeedSequence([source.seed, source.stream, step, NOISE]).generate_state(1, np.uint64)
        random = torch.Generator(self.sprites.device).manual_seed(int(words[0]) >> 1)
        shape = (size, self.side, self.side, len(self.latents.basis))
        return torch.randn(shape, generator=random, device=self.sprites.device)
