# SPDX-License-Identifier: Apache-2.0
"""Noise on continuous latents, what is predicted of it, and the step back.

Time t runs from 0, clean, to 1, noise: ``x_t = alpha(t) x + sigma(t) noise``.

==========  ==================  ==================  ======================  =====================================
prediction  alpha               sigma               target                  source
==========  ==================  ==================  ======================  =====================================
velocity    1 - t               t                   noise - x               flow matching, arXiv 2210.02747,
                                                                            rectified flow, arXiv 2209.03003
epsilon     cos(pi/2 t)         sin(pi/2 t)         noise                   DDPM, arXiv 2006.11239; Transfusion
v           cos(pi/2 t)         sin(pi/2 t)         alpha noise - sigma x   arXiv 2202.00512
==========  ==================  ==================  ======================  =====================================

The cosine schedule is that of arXiv 2102.09672 without its small offset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Diffusion"]

# At t = 1 the cosine schedule leaves nothing of x, and a prediction of the noise says nothing about x: its error is
# multiplied with sigma / alpha there. Here alpha is 0.08, about what Stable Diffusion's schedule ends with (0.07).
LAST_COSINE_TIME = 0.95


@dataclass(frozen=True)
class Diffusion:
    """One way of noising and predicting. Times ``[n]`` belong to the first dimension of latents ``[n, ..]``."""

    prediction: Literal["velocity", "epsilon", "v"] = "epsilon"

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "epsilon", "v"):
            raise ValueError(f'prediction must be "velocity", "epsilon" or "v", got {self.prediction!r}')

    @property
    def last_time(self) -> float:
        """Training draws times up to here, and sampling begins here."""
        return LAST_COSINE_TIME if self.prediction == "epsilon" else 1.0

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma."""
        if self.prediction == "velocity":
            return 1 - times, times
        return torch.cos(times * (math.pi / 2)), torch.sin(times * (math.pi / 2))

    def add_noise(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        alpha, sigma = self._coefficients_like(x, times)
        return alpha * x + sigma * noise

    def target(self, x: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model shall predict from ``add_noise(x, noise, times)``."""
        if self.prediction == "velocity":
            return noise - x
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._coefficients_like(x, times)
        return alpha * noise - sigma * x

    def clean_and_noise(self, noisy: Tensor, predicted: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The x and the noise that a prediction implies."""
        alpha, sigma = self._coefficients_like(noisy, times)
        if self.prediction == "velocity":
            return noisy - sigma * predicted, noisy + alpha * predicted
        if self.prediction == "epsilon":
            return (noisy - sigma * predicted) / alpha, predicted
        return alpha * noisy - sigma * predicted, sigma * noisy + alpha * predicted

    def step(self, noisy: Tensor, predicted: Tensor, times: Tensor, earlier: Tensor) -> Tensor:
        """From ``times`` to ``earlier`` times without new noise: DDIM (arXiv 2010.02502).

        With velocities that is one step of Euler's method.
        """
        x, noise = self.clean_and_noise(noisy, predicted, times)
        return self.add_noise(x, noise, earlier)

    def _coefficients_like(self, x: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.coefficients(times.view(-1, *[1] * (x.dim() - 1)))
        return alpha, sigma
