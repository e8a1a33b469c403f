# SPDX-License-Identifier: Apache-2.0
"""What is said of a scene: the name of its drawing, or of both with their relation between, by one voice."""

from __future__ import annotations

import numpy as np
from emoji_scenes import NOBODY, PLACE_NAMES, Scenes
from scene_streams.layout import compact, table

from spoken_names.frames import FRAMES_PER_CODE, SpeechTokeniser
from spoken_names.pack import VOICES, SpeechPack

__all__ = ["SpokenScenes", "phrases_of"]

HOLD_OUT_EVERY = 8  # of the recordings of a name, those of two voices in 16 are never trained on


def phrases_of(names: list[str]) -> list[str]:
    """What the pack must hold for drawings of these names."""
    return [*names, *PLACE_NAMES]


class SpokenScenes:
    """Codes of speech for scenes.

    Args:
        pack: of the phrases of the drawings' names.
        tokeniser: of its frames.
    """

    def __init__(self, pack: SpeechPack, tokeniser: SpeechTokeniser) -> None:
        codes = tokeniser.encode(pack.frames).numpy()
        clips = np.split(codes, pack.ends[:-1] // FRAMES_PER_CODE)
        nothing: list[list[int]] = [[]] * len(VOICES)  # what a phrase of number NOBODY sounds like
        self._clips = table([*(clip.tolist() for clip in clips), *nothing]).reshape(-1, len(VOICES), _longest(clips))
        self._first_place = len(pack.phrases) - len(PLACE_NAMES)
        names, places = self._clips[: self._first_place], self._clips[self._first_place :]
        self.longest = 2 * int((names >= 0).sum(-1).max()) + int((places >= 0).sum(-1).max())

    def say(self, scenes: Scenes, random: np.random.Generator, *, new: bool = False) -> np.ndarray:
        """Codes of each scene in a voice drawn for it.

        Args:
            scenes: what is spoken of.
            random: of the voices.
            new: the first name in a voice that training never hears it in; by default no name is said so.

        Returns:
            int64 ``[scenes, longest]``, holes at the end.
        """
        first, second = scenes.concepts.T
        paired = second != NOBODY
        voices = random.integers(len(VOICES), size=len(scenes))
        if new:
            voices = (voices - (voices + first) % HOLD_OUT_EVERY) % len(VOICES)
        else:
            for _ in range(2):  # the next voice, and the next but one: a name is held out in no two that follow
                voices = (voices + (_held_out(first, voices) | (paired & _held_out(second, voices)))) % len(VOICES)
        places = np.where(paired, self._first_place + scenes.places, NOBODY)
        rows = [self._clips[phrases, voices] for phrases in (first, places, second)]
        return compact(np.concatenate(rows, axis=1))[:, : self.longest]


def _held_out(concepts: np.ndarray, voices: np.ndarray) -> np.ndarray:
    return (concepts + voices) % HOLD_OUT_EVERY == 0


def _longest(clips: list[np.ndarray]) -> int:
    return max(map(len, clips))
