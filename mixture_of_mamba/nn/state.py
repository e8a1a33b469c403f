# SPDX-License-Identifier: Apache-2.0
"""What a mixer remembers of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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

    def __getitem__(self, sequences: slice | list[int] | Tensor) -> MambaState:
        """The state of some sequences, chosen as a tensor's rows are: a slice gives views, all else copies.

        ``kept = state[[0, 3]]`` before a block of tokens that is drawn again and again, for example the patches of an
        image under diffusion; ``state[[0, 3]] = kept`` before each time but the first.
        """
        if isinstance(sequences, int):
            raise TypeError(f"sequences must be a slice, a list or a tensor, got {sequences}; [{sequences}] keeps one")
        return MambaState(self.conv[sequences], self.ssm[sequences])

    @torch.no_grad()
    def __setitem__(self, sequences: slice | list[int] | Tensor, state: MambaState) -> None:
        """Put other values in the rows of some sequences, in place: a captured graph of the step sees them."""
        if not isinstance(state, MambaState):
            raise TypeError(f"state must be a MambaState, got {type(state).__name__}")
        self.conv[sequences] = state.conv
        self.ssm[sequences] = state.ssm

    def clone(self) -> MambaState:
        """A copy to come back to, for example before a block of tokens that is drawn again."""
        return MambaState(self.conv.clone(), self.ssm.clone())

    def detach(self) -> MambaState:
        """The same values without their history (truncated backpropagation through time)."""
        return MambaState(self.conv.detach(), self.ssm.detach())
