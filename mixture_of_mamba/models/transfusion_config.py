# SPDX-License-Identifier: Apache-2.0
"""Sizes and settings of a Transfusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mixture_of_mamba.models.config import DecoderConfig
from mixture_of_mamba.models.diffusion import Diffusion

__all__ = ["TransfusionConfig"]


@dataclass(frozen=True)
class TransfusionConfig:
    """What a :class:`Transfusion` is made of.

    Attributes:
        decoder: with two modalities, 0 text and 1 pictures. With ``modulated``, a picture's diffusion time modulates
            norms and residuals (adaLN-zero); without, it is added to its tokens, as Transfusion does. With
            ``bidirectional``, pictures are scanned both ways.
        text_size: text tokens, ids 0 .. text_size - 1.
        dim_latent: channels of a latent (8 in Transfusion's autoencoder).
        boi, eoi, null: text tokens: before a picture, after it, and in the place of text that guidance takes away.
        prediction: see :class:`Diffusion`; Transfusion predicts epsilon.
        patches: "linear", or "unet", which a causal decoder needs more.
        patch_size: latents along each side of a patch (2 in Transfusion).
        grid_dimensions: 2 for images, 1 for sound; "unet" is for 2.
        unet_channels: of its first level.
        diffusion_weight: lambda, 5 in Transfusion.
        condition_dropout: in training, probability that a sequence with pictures has its text replaced by ``null``.
        tied: the text head is the embedding.
    """

    decoder: DecoderConfig
    text_size: int
    dim_latent: int
    boi: int
    eoi: int
    null: int
    prediction: Literal["velocity", "epsilon", "v"] = "epsilon"
    patches: Literal["linear", "unet"] = "linear"
    patch_size: int = 2
    grid_dimensions: int = 2
    unet_channels: int = 128
    diffusion_weight: float = 5.0
    condition_dropout: float = 0.1
    tied: bool = False

    def __post_init__(self) -> None:
        if self.decoder.num_modalities != 2:
            raise ValueError(f"decoder.num_modalities must be 2, text and pictures, got {self.decoder.num_modalities}")
        for name in ("text_size", "dim_latent", "patch_size", "grid_dimensions", "unet_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        special = (self.boi, self.eoi, self.null)
        if len(set(special)) < 3 or not all(0 <= token < self.text_size for token in special):
            raise ValueError(
                f"boi, eoi and null must be three text tokens in 0 .. text_size - 1 = {self.text_size - 1}, "
                f"got {special}"
            )
        if self.patches not in ("linear", "unet"):
            raise ValueError(f'patches must be "linear" or "unet", got {self.patches!r}')
        if self.patches == "unet" and (self.patch_size.bit_count() != 1 or self.grid_dimensions != 2):
            raise ValueError(
                'patch_size must be a power of two and grid_dimensions 2 when patches is "unet", '
                f"got {self.patch_size} and {self.grid_dimensions}"
            )
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"condition_dropout must lie in 0 .. 1, got {self.condition_dropout}")
        Diffusion(self.prediction)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return asdict(self) | {"decoder": self.decoder.to_dict()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TransfusionConfig:
        """The inverse of :meth:`to_dict`."""
        return TransfusionConfig(**{**values, "decoder": DecoderConfig.from_dict(values["decoder"])})
