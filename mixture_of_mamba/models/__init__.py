# SPDX-License-Identifier: Apache-2.0
"""Models on the layers: the decoder, and what Chameleon and Transfusion put around it."""

from mixture_of_mamba.models.chameleon import Chameleon
from mixture_of_mamba.models.config import SIZES, DecoderConfig, named_config
from mixture_of_mamba.models.decoder import Decoder
from mixture_of_mamba.models.diffusion import Diffusion
from mixture_of_mamba.models.losses import ModalityLosses, modality_losses, next_tokens
from mixture_of_mamba.models.pictures import Pictures
from mixture_of_mamba.models.sampling import Sampling
from mixture_of_mamba.models.state import AttentionState, DecoderState
from mixture_of_mamba.models.transfusion import Transfusion
from mixture_of_mamba.models.transfusion_config import TransfusionConfig
from mixture_of_mamba.models.transfusion_results import TransfusionLosses, TransfusionOutput
from mixture_of_mamba.models.transfusion_sampling import Generated
from mixture_of_mamba.models.vocabulary import TokenRange, Vocabulary

__all__ = [
    "SIZES",
    "AttentionState",
    "Chameleon",
    "Decoder",
    "DecoderConfig",
    "DecoderState",
    "Diffusion",
    "Generated",
    "ModalityLosses",
    "Pictures",
    "Sampling",
    "TokenRange",
    "Transfusion",
    "TransfusionConfig",
    "TransfusionLosses",
    "TransfusionOutput",
    "Vocabulary",
    "modality_losses",
    "named_config",
    "next_tokens",
]
