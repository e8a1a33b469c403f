# SPDX-License-Identifier: Apache-2.0
"""What a script does before it imports torch: settings that torch reads on loading; missing packages get a line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from training_kit.failure import fail

__all__ = ["imports_explained"]

# The first is what deterministic cuBLAS asks for. The second lets threads of GNU OpenMP sleep when they have waited
# some microseconds: by default they spin for milliseconds, and beside another busy program, where the thread they wait
# for is not running, that slows a step down 20 times.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


@contextmanager
def imports_explained() -> Iterator[None]:
    """One line instead of a traceback when a package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        source = "." if error.name in ("torch", "mixture_of_mamba") else "-r examples/python/requirements.txt"
        fail(f"the Python package {error.name} is not installed: pip install {source}")
    except ImportError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
