# SPDX-License-Identifier: Apache-2.0
"""What ``make test-cpp`` left. It links a torch by name, so it serves tests that run on that torch only."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

__all__ = ["BUILD", "is_for_this_torch", "module_path"]

BUILD = Path(__file__).resolve().parents[2] / "build/tests"


def is_for_this_torch() -> bool:
    """Whether there is a build, made against the torch that runs."""
    cache = BUILD / "CMakeCache.txt"
    found = re.search(r"^MOM_TORCH_ROOT:PATH=(.*)$", cache.read_text(), re.MULTILINE) if cache.is_file() else None
    return found is not None and Path(found[1]).resolve() == Path(torch.__file__).resolve().parent


def module_path() -> Path | None:
    """The C++ modules as a Python module, from there or where MOM_CPP_MODULE says."""
    if named := os.environ.get("MOM_CPP_MODULE"):
        return Path(named)
    built = sorted((BUILD / "csrc/python").glob("mixture_of_mamba_cpp*.so")) if is_for_this_torch() else []
    return next(iter(built), None)
