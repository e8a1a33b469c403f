# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Mamba: modality-aware Mamba layers on fused CPU and CUDA operators."""

import importlib
from types import ModuleType

from mixture_of_mamba import _library
from mixture_of_mamba.version import __version__

try:
    _library.load()
except ImportError:
    # `python -m mixture_of_mamba.doctor` imports the package first, and must be able to say what is wrong.
    if not _library.doctor_was_called():
        raise
else:
    from mixture_of_mamba.integrations.causal_conv1d import (
        causal_conv1d_fn,
        causal_conv1d_update,
    )
    from mixture_of_mamba.integrations.mamba_ssm import (
        mamba_inner_fn,
        selective_scan_fn,
        selective_state_update,
    )
    from mixture_of_mamba.nn import (
        Mamba,
        MambaState,
        MixtureOfMamba,
        ModalityLinear,
    )
    from mixture_of_mamba.ops import (
        causal_conv1d,
        causal_conv1d_step,
        grouped_linear,
        mamba_block,
        mamba_block_step,
        modality_routing,
        permute_rows,
        sac_save_list,
        selective_scan,
        selective_scan_step,
    )
    from mixture_of_mamba.routing import Routing

__all__ = [
    "Mamba",
    "MambaState",
    "MixtureOfMamba",
    "ModalityLinear",
    "Routing",
    "__version__",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_step",
    "causal_conv1d_update",
    "grouped_linear",
    "mamba_block",
    "mamba_block_step",
    "mamba_inner_fn",
    "modality_routing",
    "permute_rows",
    "sac_save_list",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_step",
    "selective_state_update",
]

_SUBMODULES = ("checkpoints", "integrations", "models", "reference")


def __getattr__(name: str) -> ModuleType:
    """Submodules that the package does not need itself are imported when they are named."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
