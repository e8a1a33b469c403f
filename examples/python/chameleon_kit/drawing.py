# SPDX-License-Identifier: Apache-2.0
"""Sampling from the decoder, one token at a time from its states: pictures for captions, captions for pictures."""

from __future__ import annotations

import torch
from emoji_scenes import Scene
from torch import Tensor

from chameleon_kit.decoder import Decoder
from chameleon_kit.stream import BOI, BOS, EOI, EOS, IMAGE, PAD, TEXT, Vocabulary

__all__ = ["caption_pictures", "draw_captions"]


@torch.no_grad()
def draw_captions(
    model: Decoder, vocabulary: Vocabulary, scenes: list[Scene], device: torch.device, temperature: float, seed: int
) -> Tensor:
    """Sample a picture for each caption.

    Returns:
        Codes 0 .. codes - 1, int64 ``[len(scenes), patches]``. A temperature of 0 takes the likeliest code.
    """
    prompts = [[BOS, *vocabulary.encode_text(scene.caption)] for scene in scenes]
    longest = max(map(len, prompts))
    # Padding leaves states as they were, so captions of all lengths are read at once and BOI follows for all.
    tokens = torch.tensor([prompt + [PAD] * (longest - len(prompt)) for prompt in prompts])
    modality = torch.where(tokens == PAD, -1, TEXT)
    tokens = tokens.to(device)
    _, states = model.advance(tokens, torch.zeros_like(tokens), modality, None)

    random = torch.Generator().manual_seed(seed)
    current = torch.full((len(scenes), 1), BOI, device=device)
    modality = torch.full((len(scenes), 1), TEXT)
    codes = []
    for slot in range(1, vocabulary.patches + 1):
        logits, states = model.advance(current, torch.full_like(current, slot), modality, states)
        code = _sample(logits[:, -1, vocabulary.first_code :], temperature, random)
        codes.append(code)
        current = code + vocabulary.first_code
        modality = torch.full((len(scenes), 1), IMAGE)
    return torch.cat(codes, 1)


@torch.no_grad()
def caption_pictures(model: Decoder, vocabulary: Vocabulary, codes: Tensor) -> list[str]:
    """The likeliest caption, word by word, of pictures given as codes ``[pictures, patches]``."""
    count, device = len(codes), codes.device
    begin = torch.tensor([[BOS, BOI]], device=device).expand(count, -1)
    end = torch.full((count, 1), EOI, device=device)
    tokens = torch.cat((begin, codes + vocabulary.first_code, end), 1)
    modality = torch.full(tokens.shape, TEXT)
    modality[:, 2:-1] = IMAGE
    slots = torch.zeros_like(tokens)
    slots[:, 1:-2] = torch.arange(1, vocabulary.patches + 1, device=device)
    logits, states = model.advance(tokens, slots, modality, None)

    modality = torch.full((count, 1), TEXT)
    words: list[Tensor] = []
    for _ in range(vocabulary.longest_caption):
        current = logits[:, -1:, : vocabulary.first_code].argmax(-1)
        words.append(current)
        logits, states = model.advance(current, torch.zeros_like(current), modality, states)
    captions = torch.cat(words, 1).tolist()
    return [vocabulary.decode_text(ids[: ids.index(EOS)] if EOS in ids else ids) for ids in captions]


def _sample(logits: Tensor, temperature: float, random: torch.Generator) -> Tensor:
    """``[batch, choices]`` -> ``[batch, 1]``; drawn on the CPU, so that every device draws the same."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = (logits.float().cpu() / temperature).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=random).to(logits.device)
