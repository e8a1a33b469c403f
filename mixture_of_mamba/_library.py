# SPDX-License-Identifier: Apache-2.0
"""Loads the operator libraries once and knows, in one sentence, why something is off."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path


def doctor_was_called() -> bool:
    return ("-m", "mixture_of_mamba.doctor") in itertools.pairwise(sys.orig_argv)


try:
    import torch
except ImportError as error:
    message = f"mixture_of_mamba needs torch >= 2.11, and torch cannot be imported ({error}): pip install torch"
    if doctor_was_called():
        sys.exit(f"PROBLEM  {message}")
    raise ImportError(message) from error

__all__ = ["CPU_LIBRARY", "CUDA_LIBRARY", "LIBRARY_FOLDER", "OPERATORS", "cuda_problem", "load"]

LIBRARY_FOLDER = Path(__file__).parent / "lib"
CPU_LIBRARY = LIBRARY_FOLDER / "libmixture_of_mamba.so"
CUDA_LIBRARY = LIBRARY_FOLDER / "libmixture_of_mamba_cuda.so"
MINIMUM_TORCH = (2, 11)
REBUILD = "rebuild it for this environment with `pip install --force-reinstall --no-deps .` in the source folder"

OPERATORS = (
    "modality_routing",
    "permute_rows",
    "grouped_linear",
    "grouped_linear_backward",
    "causal_conv1d",
    "causal_conv1d_backward",
    "causal_conv1d_step",
    "selective_scan",
    "selective_scan_backward",
    "selective_scan_step",
    "mamba_block",
    "mamba_block_backward",
    "mamba_block_step",
)

# Keeps registrations made from Python alive for the life of the process.
_registrations: list[torch.library.Library] = []
_loaded = False
_cuda_problem: str | None = None


def cuda_problem() -> str | None:
    """Why the operators do not run on CUDA tensors, with the remedy; None when they do."""
    return _cuda_problem


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def load() -> None:
    """Load the libraries; called when the package is imported.

    Raises:
        ImportError: the CPU library is missing, does not load or belongs to other sources, or the C++ frontend has
            registered its kernels. A missing GPU, nvcc
            or CUDA library is no reason to fail: CUDA tensors then raise :func:`cuda_problem`.
    """
    global _loaded, _cuda_problem
    if _loaded:
        return
    if torch_version() < MINIMUM_TORCH:
        raise ImportError(
            f"mixture_of_mamba needs torch >= 2.11, and this is torch {torch.__version__}: pip install --upgrade torch"
        )
    if not CPU_LIBRARY.exists():
        folder = LIBRARY_FOLDER.parents[1]
        in_sources = f"run `pip install -e .` in {folder}, or start Python elsewhere to use an installed package"
        raise ImportError(
            f"mixture_of_mamba is not built: {CPU_LIBRARY} is missing; "
            f"{in_sources if (folder / 'CMakeLists.txt').exists() else REBUILD}"
        )
    try:
        torch.ops.load_library(CPU_LIBRARY)
    except OSError as error:
        raise ImportError(
            f"mixture_of_mamba's library does not load with torch {torch.__version__} ({error}); {REBUILD}"
        ) from error
    missing = [name for name in OPERATORS if not torch._C._dispatch_has_kernel(f"mixture_of_mamba::{name}")]
    if missing:
        raise ImportError(
            f"mixture_of_mamba's library was built from other sources than this Python code, it lacks {missing[0]}; "
            f"{REBUILD}"
        )
    if torch._C._dispatch_has_kernel_for_dispatch_key("mixture_of_mamba::selective_scan", "Autograd"):
        raise ImportError(
            "the C++ frontend has registered its kernels in this process, and they cannot be replaced; "
            "import mixture_of_mamba before C++ code uses the frontend"
        )
    _loaded = True
    _cuda_problem = _load_cuda()
    if _cuda_problem is not None:
        _explain_cuda_calls()


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; install a CUDA build of torch "
            "(python -m mixture_of_mamba.doctor tells more)"
        )
    if not CUDA_LIBRARY.exists():
        return (
            "mixture_of_mamba was built without CUDA; install the CUDA toolkit (nvcc) and rebuild it with "
            "`MOM_CUDA=ON pip install --force-reinstall --no-deps .` in the source folder"
        )
    try:
        torch.ops.load_library(CUDA_LIBRARY)
    except OSError as error:
        return (
            f"the CUDA library does not load with torch {torch.__version__}, CUDA {torch.version.cuda} ({error}); "
            f"{REBUILD}"
        )
    if missing := [name for name in OPERATORS if not _has_cuda_kernel(name)]:
        return f"the CUDA library was built from other sources than this Python code, it lacks {missing[0]}; {REBUILD}"
    return None


def _has_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mixture_of_mamba::{name}", "CUDA")


def _explain_cuda_calls() -> None:
    """Let operators without a CUDA kernel answer CUDA tensors with the reason instead of the dispatcher's riddle."""
    library = torch.library.Library("mixture_of_mamba", "IMPL")

    def explain(*args: object) -> None:
        raise RuntimeError(f"mixture_of_mamba cannot run on CUDA tensors: {_cuda_problem}")

    for name in OPERATORS:
        if not _has_cuda_kernel(name):
            library.impl(name, explain, "CUDA")
    _registrations.append(library)
