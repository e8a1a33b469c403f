# SPDX-License-Identifier: Apache-2.0
"""What ``modality`` and ``modality_masks`` of a layer's call may be, and the routing that they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixture_of_mamba.routing import Routing
from mixture_of_mamba.routing_forms import ids_from_masks, kind_of

if TYPE_CHECKING:
    from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = ["routing_of"]


def routing_of(
    layer: MixtureOfMamba,
    x: Tensor,
    modality: Tensor | Routing | int | None,
    modality_masks: Tensor | Sequence[Tensor] | None,
    *,
    needed: bool = False,
) -> Routing | None:
    """The routing that a call's arguments say, checked; None when there is nothing to route and it is not needed."""
    if isinstance(x, Tensor) and x.is_nested:
        raise ValueError("x must not be a nested tensor: put its sequences one after the other and give cu_seqlens")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise ValueError(f"x must be a tensor of a floating type, got {kind_of(x)}")
    if x.dim() != 3 or x.shape[-1] != layer.d_model:
        raise ValueError(f"x must have shape [batch, length, d_model = {layer.d_model}], got {list(x.shape)}")
    if modality_masks is not None:
        modality = _ids_from_masks(layer, x, modality, modality_masks)
    elif modality is None:
        if layer.num_modalities > 1:
            raise ValueError(
                "modality must be ids [batch, length] or a Routing (or one int for all tokens, or modality_masks "
                f"in its place), since the layer has {layer.num_modalities} modalities, got None"
            )
        modality = 0
    if isinstance(modality, int):
        if modality < 0 or (layer.num_modalities > 1 and modality >= layer.num_modalities):
            raise ValueError(
                f"modality must lie in 0 .. num_modalities - 1 = {layer.num_modalities - 1} when it is an int, "
                f"got {modality}"
            )
        if not needed and _treats_all_alike(layer):
            return None
        modality = torch.full(x.shape[:2], int(modality), dtype=torch.int64, device="cpu")
    if isinstance(modality, Tensor):
        ids = modality.clamp(max=0) if layer.num_modalities == 1 else modality
        modality = Routing.from_ids(ids, layer.num_modalities, device=x.device)
    if not isinstance(modality, Routing):
        raise ValueError(
            f"modality must be ids [batch, length], a Routing, an int or a bool, got {type(modality).__name__}"
        )
    if layer.num_modalities == 1 and modality.num_modalities > 1:
        modality = modality.merged()
    if modality.num_modalities != layer.num_modalities:
        raise ValueError(
            f"modality must be a Routing of {layer.num_modalities} modalities, got {modality.num_modalities}"
        )
    if modality.shape != tuple(x.shape[:2]):
        raise ValueError(
            f"modality must have the batch and length of x, {list(x.shape[:2])}, got {list(modality.shape)}"
        )
    return modality


def _treats_all_alike(layer: MixtureOfMamba) -> bool:
    one = layer.num_modalities == 1 and layer.A_log.dim() == 2 and layer.D.dim() == 1
    return one or not layer.decouple


def _ids_from_masks(
    layer: MixtureOfMamba, x: Tensor, modality: object, modality_masks: Tensor | Sequence[Tensor]
) -> Tensor:
    if modality is not None:
        raise ValueError(f"modality_masks must come without modality, got both ({type(modality).__name__})")
    ids = ids_from_masks(modality_masks, x.shape[:2], name="modality_masks")
    if len(modality_masks) != layer.num_modalities > 1:
        raise ValueError(f"modality_masks must hold {layer.num_modalities} masks, got {len(modality_masks)}")
    return ids
