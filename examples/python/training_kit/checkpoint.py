# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive ``kill -9`` at any moment, and the files of numbers that go with them.

A checkpoint replaces the one before it in one atomic rename, so there is always a whole one. It holds the length of
each file of numbers at its step; on resume the files are cut back to that, and steps done twice appear once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "METRICS_NAME",
    "TIMING_NAME",
    "CheckpointError",
    "JsonLines",
    "load_checkpoint",
    "read_json_lines",
    "remove_checkpoint",
    "save_checkpoint",
]

CHECKPOINT_NAME = "checkpoint.pt"
METRICS_NAME = "metrics.jsonl"
TIMING_NAME = "timing.jsonl"
CONTENT = {"config", "step", "seconds", "tokens", "threads", "model", "optimizer", "constants", "positions"}


class CheckpointError(Exception):
    """The run in a folder cannot be continued; the message is one line."""


def save_checkpoint(folder: Path, content: dict[str, Any]) -> None:
    partial = folder / f"{CHECKPOINT_NAME}.partial"
    with open(partial, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / CHECKPOINT_NAME)
    _sync_folder(folder)


def remove_checkpoint(folder: Path) -> None:
    (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
    _sync_folder(folder)


def load_checkpoint(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, its tensors on the CPU; or None. Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: it cannot be read, or is not of a run with this ``config``.
    """
    path = folder / CHECKPOINT_NAME
    if not path.exists():
        return None
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); start over with --fresh") from error
    if not isinstance(checkpoint, dict) or checkpoint.keys() != CONTENT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of the example; start over with --fresh")
    saved = checkpoint["config"]
    for name in sorted(config.keys() | saved.keys()):
        if config.get(name) != saved.get(name):
            raise CheckpointError(
                f"{folder} holds a run with {name} {saved.get(name)}, not {config.get(name)}; "
                "choose another --output, or --fresh to start over"
            )
    return checkpoint


class JsonLines:
    """A file of one JSON object a line, cut to its first ``position`` bytes when it is opened."""

    def __init__(self, path: Path, position: int) -> None:
        length = path.stat().st_size if path.exists() else 0
        if length < position:
            raise CheckpointError(
                f"{path} has {length} bytes and its checkpoint was made with {position}; start over with --fresh"
            )
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(position)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")

    def sync(self) -> int:
        """The length of the file, all of it safe on the disk."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last one that a kill cut short is left out, and so is a file that does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
