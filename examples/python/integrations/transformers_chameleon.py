# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Mamba in the place of attention in Hugging Face transformers' own Chameleon, for training.

    model = use_mixture_of_mamba(ChameleonForConditionalGeneration(config))
    hidden = model.model(tokens, use_cache=False, modality=routing_of(tokens, mask, image_ids)).last_hidden_state
    loss = cross_entropy(model.lm_head(hidden)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

transformers hands a keyword that it does not know, ``modality``, down to every layer. ``model(..., labels=...)`` takes
it as well, but there the logits of image codes are the lowest number, so that only text has a finite loss. Decoding
would need the layers' states, which the key-value cache has no place for: train with ``use_cache=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import ChameleonForConditionalGeneration

import mixture_of_mamba as mom

NUM_MODALITIES = 2  # text, image


class Mixer(nn.Module):
    """What ``ChameleonAttention`` is called for: ``(output, attention weights)``, of which there are none."""

    def __init__(self, width: int, layer_idx: int) -> None:
        super().__init__()
        self.mamba = mom.MixtureOfMamba(width, NUM_MODALITIES, layer_idx=layer_idx)

    def forward(self, hidden_states: Tensor, *, modality: mom.Routing, **unused: object) -> tuple[Tensor, None]:
        return self.mamba(hidden_states, modality), None


def use_mixture_of_mamba(model: ChameleonForConditionalGeneration) -> ChameleonForConditionalGeneration:
    """Replace the attention of every decoder layer, in place; the rest keeps its weights."""
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = Mixer(model.config.hidden_size, index).to(model.device)
    return model


def routing_of(tokens: Tensor, attention_mask: Tensor | None, image_ids: Tensor) -> mom.Routing:
    """Image codes (and ``<image>``, where they are put in) are modality 1, padding is -1, all else is text, 0."""
    ids = torch.isin(tokens, image_ids).long()
    if attention_mask is not None:
        ids = ids.masked_fill(attention_mask == 0, -1)
    return mom.Routing.from_ids(ids, NUM_MODALITIES)
