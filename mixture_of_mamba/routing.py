# SPDX-License-Identifier: Apache-2.0
"""Routing: which rows of a batch belong to which modality, computed once and handed to every layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixture_of_mamba.intervals import interval_of
from mixture_of_mamba.ops import modality_routing, permute_rows
from mixture_of_mamba.routing_forms import ids_from_index_lists, ids_from_masks, ids_from_segments, kind_of

__all__ = ["Routing"]


@dataclass(frozen=True, eq=False)
class Routing:
    """The tokens of one batch, sorted by modality.

    Tokens are counted in time order, ``batch * length`` of them. Sorted order puts modality 0 first and
    padding (id -1) last, and keeps the order of time inside each modality.

    Attributes:
        rows: int32 ``[tokens]``, time position -> sorted row.
        order: int32 ``[tokens]``, sorted row -> time position.
        offsets: int32 ``[num_modalities + 1]``; modality ``m`` owns rows ``offsets[m] .. offsets[m + 1]``.
        host_offsets: the same as int64 on the CPU, or None. With it the host knows who owns
            which rows; without, everything stays on the device and a CUDA graph may be replayed with another mix.
        has_padding: False when it is known that no token is padding.
        shape: ``(batch, length)`` of the ids.
    """

    rows: Tensor
    order: Tensor
    offsets: Tensor
    host_offsets: Tensor | None
    has_padding: bool
    shape: tuple[int, int]

    @staticmethod
    def from_ids(
        ids: Tensor,
        num_modalities: int,
        *,
        device: torch.device | str | None = None,
        checked: bool = True,
    ) -> Routing:
        """Sort tokens by modality.

        Args:
            ids: integer ``[batch, length]``; 0 .. num_modalities - 1, or -1 for padding. Ids on the CPU (a
                data loader's) give ``host_offsets`` for free; ids on a GPU give a device-only routing and
                no synchronisation.
            num_modalities: number of modalities.
            device: where the layers run; by default the device of ``ids``.
            checked: refuse ids out of range (CPU ids only; on a GPU, or unchecked, they are padding).

        Raises:
            RuntimeError: ids out of range, of a wrong dtype, or num_modalities out of range.
            ValueError: ids that are not two-dimensional.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise ValueError(f"ids must be a tensor of shape [batch, length], got {kind_of(ids)}")
        rows, order, offsets = modality_routing(ids, num_modalities, checked=checked)
        host_offsets = None
        has_padding = True
        if ids.device.type == "cpu":
            host_offsets = offsets.to(torch.int64)
            if not torch.compiler.is_compiling():
                with contextlib.suppress(RuntimeError):  # fake, traced or vmapped: there is no number to read
                    has_padding = int(offsets[-1]) != ids.numel()
        if device is not None:
            rows, order, offsets = (t.to(device, non_blocking=True) for t in (rows, order, offsets))
        return Routing(rows, order, offsets, host_offsets, has_padding, (ids.shape[0], ids.shape[1]))

    @staticmethod
    def from_masks(
        masks: Tensor | Sequence[Tensor],
        shape: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        checked: bool = False,
    ) -> Routing:
        """From one boolean mask per modality, the form of the published Mixture-of-Mamba.

        Args:
            masks: bool ``[modalities, batch * length]`` or ``[modalities, batch, length]``, or a list of such
                masks. A token in several masks belongs to the lowest of them, a token in none is padding. Masks
                on the CPU give ``host_offsets``; masks on a GPU give a device-only routing and no synchronisation.
            shape: ``(batch, length)``.
            device: where the layers run; by default the device of ``masks``.
            checked: refuse a token that is in no mask (CPU masks only; on a GPU it is padding).

        Raises:
            ValueError: naming the mask of a wrong dtype, shape or device, or the first token in no mask.
        """
        ids = ids_from_masks(masks, shape, checked=checked)
        return Routing.from_ids(ids, len(masks), device=device, checked=False)

    @staticmethod
    def from_index_lists(
        lists: Sequence[Tensor | Sequence[int]],
        shape: tuple[int, int],
        *,
        device: torch.device | str | None = None,
        checked: bool = False,
    ) -> Routing:
        """From the positions of each modality's tokens, the form of packed sequences (BAGEL's, for one).

        Args:
            lists: per modality, positions ``b * length + t`` as an integer tensor or a list, in any order. A token
                in no list is padding. On a GPU positions are not read on the host, and nothing waits: those out of
                range are dropped, and a token given twice belongs to the lowest modality.
            shape: ``(batch, length)``; a packed sequence is ``(1, tokens)``.
            device: where the layers run; by default the device of ``lists``.
            checked: refuse a token that is in no list (CPU lists only; on a GPU it is padding).

        Raises:
            ValueError: a position out of range or given twice (CPU), the first token in no list, or a list of a
                wrong dtype, shape or device.
        """
        ids = ids_from_index_lists(lists, shape, checked=checked)
        return Routing.from_ids(ids, len(lists), device=device, checked=False)

    @staticmethod
    def from_segments(
        segments: Sequence[Sequence[Sequence[int]]],
        shape: tuple[int, int],
        *,
        num_modalities: int,
        first_modality: int = 0,
        device: torch.device | str | None = None,
    ) -> Routing:
        """From ``(modality, offset, length)`` triples, the form of transfusion-pytorch's ``modality_positions``.

        A token outside of every segment belongs to modality 0, text; so there is no padding. Segments of length 0
        are legal and hold nothing.

        Args:
            segments: per row of the batch, its triples in any order; offsets count from the row's beginning.
            shape: ``(batch, length)``.
            num_modalities: number of modalities, text among them.
            first_modality: what is added to the modality of every triple. transfusion-pytorch counts its types
                without text, so that its type 0 is modality 1 here: give 1 to pass its triples as they are.
            device: where the layers run; by default the CPU. ``host_offsets`` are there in any case.

        Raises:
            ValueError: naming the segment that is no triple, lies outside of its row, has a modality out of range
                or overlaps another one.
        """
        ids = ids_from_segments(segments, shape, num_modalities, first_modality=first_modality)
        return Routing.from_ids(ids, num_modalities, device=device)

    @property
    def num_modalities(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        return self.rows.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Routing:
        """The same routing for layers on another device; ``host_offsets`` stay on the CPU."""
        rows, order, offsets = (t.to(device, non_blocking=non_blocking) for t in (self.rows, self.order, self.offsets))
        return replace(self, rows=rows, order=order, offsets=offsets)

    def pin_memory(self) -> Routing:
        """The same routing in page-locked memory, from where ``to(device, non_blocking=True)`` does not wait.

        A ``DataLoader(pin_memory=True)`` calls it for a routing that its ``collate_fn`` made.
        """
        return replace(
            self, rows=self.rows.pin_memory(), order=self.order.pin_memory(), offsets=self.offsets.pin_memory()
        )

    def with_host_offsets(self) -> Routing:
        """The same routing with ``host_offsets``. On a GPU this waits for the device once."""
        if self.host_offsets is not None:
            return self
        host_offsets = self.offsets.to("cpu", torch.int64)
        has_padding = int(host_offsets[-1]) != self.num_tokens
        return replace(self, host_offsets=host_offsets, has_padding=has_padding)

    def merged(self) -> Routing:
        """All modalities as one, padding still last: for what the modalities share."""
        ends = [0, -1]
        host_offsets = None if self.host_offsets is None else self.host_offsets[ends]
        offsets = torch.stack((self.offsets[0], self.offsets[-1]))
        return replace(self, offsets=offsets, host_offsets=host_offsets)

    def reversed(self, cu_seqlens: Tensor | None = None) -> Routing:
        """The same rows, walked from each sequence's last token to its first.

        For operators and layers that get rows in this routing's sorted order (``sorted=True``): convolution and scan
        then look into the future. A layer's ``reverse=True`` does all of it. Nothing waits for the device.

        Args:
            cu_seqlens: int32 ``[sequences + 1]``, boundaries of packed sequences; by default the rows of the batch.
        """
        time = torch.arange(self.num_tokens, device=self.rows.device)
        if cu_seqlens is None:
            mirror = time.view(self.shape).flip(1).flatten()
        elif not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ValueError(f"cu_seqlens must be a tensor of shape [sequences + 1], got {kind_of(cu_seqlens)}")
        else:
            ends = cu_seqlens.to(self.rows.device, torch.int64)
            sequence = interval_of(time, ends)
            mirror = (ends[sequence] + ends[sequence + 1] - 1 - time).clamp(0, self.num_tokens - 1)
        order = mirror.to(self.order.dtype)[self.order.long()]  # a mirror is its own inverse
        return replace(self, rows=self.rows[mirror], order=order)

    def sort(self, x: Tensor) -> Tensor:
        """``x [batch, length, ...]`` in time order -> the same shape with rows in sorted order.

        Integer ids ``[batch, length]`` are accepted as well: permuting token ids at the embedding and
        labels at the loss keeps a whole model sorted at no cost.
        """
        return self._permute(x, self.order, self.rows)

    def unsort(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`sort`."""
        return self._permute(x, self.rows, self.order)

    def _permute(self, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != self.shape:
            got = list(x.shape) if isinstance(x, Tensor) else kind_of(x)
            raise ValueError(f"x must have shape [batch, length, ...] = {list(self.shape)}, got {got}")
        if x.dim() == 3:
            return permute_rows(x, index, inverse)
        channels = math.prod(x.shape[2:])  # reshape cannot tell when there are no tokens
        return permute_rows(x.reshape(*self.shape, channels), index, inverse).view(x.shape)
