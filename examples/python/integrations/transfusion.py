# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Mamba in the place of attention in transfusion-pytorch's Transformer, for training.

    transfusion = Transfusion(num_text_tokens=256, dim_latent=16, transformer=dict(dim=64, depth=2))
    use_mixture_of_mamba(transfusion.transformer, num_types=1)
    loss = transfusion(batch)

Text is modality 0, type t is modality t + 1. In a batch of latents alone the transformer is not told their type, and
they count as type 0. The mixer is causal inside an image too; two of them, one called with
``reverse=True`` on the image's tokens alone, would see both sides. Sampling goes through a key-value cache, which the
mixer does not have.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transfusion_pytorch.transfusion import Transformer

import mixture_of_mamba as mom


class Mixer(nn.Module):
    """What ``Attention`` is called for: ``((output, values), key-value cache)``, of which only the output is used."""

    modality: mom.Routing | int

    def __init__(self, width: int, num_types: int) -> None:
        super().__init__()
        self.mamba = mom.MixtureOfMamba(width, num_types + 1)

    def forward(self, x: Tensor, **unused: Any) -> tuple[tuple[Tensor, Tensor], None]:
        return (self.mamba(x, self.modality), x), None


def use_mixture_of_mamba(transformer: Transformer, num_types: int) -> None:
    """Replace the attention of every layer, in place."""
    for _, attention, _, _ in transformer.layers:
        attention.fn = Mixer(transformer.dim, num_types).to(next(transformer.parameters()).device)
    transformer.register_forward_pre_hook(_tell_the_mixers, with_kwargs=True)


def _tell_the_mixers(transformer: Transformer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The batch's modalities, once for all layers. They stand in the call, but do not reach the attention."""
    x, positions = args[0], kwargs.get("modality_positions")
    routing: mom.Routing | int = 1 if kwargs.get("modality_only") else 0
    if positions is not None:
        segments = positions.tolist() if isinstance(positions, Tensor) else positions
        modalities = transformer.layers[0][1].fn.mamba.num_modalities
        routing = mom.Routing.from_segments(
            segments, tuple(x.shape[:2]), num_modalities=modalities, first_modality=1, device=x.device
        )
    for _, attention, _, _ in transformer.layers:
        attention.fn.modality = routing
