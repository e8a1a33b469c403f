# SPDX-License-Identifier: Apache-2.0
"""What calls of a Transfusion model give."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mixture_of_mamba.models.placement import Placement
from mixture_of_mamba.models.state import DecoderState
from mixture_of_mamba.routing import Routing

__all__ = ["TransfusionLosses", "TransfusionOutput"]


@dataclass(frozen=True)
class TransfusionLosses:
    """Losses of a batch.

    Attributes:
        text: mean cross-entropy in nats over labels that are text and follow text.
        diffusion: mean over pictures of their mean squared error.
        text_count: labels.
        pictures: number of pictures.
        diffusion_weight: lambda.
    """

    text: Tensor
    diffusion: Tensor
    text_count: Tensor
    pictures: int
    diffusion_weight: float

    def total(self) -> Tensor:
        """text + lambda x diffusion, what is minimised."""
        return self.text + self.diffusion_weight * self.diffusion


@dataclass(frozen=True)
class TransfusionOutput:
    """What one call gives.

    Attributes:
        hidden: ``[batch, length, d_model]`` in sorted order.
        predictions: for each group of pictures of one size, ``[n, *grid, dim_latent]``: velocity, epsilon or v.
        placement: the groups; all pictures of one tensor of latents are one group, in order.
        routing: of the tokens.
        state: after the last token, if asked for.
    """

    hidden: Tensor
    predictions: list[Tensor]
    placement: Placement
    routing: Routing
    state: DecoderState | None
