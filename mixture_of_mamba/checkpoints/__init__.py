# SPDX-License-Identifier: Apache-2.0
"""One layer's weights from and to other libraries, and from one number of modalities to another."""

from mixture_of_mamba.checkpoints.formats import FORMATS, CheckpointError, convert
from mixture_of_mamba.checkpoints.loading import load
from mixture_of_mamba.checkpoints.upcycling import add_modality, upcycle

__all__ = ["FORMATS", "CheckpointError", "add_modality", "convert", "load", "upcycle"]
