# SPDX-License-Identifier: Apache-2.0
"""One causal stream of text and image tokens.

    text first    BOS caption BOI code x 64 EOI EOS
    image first   BOS BOI code x 64 EOI caption EOS

Token ids: special tokens, words, image codes. Image codes are modality 1, everything else modality 0, and what
pads a sample to the common length is -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emoji_scenes import Scene, render
from torch import Tensor
from training_kit.transfer import to_device

import mixture_of_mamba as mom
from chameleon_kit.patches import PatchTokeniser

__all__ = ["BOI", "BOS", "EOI", "EOS", "IMAGE", "NUM_MODALITIES", "TEXT", "Batch", "Vocabulary", "encode_batch"]

TEXT, IMAGE = 0, 1
NUM_MODALITIES = 2
PADDING_LABEL = -100

SPECIAL = ("<pad>", "<unk>", "<bos>", "<boi>", "<eoi>", "<eos>")
PAD, UNKNOWN, BOS, BOI, EOI, EOS = range(len(SPECIAL))
SPECIAL_PER_SAMPLE = 4


class Vocabulary:
    """Words and image codes in one numbering.

    Args:
        words: the words that have a token of their own; any other word is ``<unk>``.
        codes: number of image codes.
        patches: image codes per picture.
        longest_caption: in words; longer captions are cut.
    """

    def __init__(self, words: list[str], codes: int, patches: int, longest_caption: int) -> None:
        self.words = words
        self.codes = codes
        self.patches = patches
        self.longest_caption = longest_caption
        self._ids = {word: len(SPECIAL) + index for index, word in enumerate(words)}

    @property
    def first_code(self) -> int:
        return len(SPECIAL) + len(self.words)

    @property
    def size(self) -> int:
        return self.first_code + self.codes

    @property
    def sample_length(self) -> int:
        return SPECIAL_PER_SAMPLE + self.longest_caption + self.patches

    def encode_text(self, caption: str) -> list[int]:
        return [self._ids.get(word, UNKNOWN) for word in caption.split()[: self.longest_caption]]

    def decode_text(self, ids: list[int]) -> str:
        return " ".join(self.words[i - len(SPECIAL)] if i >= len(SPECIAL) else SPECIAL[i] for i in ids)


@dataclass(frozen=True)
class Batch:
    """Samples ready for the decoder: tokens, slots and labels int64 ``[batch, length]`` in sorted order.

    Attributes:
        routing: of the input tokens.
        tokens: the input.
        slots: 0 outside pictures; 1 .. patches where the next token is that code of a picture.
        labels: the token that follows each input token; PADDING_LABEL where there is none.
        num_tokens: tokens that are not padding.
    """

    routing: mom.Routing
    tokens: Tensor
    slots: Tensor
    labels: Tensor
    num_tokens: int


def encode_batch(
    scenes: list[Scene], vocabulary: Vocabulary, tokeniser: PatchTokeniser, sprites: Tensor, first_order: int = 0
) -> Batch:
    """Scenes as samples of text and image, on the device of ``sprites``.

    Every other sample has its image first: those whose index plus ``first_order`` is odd.
    """
    device = sprites.device
    codes = tokeniser.encode(render(scenes, sprites)) + vocabulary.first_code
    tokens = np.full((len(scenes), vocabulary.sample_length), PAD)
    image_begin = np.empty(len(scenes), dtype=np.int64)
    for index, scene in enumerate(scenes):
        caption = vocabulary.encode_text(scene.caption)
        image = [BOI, *[PAD] * vocabulary.patches, EOI]
        image_first = (index + first_order) % 2 == 1
        sample = [BOS, *image, *caption, EOS] if image_first else [BOS, *caption, *image, EOS]
        tokens[index, : len(sample)] = sample
        image_begin[index] = sample.index(BOI) + 1

    # The place of each code is known on the CPU, so routing costs no wait for the device that holds the codes.
    slots = np.arange(vocabulary.sample_length) - image_begin[:, None]
    inside = (slots >= 0) & (slots < vocabulary.patches)
    modality = np.where(inside, IMAGE, np.where(tokens == PAD, -1, TEXT))[:, :-1]
    next_slots = np.where(inside, slots + 1, 0)[:, 1:]

    at = to_device(image_begin[:, None] + np.arange(vocabulary.patches), device)
    stream = to_device(tokens, device).scatter(1, at, codes)
    labels = stream[:, 1:]
    labels = labels.masked_fill(labels == PAD, PADDING_LABEL)

    routing = mom.Routing.from_ids(torch.from_numpy(modality), NUM_MODALITIES, device=device)
    return Batch(
        routing=routing,
        tokens=routing.sort(stream[:, :-1].contiguous()),
        slots=routing.sort(to_device(np.ascontiguousarray(next_slots), device)),
        labels=routing.sort(labels.contiguous()),
        num_tokens=int((modality >= 0).sum()),
    )
