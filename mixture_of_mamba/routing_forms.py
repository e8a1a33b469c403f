# SPDX-License-Identifier: Apache-2.0
"""Other forms of the same fact: masks, lists of positions and segments become ids, one per token.

Whatever lies on the CPU is checked. Values on a GPU are not read by the host, so nothing here waits for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = ["ids_from_index_lists", "ids_from_masks", "ids_from_segments", "kind_of"]


def ids_from_masks(
    masks: Tensor | Sequence[Tensor], shape: Sequence[int], *, checked: bool = False, name: str = "masks"
) -> Tensor:
    """int64 ``[batch, length]``; ``name`` is what the caller calls the masks. See :meth:`Routing.from_masks`."""
    batch, length = _sizes(shape)
    masks = _entries(masks, name)
    for m, mask in enumerate(masks):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"{name}[{m}] must be a bool tensor, got {kind_of(mask)}")
        if tuple(mask.shape) not in ((batch * length,), (batch, length)):
            raise ValueError(
                f"{name}[{m}] must have shape [batch * length] = [{batch * length}] or [batch, length] = "
                f"[{batch}, {length}], got {list(mask.shape)}"
            )
        if mask.device != masks[0].device:
            raise ValueError(f"{name}[{m}] must be on {masks[0].device} as {name}[0] is, got {mask.device}")
    ids = torch.full((batch, length), -1, dtype=torch.int64, device=masks[0].device)
    for m in reversed(range(len(masks))):  # the lowest index is written last, and so it wins
        ids.masked_fill_(masks[m].reshape(batch, length), m)
    if checked:
        _require_cover(ids, name)
    return ids


def ids_from_index_lists(
    lists: Sequence[Tensor | Sequence[int]], shape: Sequence[int], *, checked: bool = False
) -> Tensor:
    """int64 ``[batch, length]``. See :meth:`Routing.from_index_lists`."""
    batch, length = _sizes(shape)
    tokens = batch * length
    lists = _entries(lists, "lists")
    # Positions without a device of their own follow the tensors.
    device = next((entry.device for entry in lists if isinstance(entry, Tensor)), torch.device("cpu"))
    positions = [_positions(entry, f"lists[{m}]", device) for m, entry in enumerate(lists)]
    if device.type == "cpu" and not torch.compiler.is_compiling():
        _require_positions(positions, tokens)
    # One more place than tokens takes what cannot be refused on a GPU: positions out of range.
    ids = torch.full((tokens + 1,), -1, dtype=torch.int64, device=device)
    for m in reversed(range(len(positions))):
        flat = positions[m]
        ids.index_fill_(0, flat.masked_fill((flat < 0) | (flat >= tokens), tokens), m)
    ids = ids[:tokens].view(batch, length)
    if checked:
        _require_cover(ids, "lists")
    return ids


def ids_from_segments(
    segments: Sequence[Sequence[Sequence[int]]],
    shape: Sequence[int],
    num_modalities: int,
    *,
    first_modality: int = 0,
) -> Tensor:
    """int64 ``[batch, length]`` on the CPU. See :meth:`Routing.from_segments`."""
    batch, length = _sizes(shape)
    if not isinstance(segments, Sequence) or len(segments) != batch:
        got = len(segments) if isinstance(segments, Sequence) else kind_of(segments)
        raise ValueError(f"segments must be a list with one list per row of the batch, {batch}, got {got}")
    ids = torch.zeros(batch, length, dtype=torch.int64, device="cpu")
    for b, row in enumerate(segments):
        if not isinstance(row, (Sequence, Tensor)):
            raise ValueError(f"segments[{b}] must be a list of triples (modality, offset, length), got {kind_of(row)}")
        spans = []
        for i, segment in enumerate(row):
            here = f"segments[{b}][{i}]"
            modality, offset, count = _triple(segment, here)
            if not 0 <= modality + first_modality < num_modalities:
                added = f" + {first_modality}" if first_modality else ""
                raise ValueError(
                    f"{here} must have its modality{added} in 0 .. num_modalities - 1 = {num_modalities - 1}, "
                    f"got {modality}{added}"
                )
            if offset < 0 or count < 0 or offset + count > length:
                raise ValueError(
                    f"{here} must lie in 0 .. length = {length} with a length of at least 0, "
                    f"got offset {offset} and length {count}"
                )
            if count:
                spans.append((offset, offset + count, i))
                ids[b, offset : offset + count] = modality + first_modality
        spans.sort()
        for (_, end, i), (start, _, j) in pairwise(spans):
            if start < end:
                raise ValueError(
                    f"segments[{b}] must not overlap, got token {start} in segments[{b}][{i}] and segments[{b}][{j}]"
                )
    return ids


def _sizes(shape: Sequence[int]) -> tuple[int, int]:
    if not isinstance(shape, (tuple, list)) or len(shape) != 2 or any(size < 0 for size in shape):
        raise ValueError(f"shape must be (batch, length), neither of them negative, got {shape}")
    return shape[0], shape[1]


def _entries(value: Tensor | Sequence[Any], name: str) -> Sequence[Any]:
    if not isinstance(value, (Tensor, Sequence)) or (isinstance(value, Tensor) and value.dim() == 0):
        raise ValueError(f"{name} must be a tensor or a list with one entry per modality, got {kind_of(value)}")
    if len(value) == 0:
        raise ValueError(f"{name} must have one entry per modality, at least 1, got 0")
    return value.unbind() if isinstance(value, Tensor) else value


def kind_of(value: object) -> str:
    """What came, for a message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def tensor_or_list(value: Any) -> Tensor | None:
    """A tensor as it is, a list as one on the CPU; None of what torch makes none of."""
    if isinstance(value, Tensor):
        return value
    try:
        made = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # what torch raises depends on what came
        return None
    return made if made.numel() else made.long()


