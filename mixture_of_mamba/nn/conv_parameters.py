# SPDX-License-Identifier: Apache-2.0
"""The weights of a layer's convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

if TYPE_CHECKING:
    from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = ["conv_parameters"]

MAKERS_OF_WEIGHTS = (BasePruningMethod, WeightNorm, SpectralNorm)


def conv_parameters(layer: MixtureOfMamba) -> tuple[Tensor, Tensor | None]:
    """They are read, and the module is not called: padding, packing and states are the operator's."""
    conv = layer.conv1d
    if not conv._parameters.keys() >= {"weight", "bias"}:  # what made them is called before each call of a module
        for hook in conv._forward_pre_hooks.values():
            if isinstance(hook, MAKERS_OF_WEIGHTS):
                hook(conv, ())
    return conv.weight.squeeze(1), conv.bias
