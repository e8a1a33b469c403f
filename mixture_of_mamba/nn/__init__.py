# SPDX-License-Identifier: Apache-2.0
"""Layers."""

from mixture_of_mamba.nn.mamba import Mamba
from mixture_of_mamba.nn.mixture_of_mamba import PROJECTIONS, MixtureOfMamba
from mixture_of_mamba.nn.modality_linear import ModalityLinear
from mixture_of_mamba.nn.state import MambaState

__all__ = ["PROJECTIONS", "Mamba", "MambaState", "MixtureOfMamba", "ModalityLinear"]
