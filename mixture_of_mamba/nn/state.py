# SPDX-License-Identifier: Apache-2.0
"""What a mixer remembers of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["MambaState", "checked_ssm_dtype"]


def checked_ssm_dtype(argument: str, ssm_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    """Of the scan's state beside activations of ``dtype``: float32, float64 for float64, or their 16 bits if asked."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = (wide, dtype) if dtype.itemsize == 2 else (wide,)
    if ssm_dtype is not None and ssm_dtype not in allowed:
        choices = " or ".join(map(str, allowed))
        raise ValueError(f"{argument} must be {choices} beside activations of {dtype}, got {ssm_dtype}")
    return ssm_dtype or wide


@dataclass(eq=False)
class MambaState:
    """State of one layer after some tokens, per sequence. Its size does not grow with the tokens seen.

    Attributes:
        conv: ``[sequences, d_conv - 1, d_inner]``, the last inputs of the convolution, oldest first.
        ssm: ``[sequences, d_inner, d_state]``, float32 (float64 beside float64 activations), or the dtype of ``conv``
            where that has 16 bits: half of the bytes, but every step rounds, so it drifts.
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
        """Put other values in the rows of some sequences, in place: a captured graph of the step sees them.

        A prefill's float32 is rounded where this state has 16 bits.
        """
        if not isinstance(state, MambaState):
            raise TypeError(f"state must be a MambaState, got {type(state).__name__}")
        self.conv[sequences] = state.conv
        self.ssm[sequences] = state.ssm.to(self.ssm.dtype)

    def to(
        self,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype | None = None,
    ) -> MambaState:
        """The same values elsewhere, for activations of another dtype, or with the scan's state in 16 bits.

        As with a tensor's ``to``, what needs no change is shared with this state.

        Args:
            device: by default where it is.
            dtype: of ``conv``, and so of the activations, autocast's where a step runs under autocast.
            ssm_dtype: of ``ssm``; by default what it is, or float32 (float64) where ``dtype`` does not go with that.
        """
        dtype = dtype or self.conv.dtype
        if ssm_dtype is None and self.ssm.dtype == dtype:
            ssm_dtype = dtype
        ssm_dtype = checked_ssm_dtype("ssm_dtype", ssm_dtype, dtype)
        device = self.conv.device if device is None else device
        return MambaState(self.conv.to(device, dtype), self.ssm.to(device, ssm_dtype))

    def clone(self) -> MambaState:
        """A copy to come back to, for example before a block of tokens that is drawn again."""
        return MambaState(self.conv.clone(), self.ssm.clone())

    def detach(self) -> MambaState:
        """The same values without their history (truncated backpropagation through time)."""
        return MambaState(self.conv.detach(), self.ssm.detach())
