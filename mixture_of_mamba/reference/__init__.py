# SPDX-License-Identifier: Apache-2.0
"""The definition of every operator: slow, obvious torch with the operators' signatures.

Differentiable any number of times, on any device and in any dtype. Values are as the operators define them; speed,
memory, and the checks of arguments are not.
"""

from mixture_of_mamba.reference.causal_conv1d import causal_conv1d, causal_conv1d_step
from mixture_of_mamba.reference.grouped_linear import grouped_linear
from mixture_of_mamba.reference.mamba_block import mamba_block
from mixture_of_mamba.reference.modality_routing import modality_routing
from mixture_of_mamba.reference.permute_rows import permute_rows
from mixture_of_mamba.reference.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "grouped_linear",
    "mamba_block",
    "modality_routing",
    "permute_rows",
    "selective_scan",
    "selective_scan_step",
]
