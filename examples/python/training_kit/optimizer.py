# SPDX-License-Identifier: Apache-2.0
"""AdamW without decay where decay does harm, and a warm-up + cosine learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["learning_rate", "make_adamw"]

BETAS = (0.9, 0.95)
WARMUP_SHARE = 0.05
FINAL_SHARE = 0.05


def make_adamw(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """Matrices decay; vectors (biases, norms, D), embeddings and what is marked ``_no_weight_decay`` (A_log) do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, kept = [], []
    for parameter in model.parameters():
        exempt = parameter.ndim < 2 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        (kept if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """The rate of step 0 .. steps - 1."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress)))