def is_row_of_integers(value: Tensor) -> bool:
    return value.dim() == 1 and not (value.dtype == torch.bool or value.is_floating_point() or value.is_complex())


def _triple(segment: Sequence[int], here: str) -> tuple[int, int, int]:
    try:
        modality, offset, count = (operator.index(value) for value in segment)
    except (TypeError, ValueError):  # not iterable, of another length, or not integers
        raise ValueError(f"{here} must be a triple of integers (modality, offset, length), got {segment!r}") from None
    return modality, offset, count


def _positions(entry: Any, here: str, device: torch.device) -> Tensor:
    flat = tensor_or_list(entry)
    if flat is None:
        raise ValueError(f"{here} must be an integer tensor or a list of integers, got {kind_of(entry)}")
    if not isinstance(entry, Tensor):
        flat = flat.to(device, non_blocking=True)
    if not is_row_of_integers(flat):
        raise ValueError(f"{here} must hold integers [positions], got {kind_of(flat)}")
    if flat.device != device:
        raise ValueError(f"{here} must be on {device} as the lists before it are, got {flat.device}")
    return flat.long()


def _require_positions(positions: Sequence[Tensor], tokens: int) -> None:
    for m, flat in enumerate(positions):
        outside = flat[(flat < 0) | (flat >= tokens)]
        if outside.numel():
            raise ValueError(
                f"lists[{m}] must hold positions in 0 .. batch * length - 1 = {tokens - 1}, got {int(outside[0])}"
            )
    twice = (torch.bincount(torch.cat(list(positions)), minlength=1) > 1).nonzero()
    if twice.numel():
        token = int(twice[0])
        owners = [m for m, flat in enumerate(positions) for _ in range(int((flat == token).sum()))]
        raise ValueError(f"lists must hold every position at most once, got position {token} in lists {owners}")


def _require_cover(ids: Tensor, name: str) -> None:
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    missing = (ids < 0).nonzero()
    if missing.shape[0]:
        b, t = missing[0].tolist()
        raise ValueError(
            f"{name} must cover every token when checked, got no modality for token {b * ids.shape[1] + t} "
            f"(batch {b}, position {t})"
        )
