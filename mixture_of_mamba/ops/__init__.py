# SPDX-License-Identifier: Apache-2.0
"""Operators, as functions. Each module holds one op: contract, fake, autograd, autocast, vmap, FLOPs."""

from __future__ import annotations

import torch

from mixture_of_mamba.ops import _mamba_block_flops  # noqa: F401  registers formulas
from mixture_of_mamba.ops.causal_conv1d import causal_conv1d, causal_conv1d_step
from mixture_of_mamba.ops.grouped_linear import grouped_linear
from mixture_of_mamba.ops.mamba_block import mamba_block, mamba_block_step
from mixture_of_mamba.ops.modality_routing import modality_routing
from mixture_of_mamba.ops.permute_rows import permute_rows
from mixture_of_mamba.ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "causal_conv1d",
    "causal_conv1d_step",
    "grouped_linear",
    "mamba_block",
    "mamba_block_step",
    "modality_routing",
    "permute_rows",
    "sac_save_list",
    "selective_scan",
    "selective_scan_step",
]


def sac_save_list() -> list[torch._ops.OpOverload]:
    """Overloads whose outputs selective activation checkpointing should keep: the block, the scan, the projections.

    For ``torch.utils.checkpoint.create_selective_checkpoint_contexts``. The convolution and the permutations
    are cheap to recompute and left out.
    """
    ops = torch.ops.mixture_of_mamba
    return [ops.mamba_block.default, ops.selective_scan.default, ops.grouped_linear.default]
