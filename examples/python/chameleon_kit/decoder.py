# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, N x (RMSNorm -> mixer -> residual), norm, tied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import mixture_of_mamba as mom
from chameleon_kit.stream import NUM_MODALITIES, PADDING_LABEL, Batch, Vocabulary

__all__ = ["Decoder", "ModalityLosses", "modality_losses"]

INIT_STD = 0.02


class Decoder(nn.Module):
    """Causal language model over text and image tokens.

    In training the residual stream stays sorted by modality through all layers: a batch's tokens and labels are
    already sorted, so no layer moves a row.

    Args:
        vocabulary: gives the number of tokens and of slots in a picture.
        d_model, layers: width and depth.
        mixer: "mom" (one set of projections per modality) or "mamba" (dense, the same FLOPs per token).
    """

    def __init__(self, vocabulary: Vocabulary, d_model: int, layers: int, mixer: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary.size, d_model)
        self.slots = nn.Embedding(vocabulary.patches + 1, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-5) for _ in range(layers))
        self.mixers = nn.ModuleList(
            mom.MixtureOfMamba(d_model, NUM_MODALITIES, layer_idx=index)
            if mixer == "mom"
            else mom.Mamba(d_model, layer_idx=index)
            for index in range(layers)
        )
        self.final_norm = nn.RMSNorm(d_model, eps=1e-5)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        nn.init.normal_(self.slots.weight, std=INIT_STD)
        with torch.no_grad():
            for name, parameter in self.mixers.named_parameters():
                if "out_proj" in name and name.endswith("weight"):
                    parameter.mul_((2 * layers) ** -0.5)

    def forward(self, tokens: Tensor, slots: Tensor, routing: mom.Routing) -> Tensor:
        """Sorted tokens and slots ``[batch, length]`` -> sorted logits ``[batch, length, vocabulary]``."""
        x = self.embedding(tokens) + self.slots(slots)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), routing, sorted=True)
        return functional.linear(self.final_norm(x), self.embedding.weight)

    def advance(
        self, tokens: Tensor, slots: Tensor, modality: Tensor, states: list[mom.MambaState] | None
    ) -> tuple[Tensor, list[mom.MambaState]]:
        """Continue sequences: any number of tokens in time order -> (logits of each, states after the last)."""
        routing = mom.Routing.from_ids(modality, NUM_MODALITIES, device=tokens.device)
        x = self.embedding(tokens) + self.slots(slots)
        new_states = []
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            state = None if states is None else states[index]
            y, state = mixer(norm(x), routing, state=state, return_state=True)
            x = x + y
            new_states.append(state)
        return functional.linear(self.final_norm(x), self.embedding.weight), new_states


@dataclass(frozen=True)
class ModalityLosses:
    """Sums over the labels of a batch, float32 ``[text, image]``, by the modality of the label.

    Attributes:
        cross_entropy: in nats.
        z: squared logarithm of the softmax's denominator; a little of it in the loss keeps logits from drifting.
        count: labels.
    """

    cross_entropy: Tensor
    z: Tensor
    count: Tensor


def modality_losses(logits: Tensor, batch: Batch, vocabulary: Vocabulary) -> ModalityLosses:
    """Losses of sorted logits ``[batch, length, vocabulary]``, in float32 whatever their dtype."""
    labels = batch.labels.flatten()
    logits = logits.flatten(0, 1).float()
    cross_entropy = functional.cross_entropy(logits, labels, ignore_index=PADDING_LABEL, reduction="none")
    is_image = labels >= vocabulary.first_code
    is_text = (labels != PADDING_LABEL) & ~is_image
    masks = torch.stack((is_text, is_image)).float()
    squared_log_z = logits.logsumexp(-1).square()
    return ModalityLosses((masks * cross_entropy).sum(1), (masks * squared_log_z).sum(1), masks.sum(1))
