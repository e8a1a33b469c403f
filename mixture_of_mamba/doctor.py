# SPDX-License-Identifier: Apache-2.0
"""``python -m mixture_of_mamba.doctor``: what is installed, and one sentence with the fix for whatever is off."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mixture_of_mamba import _library
from mixture_of_mamba.version import __version__

__all__ = ["Diagnosis", "Facts", "diagnose", "gather", "main"]


@dataclass(frozen=True)
class Facts:
    """All that the diagnosis looks at."""

    system: str
    machine: str
    torch: str
    torch_cuda: str | None  # CUDA that torch is built with
    torch_hip: str | None
    gpu: str | None
    capability: tuple[int, int] | None
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


@dataclass(frozen=True)
class Diagnosis:
    """One finding: ``fatal`` when the package does not run at all, otherwise something that is off."""

    fatal: bool
    sentence: str


def _ask(path: Path, function: str) -> str | None:
    """A string that a library tells about itself; None when it does not load or has no such function."""
    try:
        answer = getattr(ctypes.CDLL(str(path)), function)
    except (OSError, AttributeError):
        return None
    answer.restype = ctypes.c_char_p
    value = answer()
    return value.decode() if value is not None else None


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
        has_mps=torch.backends.mps.is_available(),
        nvcc=shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])),
        folder=str(folder),
        is_source_tree=(folder.parent / "CMakeLists.txt").exists(),
        has_cpu_library=_library.CPU_LIBRARY.exists(),
        has_cuda_library=_library.CUDA_LIBRARY.exists(),
        load_error=load_error,
        cuda_problem=_library.cuda_problem(),
        built_with_torch=_ask(_library.CPU_LIBRARY, "mixture_of_mamba_built_with_torch"),
        cpu_isa=_ask(_library.CPU_LIBRARY, "mixture_of_mamba_cpu_isa"),
        cuda_toolkit=toolkit,
        cuda_architectures=tuple(architectures.split()) if architectures else (),
        operators={key: _registered(key) for key in ("CPU", "CUDA", "Meta")} if load_error is None else {},
        neighbours=tuple(name for name in names if importlib.util.find_spec(name) is not None),
    )


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU: the same major version's machine code, or older PTX."""
    gpu = 10 * capability[0] + capability[1]
    for architecture in architectures:
        number = int(architecture.removesuffix("-real").rstrip("af"))
        same_major = number // 10 == capability[0] and number <= gpu
        if same_major or (not architecture.endswith("-real") and number <= gpu):
            return True
    return False


def _library_findings(facts: Facts) -> Iterator[Diagnosis]:
    if facts.load_error is None:
        return
    if facts.system != "Linux":
        yield Diagnosis(
            True,
            f"{facts.system} is not supported: the libraries are built for Linux only; use Linux, WSL2 or a container.",
        )
    elif not facts.has_cpu_library and facts.is_source_tree:
        yield Diagnosis(
            True,
            f"Python imports the source folder {facts.folder}, which is not built: run `pip install -e .` there, or "
            "start Python in another folder to use an installed package.",
        )
    elif not facts.has_cpu_library:
        yield Diagnosis(
            True,
            f"The installed package lacks {_library.CPU_LIBRARY.name}: reinstall it with "
            "`pip install --force-reinstall --no-deps mixture_of_mamba`.",
        )
    else:
        built = facts.built_with_torch or "another torch"
        yield Diagnosis(True, f"Built against torch {built}, running torch {facts.torch}: {facts.load_error}.")


