# SPDX-License-Identifier: Apache-2.0
"""Words, special tokens and the codes of other modalities in one numbering."""

from __future__ import annotations

import itertools

import numpy as np
from emoji_scenes import COLOUR_NAMES, NOBODY, PLACE_NAMES, Scenes, longest_caption, template_words

from scene_streams.layout import HOLE, compact, table

__all__ = ["BOI", "BOS", "BOSP", "EOI", "EOS", "EOSP", "NULL", "SPECIAL", "UNKNOWN", "Vocabulary"]

# <bos> and <eos> enclose a sample, <boi> and <eoi> a picture, <bosp> and <eosp> speech; <null> stands for text that is
# taken away.
SPECIAL = ("<null>", "<unk>", "<bos>", "<eos>", "<boi>", "<eoi>", "<bosp>", "<eosp>")
NULL, UNKNOWN, BOS, EOS, BOI, EOI, BOSP, EOSP = range(len(SPECIAL))


class Vocabulary:
    """Text is special tokens and words; then come the codes of each other modality.

    Args:
        names: of all drawings.
        known: indices of those whose words have a token of their own; any other word is ``<unk>``.
        codes: number of codes of modality 1, 2 ...
    """

    def __init__(self, names: list[str], known: list[int], codes: tuple[int, ...]) -> None:
        self.words = sorted(template_words() | {word for concept in known for word in names[concept].split()})
        self.codes = codes
        self._ids = {word: len(SPECIAL) + index for index, word in enumerate(self.words)}
        self._names = table([*map(self._encode, names), []])  # the last one is that of NOBODY
        self._places = table([*map(self._encode, PLACE_NAMES), []])
        self._backgrounds = table([self._encode(f"on {colour}") for colour in COLOUR_NAMES])

    @property
    def boundaries(self) -> tuple[int, ...]:
        """The first id of text, of modality 1, 2 ..., and the number of ids."""
        sizes = (len(SPECIAL) + len(self.words), *self.codes)
        return (0, *(sum(sizes[: index + 1]) for index in range(len(sizes))))

    @property
    def longest_caption(self) -> int:
        return longest_caption()

    def _encode(self, text: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in text.split()]

    def captions(self, scenes: Scenes) -> np.ndarray:
        """int64 ``[scenes, longest_caption]`` with holes at the end."""
        first, second = scenes.concepts.T
        places = self._places[np.where(second == NOBODY, NOBODY, scenes.places)]
        parts = (self._names[first], places, self._names[second], self._backgrounds[scenes.backgrounds])
        rows = compact(np.concatenate(parts, axis=1))[:, : self.longest_caption]
        return np.pad(rows, ((0, 0), (0, self.longest_caption - rows.shape[1])), constant_values=HOLE)

    def decode_text(self, ids: list[int]) -> str:
        """Words up to ``<eos>``, or to the background that ends every caption; ids of other modalities are left out.

        Where speech or a picture may follow a caption, a model that is held to text goes on with more of it.
        """
        ids = ids[: ids.index(EOS)] if EOS in ids else ids
        known = [i for i in ids if 0 <= i < self.boundaries[1]]
        words = [SPECIAL[i] if i < len(SPECIAL) else self.words[i - len(SPECIAL)] for i in known]
        for index, pair in enumerate(itertools.pairwise(words)):
            if pair[0] == "on" and pair[1] in COLOUR_NAMES:
                return " ".join(words[: index + 2])
        return " ".join(words)
