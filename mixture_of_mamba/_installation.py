# SPDX-License-Identifier: Apache-2.0
"""What is installed: all that the doctor looks at."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mixture_of_mamba import _library

__all__ = ["Facts", "gather"]


@dataclass(frozen=True)
class Facts:
    """A snapshot of this process and machine."""

    system: str
    machine: str
    torch: str
    torch_cuda: str | None  # CUDA that torch is built with
    torch_hip: str | None
    gpu: str | None
    capability: tuple[int, int] | None
    driver_cuda: tuple[int, int] | None  # newest CUDA that the driver runs
    has_nvidia_driver: bool
    has_mps: bool
    nvcc: str | None
    folder: str  # of the imported package
    is_source_tree: bool
    has_cpu_library: bool
    has_cuda_library: bool
    load_error: str | None  # of the CPU library
    cuda_problem: str | None
    built_with_torch: str | None
    cpu_isa: str | None
    cuda_toolkit: str | None
    cuda_architectures: tuple[str, ...]  # CMake's notation: "90-real" is machine code, "90" has PTX too
    operators: dict[str, int]  # registered kernels by dispatch key
    neighbours: tuple[str, ...]  # other packages that bring Mamba kernels

    @property
    def torch_is_too_old(self) -> bool:
        return tuple(int(part) for part in self.torch.split(".")[:2]) < _library.MINIMUM_TORCH

    @property
    def toolkit_is_too_new(self) -> bool:
        """A driver runs code of every toolkit of its major version."""
        if self.cuda_toolkit is None or self.driver_cuda is None:
            return False
        return int(self.cuda_toolkit.split(".")[0]) > self.driver_cuda[0]


def _ask(path: Path, function: str) -> str | None:
    """A string that a library tells about itself; None when it does not load or has no such function."""
    try:
        answer = getattr(ctypes.CDLL(str(path)), function)
    except (OSError, AttributeError):
        return None
    answer.restype = ctypes.c_char_p
    value = answer()
    return value.decode() if value is not None else None


def _built_with_torch() -> str | None:
    """The torch that the CPU library was built against, even when it does not load."""
    if (answer := _ask(_library.CPU_LIBRARY, "mixture_of_mamba_built_with_torch")) is not None:
        return answer
    content = _library.CPU_LIBRARY.read_bytes() if _library.CPU_LIBRARY.exists() else b""
    marker = re.search(rb"mixture_of_mamba built with torch ([\w.+]+)", content)
    return marker[1].decode() if marker else None


def _driver_cuda() -> tuple[int, int] | None:
    if (ask := getattr(torch._C, "_cuda_getDriverVersion", None)) is None:  # torch without CUDA
        return None
    version = ask()  # 13020 is 13.2
    return version // 1000, version % 1000 // 10


def _nvcc() -> str | None:
    """Where the build would find it."""
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH", "")
    folders = [f"{home}/bin"] * bool(home) + [path, "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


def _registered(key: str) -> int:
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    try:
        return sum(has_kernel(f"mixture_of_mamba::{name}", key) for name in _library.OPERATORS)
    except RuntimeError:  # the operators do not exist
        return 0


def gather() -> Facts:
    """Look at this process and machine."""
    load_error = None
    try:
        _library.load()
    except ImportError as error:
        load_error = str(error)
    has_gpu = torch.cuda.is_available()
    cuda_works = load_error is None and _library.cuda_problem() is None
    toolkit = _ask(_library.CUDA_LIBRARY, "mixture_of_mamba_cuda_toolkit") if cuda_works else None
    architectures = _ask(_library.CUDA_LIBRARY, "mixture_of_mamba_cuda_architectures") if cuda_works else None
    folder = Path(__file__).parent
    names = ("mamba_ssm", "causal_conv1d", "mambapy", "fla")
    return Facts(
        system=platform.system(),
        machine=platform.machine(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_hip=getattr(torch.version, "hip", None),
        gpu=torch.cuda.get_device_name() if has_gpu else None,
        capability=torch.cuda.get_device_capability() if has_gpu else None,
        driver_cuda=_driver_cuda() if has_gpu else None,
        has_nvidia_driver=shutil.which("nvidia-smi") is not None,
        has_mps=torch.backends.mps.is_available(),
        nvcc=_nvcc(),
        folder=str(folder),
        is_source_tree=(folder.parent / "CMakeLists.txt").exists(),
        has_cpu_library=_library.CPU_LIBRARY.exists(),
        has_cuda_library=_library.CUDA_LIBRARY.exists(),
        load_error=load_error,
        cuda_problem=_library.cuda_problem(),
        built_with_torch=_built_with_torch(),
        cpu_isa=_ask(_library.CPU_LIBRARY, "mixture_of_mamba_cpu_isa"),
        cuda_toolkit=toolkit,
        cuda_architectures=tuple(architectures.split()) if architectures else (),
        operators={key: _registered(key) for key in ("CPU", "CUDA", "Meta")} if load_error is None else {},
        neighbours=tuple(name for name in names if importlib.util.find_spec(name) is not None),
    )
