# SPDX-License-Identifier: Apache-2.0
"""Host data on its way to the device that trains."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["to_device"]


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor of ``array`` on ``device``. From pinned memory, so the host does not wait for work queued before."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
