# SPDX-License-Identifier: Apache-2.0
"""A parameter per modality, spread over the rows of a batch: for what no operator takes per modality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.routing import Routing

__all__ = ["of_rows"]


def of_rows(parameter: Tensor, routing: Routing) -> Tensor:
    """``[modalities, channels]`` -> ``[tokens, channels]``, rows in sorted order.

    Padding takes the last modality's; the scan passes over it and sends back zeros.
    """
    rows = torch.arange(routing.num_tokens, dtype=torch.int32, device=parameter.device)
    # An embedding's gradient is a sum in fixed order; that of indexing is not on a CPU.
    return F.embedding(interval_of(rows, routing.offsets), parameter)