def _gpu_findings(facts: Facts) -> Iterator[Diagnosis]:
    if facts.torch_hip is not None:
        yield Diagnosis(
            False,
            f"torch is built for AMD GPUs (ROCm {facts.torch_hip}), which have no kernels here: keep the layers on the "
            "CPU, where they train.",
        )
    elif facts.has_mps:
        yield Diagnosis(
            False,
            "Apple GPUs (mps) have no kernels here: keep the layers on the CPU, where they train.",
        )
    elif facts.torch_cuda is None:
        if shutil.which("nvidia-smi"):
            yield Diagnosis(
                False,
                f"This machine has an NVIDIA driver, but torch {facts.torch} is built without CUDA: install a CUDA "
                "build of torch (pytorch.org, Get Started).",
            )
    elif not facts.has_cuda_library:
        fix = (
            "rebuild with `MOM_CUDA=ON pip install --force-reinstall --no-deps .`"
            if facts.nvcc
            else f"install the CUDA toolkit (nvcc) {facts.torch_cuda}, then `pip install --force-reinstall --no-deps .`"
        )
        yield Diagnosis(False, f"torch has CUDA {facts.torch_cuda}, but the package was built without CUDA: {fix}.")
    elif facts.cuda_problem is not None:
        yield Diagnosis(False, f"{facts.cuda_problem[0].upper()}{facts.cuda_problem[1:]}.")
    elif facts.capability is None:
        yield Diagnosis(
            False,
            f"torch has CUDA {facts.torch_cuda} but sees no GPU: check `nvidia-smi` and CUDA_VISIBLE_DEVICES; CPU "
            "tensors work meanwhile.",
        )
    elif not runs_on(facts.cuda_architectures, facts.capability):
        major, minor = facts.capability
        yield Diagnosis(
            False,
            f"The CUDA library holds code for {' '.join(facts.cuda_architectures)}, and {facts.gpu} is {major}.{minor} "
            f'("no kernel image"): rebuild with `TORCH_CUDA_ARCH_LIST="{major}.{minor}" pip install '
            "--force-reinstall --no-deps .`",
        )


def _neighbour_findings(facts: Facts) -> Iterator[Diagnosis]:
    if "mamba_ssm" in facts.neighbours or "causal_conv1d" in facts.neighbours:
        names = " and ".join(name for name in ("mamba_ssm", "causal_conv1d") if name in facts.neighbours)
        yield Diagnosis(
            False,
            f"{names} installed beside: nothing here uses it, and its errors (a missing selective_scan_cuda, "
            "incompatible causal_conv1d functions) go away by importing selective_scan_fn and causal_conv1d_fn from "
            "mixture_of_mamba.",
        )


def diagnose(facts: Facts) -> list[Diagnosis]:
    """Every finding, the fatal ones first; empty when all is well."""
    findings = [*_library_findings(facts), *_gpu_findings(facts), *_neighbour_findings(facts)]
    return sorted(findings, key=lambda finding: not finding.fatal)


def report(facts: Facts) -> str:
    """The facts as a table."""

    def state(exists: bool, works: bool, more: str, wanted: bool = True) -> str:
        if not exists:
            return "not built"
        return f"loaded{more}" if works else "does not load" if wanted else "present, not needed"

    isa = f", {facts.cpu_isa} kernels, built against torch {facts.built_with_torch}" if facts.cpu_isa else ""
    cuda = f", CUDA {facts.cuda_toolkit}, for {' '.join(facts.cuda_architectures)}" if facts.cuda_toolkit else ""
    kernels = facts.operators
    registered = f"{kernels['CPU']} CPU, {kernels['CUDA']} CUDA, {kernels['Meta']} Meta" if kernels else "none"
    if kernels and facts.cuda_problem is not None:
        registered = f"{kernels['CPU']} CPU, {kernels['Meta']} Meta; CUDA tensors get an explanation"
    capability = f" ({facts.capability[0]}.{facts.capability[1]})" if facts.capability else ""
    lines = {
        "mixture_of_mamba": f"{__version__} in {facts.folder}",
        "python": f"{platform.python_version()} on {facts.system} {facts.machine}",
        "torch": f"{facts.torch}, CUDA {facts.torch_cuda or 'none'}",
        "GPU": f"{facts.gpu}{capability}" if facts.gpu else "none",
        "nvcc": facts.nvcc or "none",
        "CPU library": state(facts.has_cpu_library, facts.load_error is None, isa),
        "CUDA library": state(facts.has_cuda_library, bool(facts.cuda_toolkit), cuda, facts.torch_cuda is not None),
        "operators": registered,
    }
    return "\n".join(f"{name:<17} {value}" for name, value in lines.items())


def main() -> int:
    """Print the report and the findings; 1 when the package does not run."""
    facts = gather()
    findings = diagnose(facts)
    print(report(facts))
    print()
    for finding in findings:
        print(("PROBLEM  " if finding.fatal else "NOTE     ") + finding.sentence)
    if not findings:
        print("All is well.")
    elif not findings[0].fatal:
        print("The package works; the notes tell what it could do better here.")
    return 1 if any(finding.fatal for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
