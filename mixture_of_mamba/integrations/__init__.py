# SPDX-License-Identifier: Apache-2.0
"""Other libraries' interfaces on this library's operators, one module per neighbour."""

import importlib
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """transformers is imported when this library's side of it is named."""
    if name == "transformers":
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
