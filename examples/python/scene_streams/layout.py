# SPDX-License-Identifier: Apache-2.0
"""Segments of different lengths put one after the other, for a whole batch at once."""

from __future__ import annotations

import numpy as np

__all__ = ["HOLE", "SLOT", "arrange", "compact", "slot_numbers", "table"]

HOLE = -1  # no token at all
SLOT = -2  # a place of a picture, whose content is computed on the device


def compact(rows: np.ndarray) -> np.ndarray:
    """``[rows, length]`` with what is not a HOLE moved to the front, in its order."""
    return np.take_along_axis(rows, np.argsort(rows == HOLE, axis=1, kind="stable"), axis=1)


def arrange(segments: list[np.ndarray], orders: list[tuple[int, ...]], first_order: int) -> np.ndarray:
    """Samples of segments, each sample in the next one of the orders.

    Args:
        segments: ``[samples, length of the segment]``, holes anywhere.
        orders: indices of the segments, in the order that a sample has them.
        first_order: of the first sample.

    Returns:
        ``[samples, sum of lengths]``, holes at the end.
    """
    samples = len(segments[0])
    result = np.empty((samples, sum(segment.shape[1] for segment in segments)), dtype=np.int64)
    which = (np.arange(samples) + first_order) % len(orders)
    for index, order in enumerate(orders):
        rows = which == index
        result[rows] = np.concatenate([segments[segment][rows] for segment in order], axis=1)
    return compact(result)


def slot_numbers(rows: np.ndarray) -> np.ndarray:
    """1, 2, ... where the slots of a row are, 0 elsewhere."""
    slots = rows == SLOT
    return np.cumsum(slots, axis=1) * slots


def table(rows: list[list[int]]) -> np.ndarray:
    """Lists of different lengths as one array, with holes at the end."""
    result = np.full((len(rows), max(map(len, rows), default=0)), HOLE, dtype=np.int64)
    for index, row in enumerate(rows):
        result[index, : len(row)] = row
    return result
