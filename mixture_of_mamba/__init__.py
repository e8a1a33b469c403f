# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-Mamba: modality-aware Mamba layers on fused CPU and CUDA operators."""

from mixture_of_mamba import _library

_library.load()

from mixture_of_mamba.integrations.causal_conv1d import (  # noqa: E402
    causal_conv1d_fn,
    causal_conv1d_update,
)
from mixture_of_mamba.integrations.mamba_ssm import mamba_inner_fn, selective_scan_fn  # noqa: E402
from mixture_of_mamba.nn import (  # noqa: E402
    Mamba,
    MambaState,
    MixtureOfMamba,
    ModalityLinear,
)
from mixture_of_mamba.ops import (  # noqa: E402
    causal_conv1d,
    causal_conv1d_step,
    grouped_linear,
    modality_routing,
    permute_rows,
    sac_save_list,
    selective_scan,
    selective_scan_step,
)
from mixture_of_mamba.routing import Routing  # noqa: E402
from mixture_of_mamba.version import __version__  # noqa: E402

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
    "mamba_inner_fn",
    "modality_routing",
    "permute_rows",
    "sac_save_list",
    "selective_scan",
    "selective_scan_fn",
    "selective_scan_step",
]
