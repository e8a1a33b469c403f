# SPDX-License-Identifier: Apache-2.0
"""Packs of a discrete setting, and streams of tokens made of their scenes.

text, image            <bos> caption  <boi> 64 codes <eoi>  <eos>                       in two orders
text, image, speech    <bos> caption  <boi> 64 codes <eoi>  <bosp> codes <eosp>  <eos>  in six orders
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from emoji_scenes import Scenes, SceneSource, SpritePack, load_or_build_pack, render
from scene_streams.layout import HOLE, SLOT, arrange
from scene_streams.patches import PatchTokeniser
from scene_streams.vocabulary import BOI, BOS, BOSP, EOI, EOS, EOSP, Vocabulary
from spoken_names import SpeechPack, SpokenScenes, load_or_build_speech, phrases_of
from torch import Tensor
from training_kit.failure import fail
from training_kit.task import Batch
from training_kit.transfer import to_device

from mixture_of_mamba import Routing

__all__ = ["DiscreteData", "TokenStreams", "load_scenes", "load_spoken_scenes"]

VOICE = 1  # of the random numbers of a step, those that choose voices


@dataclass(frozen=True)
class DiscreteData:
    """The drawings, and in three modalities the names spoken."""

    pack: SpritePack
    speech: SpeechPack | None

    @property
    def checksums(self) -> dict[str, int]:
        speech = {} if self.speech is None else {"a speech pack": self.speech.checksum()}
        return {"a sprite pack": self.pack.checksum(), **speech}


def load_scenes(args: argparse.Namespace) -> DiscreteData:
    """The drawings that take part; ``args.concepts`` becomes their number."""
    pack = load_or_build_pack(args.data)
    if args.concepts is None:
        args.concepts = len(pack.names)
    if args.concepts > len(pack.names):
        fail(f"--concepts must be at most {len(pack.names)}, the size of the pack in {args.data}, got {args.concepts}")
    return DiscreteData(pack.first(args.concepts), None)


def load_spoken_scenes(args: argparse.Namespace) -> DiscreteData:
    """The same, with their names spoken."""
    pack = load_scenes(args).pack
    return DiscreteData(pack, load_or_build_speech(args.data, phrases_of(pack.names)))


@dataclass(frozen=True)
class TokenStreams:
    """Scenes as samples of all modalities, on the device of ``sprites``."""

    vocabulary: Vocabulary
    tokeniser: PatchTokeniser
    sprites: Tensor
    patches: int
    speech: SpokenScenes | None = None

    def batch(self, source: SceneSource, step: int, size: int, share: slice, *, new_recordings: bool = False) -> Batch:
        """Tokens int64 ``[batch, length]`` with -1 for padding, and their routing, of the scenes of a step.

        Sample i has its modalities in order number i + step.

        Args:
            source, step, size: which scenes, and how many.
            share: of them, what is on this device.
            new_recordings: the first name in a voice that is never trained on.
        """
        scenes = source.batch(step, size)
        one = {i: np.full((size, 1), i) for i in (BOS, EOS, BOI, EOI, BOSP, EOSP)}
        image = np.full((size, self.patches), SLOT)
        segments = [self.vocabulary.captions(scenes), np.concatenate((one[BOI], image, one[EOI]), 1)]
        if self.speech is not None:
            random = np.random.default_rng([source.seed, source.stream, step, VOICE])
            codes = self.speech.say(scenes, random, new=new_recordings)
            codes = np.where(codes == HOLE, HOLE, codes + self.vocabulary.boundaries[2])
            segments.append(np.concatenate((one[BOSP], codes, one[EOSP]), 1))
        orders = list(itertools.permutations(range(1, len(segments) + 1)))
        ends = len(segments) + 1
        rows = arrange([one[BOS], *segments, one[EOS]], [(0, *order, ends) for order in orders], step)

        # Where the codes are is known on the CPU, so routing costs no wait for the device that computes them.
        mine = rows[share]
        modality = np.searchsorted(self.vocabulary.boundaries[1:-1], mine, side="right")
        modality = np.where(mine == SLOT, 1, np.where(mine == HOLE, -1, modality))
        routing = Routing.from_ids(
            torch.from_numpy(modality), 1 + len(self.vocabulary.codes), device=self.sprites.device
        )
        tokens = to_device(mine, self.sprites.device)
        at = to_device(np.nonzero(mine == SLOT)[1].reshape(-1, self.patches), self.sprites.device)
        tokens = tokens.scatter(1, at, self.image_codes(scenes[share]) + self.vocabulary.boundaries[1])
        return Batch((tokens, routing), int((rows != HOLE).sum()))

    def image_codes(self, scenes: Scenes) -> Tensor:
        """int64 ``[scenes, patches]``, counted from 0."""
        return self.tokeniser.encode(render(scenes, self.sprites))
