# SPDX-License-Identifier: Apache-2.0
"""A parameter per modality, spread over the rows of a batch: for what no operator takes per modality."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.routing import Routing

__all__ = ["of_rows", "with_bias"]


def of_rows(parameter: Tensor, routing: Routing) -> Tensor:
    """``[modalities, channels]`` -> ``[tokens, channels]``, rows in sorted order.

    Padding takes the last modality's; the scan passes over it and sends back zeros.
    """
    rows = torch.arange(routing.num_tokens, dtype=torch.int32, device=parameter.device)
    # An embedding's gradient is a sum in fixed order; that of indexing is not on a CPU.
    return F.embedding(interval_of(rows, routing.offsets), parameter)


def with_bias(x: Tensor, bias: Tensor | None, routing: Routing | None) -> Tensor:
    """``x [batch, length, channels]``, rows in sorted order, with its bias, in float32 at least.

    Args:
        bias: ``[channels]``, or ``[modalities, channels]``, which needs the routing.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is None:
        return x
    bias = bias.to(x.dtype)
    if bias.dim() > 1:
        assert routing is not None
        bias = of_rows(bias, routing).view(x.shape)
    return x + bias
