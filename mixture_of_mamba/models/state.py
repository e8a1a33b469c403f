# SPDX-License-Identifier: Apache-2.0
"""What a decoder remembers of the tokens it has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mixture_of_mamba.nn import MambaState

__all__ = ["AttentionState", "DecoderState"]


@dataclass
class AttentionState:
    """Keys and values of one attention layer, ``[sequences, heads, tokens, head_dim]`` in time order."""

    keys: Tensor
    values: Tensor


@dataclass
class DecoderState:
    """States of all mixers after some tokens. A decoder never writes into one: keeping it is a snapshot.

    Attributes:
        mamba: one state for each Mamba mixer, from the first layer to the last; their size does not grow.
        attention: one for each attention layer; they grow by every token seen, padding included.
        seen: bool ``[sequences, tokens]``, which of those tokens are no padding; None without attention.
    """

    mamba: list[MambaState]
    attention: list[AttentionState]
    seen: Tensor | None

    @property
    def sequences(self) -> int:
        return self.mamba[0].ssm.shape[0] if self.mamba else self.attention[0].keys.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory that the state takes."""
        return sum(x.numel() * x.element_size() for x in self._tensors())

    def clone(self) -> DecoderState:
        """A copy whose tensors are its own: for those who write into a state themselves."""
        return self._map(torch.clone)

    def detach(self) -> DecoderState:
        """The same values without their history."""
        return self._map(torch.detach)

    def select(self, sequences: Tensor) -> DecoderState:
        """The state of some sequences, an int64 ``[n]`` of their indices, in that order; repetition is legal."""
        return self._map(lambda x: x.index_select(0, sequences))

    def restore(self, sequences: Tensor, snapshot: DecoderState) -> DecoderState:
        """This state, with ``snapshot`` (as of :meth:`select`) in the place of some sequences, each given once."""
        count = snapshot.sequences
        if sequences.dim() != 1 or sequences.shape[0] != count:
            raise ValueError(f"sequences must have shape [{count}], the snapshot's, got {list(sequences.shape)}")
        mine, theirs = self, snapshot
        if self.seen is not None and snapshot.seen is not None:
            tokens = max(self.seen.shape[1], snapshot.seen.shape[1])
            mine, theirs = self._padded(tokens), snapshot._padded(tokens)
        new = iter(theirs._tensors())
        return mine._map(lambda x: x.index_copy(0, sequences, next(new)))

    def _padded(self, tokens: int) -> DecoderState:
        """With as many tokens in attention's part; those that are new, at the end, are padding."""
        assert self.seen is not None
        more = tokens - self.seen.shape[1]
        attention = [
            AttentionState(F.pad(one.keys, (0, 0, 0, more)), F.pad(one.values, (0, 0, 0, more)))
            for one in self.attention
        ]
        return replace(self, attention=attention, seen=F.pad(self.seen, (0, more)))

    def _tensors(self) -> list[Tensor]:
        tensors = [x for one in self.mamba for x in (one.conv, one.ssm)]
        tensors += [x for one in self.attention for x in (one.keys, one.values)]
        return tensors if self.seen is None else [*tensors, self.seen]

    def _map(self, change: Callable[[Tensor], Tensor]) -> DecoderState:
        new = iter([change(x) for x in self._tensors()])
        mamba = [MambaState(next(new), next(new)) for _ in self.mamba]
        attention = [AttentionState(next(new), next(new)) for _ in self.attention]
        return DecoderState(mamba, attention, None if self.seen is None else next(new))
