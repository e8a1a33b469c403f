# SPDX-License-Identifier: Apache-2.0
"""What a mixer remembers of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["MambaState"]


@dataclass
class MambaState:
    """State of one layer after some tokens, per sequence. Its size does not grow with the tokens seen.

    Attributes:
        conv: ``[sequences, d_conv - 1, d_inner]``, the last inputs of the convolution, oldest first.
        ssm: ``[sequences, d_inner, d_state]``, float32 (float64 beside float64 activations).
    """

    conv: Tensor
    ssm: Tensor

    def clone(self) -> MambaState:
        """A copy to come back to, for example before a block of tokens that is drawn again."""
        return MambaState(self.conv.clone(), self.ssm.clone())

    def detach(self) -> MambaState:
        """The same values without their history (truncated backpropagation through time)."""
        return MambaState(self.conv.detach(), self.ssm.detach())
