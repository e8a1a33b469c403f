# SPDX-License-Identifier: Apache-2.0
"""Drawing the next token, and where in the grammar of regions each sequence is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.models.vocabulary import Vocabulary

__all__ = ["Regions", "Sampling", "draw", "nucleus"]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits.

    Attributes:
        temperature: 0 takes the likeliest.
        top_k: draw among the k likeliest only; 0 is all.
        generator: on the device of the logits.
        top_p: draw among the fewest likeliest only whose probability, after temperature and top_k, reaches this
            (the nucleus, arXiv 1904.09751); None or 1 is all.
    """

    temperature: float = 1.0
    top_k: int = 0
    generator: torch.Generator | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (all tokens), got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in 0 (not included) .. 1, or be None (all tokens), got {self.top_p}")


def draw(logits: Tensor, sampling: Sampling) -> Tensor:
    """``[batch, vocabulary]`` -> int64 ``[batch]``. Tokens whose logit is -inf are never drawn."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:  # a sum may round to 1 before the last token
        probabilities = nucleus(probabilities, sampling.top_p)
    return torch.multinomial(probabilities, 1, generator=sampling.generator).squeeze(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """0 for tokens whose likelier ones reach ``top_p`` without them; of equals the lower id is the likelier."""
    falling, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = F.pad(falling.cumsum(-1)[..., :-1], (1, 0))  # of the likeliest 0, so that it stays
    return torch.zeros_like(falling).scatter(-1, order, falling.masked_fill(likelier >= top_p, 0))


class Regions:
    """The modality that each sequence of a batch is in the middle of, and how many tokens of it there are.

    Nothing here waits for the device.

    Args:
        vocabulary: whose grammar it is.
        sequences: of how many sequences; all begin in text.
        free: whether text may begin regions.
    """

    def __init__(self, vocabulary: Vocabulary, sequences: int, device: torch.device, *, free: bool = True) -> None:
        count = vocabulary.num_modalities
        self.count = count
        self.modality = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.tokens = torch.zeros_like(self.modality)
        self._legal = vocabulary.legal(device=device, regions=free)
        lengths = [one.length or torch.iinfo(torch.int64).max for one in vocabulary.ranges]
        self._lengths = torch.tensor(lengths, device=device)
        # What a token does: -1 nothing, m it begins modality m (0: it ends a region, and text goes on).
        self._enters = torch.full((vocabulary.size,), -1, dtype=torch.int64)
        for m, one in enumerate(vocabulary.ranges[1:], start=1):
            self._enters[one.begin] = m
            self._enters[one.end] = 0
        self._enters = self._enters.to(device)

    def advance(self, tokens: Tensor) -> None:
        """See the next tokens of each sequence, int64 ``[sequences, n]``; -1 is padding and changes nothing."""
        real = tokens >= 0
        enters = torch.where(real, self._enters[tokens.clamp(min=0)], -1)
        time = torch.arange(tokens.shape[1], device=tokens.device)
        last = torch.where(enters >= 0, time, -1).max(1, keepdim=True).values  # where each was last moved to a region
        moved = last.squeeze(1) >= 0
        self.tokens = (real & (time > last)).sum(1) + torch.where(moved, 0, self.tokens)
        self.modality = torch.where(moved, enters.gather(1, last.clamp(min=0)).squeeze(1), self.modality)

    def mask(self, logits: Tensor) -> Tensor:
        """``[sequences, vocabulary]`` with -inf where a token may not follow."""
        full = self.tokens >= self._lengths[self.modality]
        return logits.masked_fill(~self._legal[self.modality + self.count * full], -torch.inf)
