# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive ``kill -9`` at any moment, and the metrics file that goes with them.

A checkpoint replaces the one before it in one atomic rename, so there is always a whole one. It holds the length of
the metrics file at its step; on resume the file is cut back to that, and steps done twice appear once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "Metrics", "load_checkpoint", "save_checkpoint"]

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"


class CheckpointError(Exception):
    """The run in a folder cannot be continued; the message is one line."""


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / f"{CHECKPOINT_NAME}.partial"
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / CHECKPOINT_NAME)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, or None. Only tensors and plain values are unpickled."""
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); start over with --fresh") from error


class Metrics:
    """One JSON object a line. ``position`` is the length in bytes of what is safely written."""

    def __init__(self, folder: Path, position: int = 0) -> None:
        self.path = folder / METRICS_NAME
        length = self.path.stat().st_size if self.path.exists() else 0
        if length < position:
            raise CheckpointError(
                f"{self.path} is shorter ({length} bytes) than its checkpoint says ({position}); start over with --fresh"
            )
        self._file = open(self.path, "ab")  # noqa: SIM115
        self._file.truncate(position)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All whole lines written so far; a last line that a kill cut short is left out."""
        path = folder / METRICS_NAME
        if not path.exists():
            return []
        lines = path.read_bytes().split(b"\n")[:-1]
        return [json.loads(line) for line in lines]
