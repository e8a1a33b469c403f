# SPDX-License-Identifier: Apache-2.0
"""The dense Mamba block (arXiv 2312.00752), a special case of the mixture."""

from __future__ import annotations

from typing import Any, Literal

import torch

from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = ["Mamba"]


class Mamba(MixtureOfMamba):
    """The dense Mamba block: one modality, no projection decoupled; the same code as :class:`MixtureOfMamba`.

    Constructor, parameter names and forward are those of ``mamba_ssm.Mamba``. ``modality`` may be given to
    mark padding (-1); all other ids count as one modality.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory: Literal["default", "lean"] = "default",
        bcdt_norm: bool = False,
        dt_limit: tuple[float, float] | None = None,
    ) -> None:
        del use_fast_path  # there is one path here; accepted because existing code passes it
        super().__init__(
            d_model=d_model,
            num_modalities=1,
            decouple=(),
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
            memory=memory,
            bcdt_norm=bcdt_norm,
            dt_limit=dt_limit,
        )
