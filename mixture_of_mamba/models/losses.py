# SPDX-License-Identifier: Apache-2.0
"""Next-token losses, apart by modality."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.nn.checks import check_cu_seqlens

__all__ = ["IGNORED", "ModalityLosses", "modality_losses", "next_tokens"]

IGNORED = -1


@dataclass(frozen=True)
class ModalityLosses:
    """Sums over labels, float32 ``[modalities]``, by the modality of the label.

    Attributes:
        cross_entropy: in nats.
        z: square of the logarithm of the softmax's denominator (PaLM, arXiv 2204.02311, section 5).
        count: labels.
    """

    cross_entropy: Tensor
    z: Tensor
    count: Tensor

    def means(self) -> Tensor:
        """Cross-entropy of each modality in nats a label, ``[modalities]``; 0 where there is no label."""
        return self.cross_entropy / self.count.clamp(min=1)

    def total(self, z_weight: float = 1e-5) -> Tensor:
        """Mean over all labels of cross-entropy + z_weight x z, what is minimised. 1e-5 is Lumina-mGPT's."""
        return (self.cross_entropy + z_weight * self.z).sum() / self.count.sum().clamp(min=1)


def next_tokens(tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Labels: the token after each, of the same document; -1 where there is none, before and on padding.

    Args:
        tokens: int64 ``[batch, length]`` in time order, -1 is padding.
        cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed documents; by default each row is one.
    """
    check_cu_seqlens(cu_seqlens)
    labels = F.pad(tokens.flatten(), (0, 1), value=IGNORED)[1:]
    if cu_seqlens is None:
        labels = labels.view(tokens.shape)
        last = torch.arange(tokens.shape[1], device=tokens.device) == tokens.shape[1] - 1
        return torch.where(last | (tokens < 0), IGNORED, labels)
    time = torch.arange(tokens.numel(), device=tokens.device)
    last = cu_seqlens[1:][interval_of(time, cu_seqlens)] == time + 1
    return torch.where(last.view(tokens.shape) | (tokens < 0), IGNORED, labels.view(tokens.shape))


def modality_losses(logits: Tensor, labels: Tensor, label_modality: Tensor, num_modalities: int) -> ModalityLosses:
    """Losses in float32 at least, whatever the dtype of the logits.

    Args:
        logits: ``[.., vocabulary]``.
        labels: int64 ``[..]``; negative ones are left out.
        label_modality: int64 ``[..]``, modality of each label; -1 where there is none.
    """
    labels, which = labels.flatten(), label_modality.flatten()
    logits = logits.flatten(0, -2)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_z = logits.logsumexp(-1)
    counted = labels >= 0
    chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    # Logits of padding may be anything: they are taken out before they are multiplied with 0.
    entropy = torch.where(counted, log_z - chosen, 0)
    z = torch.where(counted, log_z.square(), 0)
    modalities = torch.arange(num_modalities, device=labels.device)
    masks = ((modalities[:, None] == which) & counted).to(logits.dtype)
    # No matrix products: autocast would round the sums to 16 bits.
    return ModalityLosses((masks * entropy).sum(1), (masks * z).sum(1), masks.sum(1))
