# SPDX-License-Identifier: Apache-2.0
"""Sizes of a run, and what a benchmark consists of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import mixture_of_mamba as mom

__all__ = ["Case", "Shape", "placed", "relative_error"]


@dataclass(frozen=True)
class Shape:
    """Sizes of one run. d_inner is 2 * d_model, dt_rank d_model / 16, as in Mamba."""

    batch: int
    length: int
    d_model: int
    d_state: int = 16
    d_conv: int = 4
    modalities: int = 3
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def d_inner(self) -> int:
        return 2 * self.d_model

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def randn(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(*sizes, device=self.device) * scale).to(dtype or self.dtype)

    def routing(self) -> mom.Routing:
        """Modalities interleaved at random, half of the tokens in the first."""
        shares = torch.tensor([0.5] + [0.5 / max(1, self.modalities - 1)] * (self.modalities - 1))
        ids = torch.multinomial(shares, self.tokens, replacement=True).view(self.batch, self.length)
        return mom.Routing.from_ids(ids, self.modalities, device=self.device)


@dataclass
class Case:
    """Contenders of one benchmark; the first is this library's."""

    contenders: dict[str, Callable[[], object]]
    gate: Callable[[], float]  # relative error against a reference
    tolerance: float
    bytes_moved: float = 0.0
    bytes_of: dict[str, int] = field(default_factory=dict)  # of contenders that move another number
    flops: float = 0.0
    notes: list[str] = field(default_factory=list)


def placed(mixer: mom.MixtureOfMamba, device: str, dtype: torch.dtype) -> mom.MixtureOfMamba:
    """On the device, in the dtype; A and D stay float32, as in training."""
    mixer.to(device, dtype)
    mixer.A_log.data, mixer.D.data = mixer.A_log.data.float(), mixer.D.data.float()
    return mixer


def relative_error(value: Tensor, reference: Tensor) -> float:
    difference = (value.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp(min=1e-30))
