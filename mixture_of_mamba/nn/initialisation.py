# SPDX-License-Identifier: Apache-2.0
"""The parameters of a block before training, as in the Mamba paper (arXiv 2312.00752, section 3.6 and its code)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from mixture_of_mamba.nn.modality_linear import ModalityLinear

if TYPE_CHECKING:
    from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = ["initialise", "mark"]


@torch.no_grad()
def initialise(layer: MixtureOfMamba) -> None:
    """dt in [dt_min, dt_max] per modality, A = -(1 .. d_state), D = 1; linears, convolution and norms as torch does.

    Shared experts become zero: what they and the specific ones give together has the specific ones' variance.
    """
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.RMSNorm)):
            module.reset_parameters()
    for module in layer.modules():
        if isinstance(module, ModalityLinear) and module.shared is not None:
            nn.init.zeros_(module.shared.weight)
    # Made from the parameter itself, so that a sharded one (DTensor) gives sharded values.
    layer.A_log.copy_(torch.ones_like(layer.A_log, dtype=torch.float32).cumsum(dim=-1).log())
    layer.D.fill_(1.0)
    dt_proj = layer.dt_proj
    for child in dt_proj.linears if isinstance(dt_proj, ModalityLinear) else [dt_proj]:
        _initialise_dt(layer, child)
    mark(layer)


def mark(layer: MixtureOfMamba) -> None:
    """``_no_weight_decay`` on A_log, D and the biases of dt; ``_no_reinit`` on the latter, as in ``mamba_ssm``.

    Marks are attributes, and torch drops them wherever it puts another ``nn.Parameter`` in the place of one: so the
    layer calls this after each of those.
    """
    biases = [parameter for name, parameter in layer.dt_proj.named_parameters() if name.split(".")[-1] == "bias"]
    for parameter in (layer.A_log, layer.D, *biases):
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
    for bias in biases:
        bias._no_reinit = True  # type: ignore[attr-defined]


def _initialise_dt(layer: MixtureOfMamba, linear: nn.Linear) -> None:
    bound = layer.dt_rank**-0.5 * layer.dt_scale
    if layer.dt_init == "constant":
        linear.weight.fill_(bound)
    else:
        linear.weight.uniform_(-bound, bound)
    low, high = math.log(layer.dt_min), math.log(layer.dt_max)
    dt = torch.rand_like(linear.bias, dtype=torch.float32)
    dt = (low + dt * (high - low)).exp().clamp(min=layer.dt_init_floor)
    linear.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
