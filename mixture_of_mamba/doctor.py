# SPDX-License-Identifier: Apache-2.0
"""``python -m mixture_of_mamba.doctor``: what is installed, and one sentence with the fix for whatever is off."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from mixture_of_mamba import _library
from mixture_of_mamba._installation import Facts, gather
from mixture_of_mamba.version import __version__

__all__ = ["Diagnosis", "Facts", "diagnose", "gather", "main"]


@dataclass(frozen=True)
class Diagnosis:
    """One finding: ``fatal`` when the package does not run at all, otherwise something that is off."""

    fatal: bool
    sentence: str


def runs_on(architectures: tuple[str, ...], capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a GPU: the same major version's machine code, or older PTX."""
    gpu = 10 * capability[0] + capability[1]
    for architecture in architectures:
        number = int(architecture.removesuffix("-real").rstrip("af"))
        same_major = number // 10 == capability[0] and number <= gpu
        if same_major or (not architecture.endswith("-real") and number <= gpu):
            return True
    return False


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _library_findings(facts: Facts) -> Iterator[Diagnosis]:
    if facts.load_error is None:
        return
    if facts.system != "Linux":
        system = "macOS" if facts.system == "Darwin" else facts.system
        yield Diagnosis(
            True,
            f"{system} is not supported, the libraries are built for Linux only: use Linux, a container or, on "
            "Windows, WSL2.",
        )
    elif facts.torch_is_too_old:
        yield Diagnosis(
            True,
            f"torch {facts.torch} is too old, mixture_of_mamba needs torch >= 2.11: `pip install --upgrade torch`.",
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
            "`pip install --force-reinstall --no-deps .` in the source folder.",
        )
    elif facts.built_with_torch is not None:
        built = f"built against torch {facts.built_with_torch}, running torch {facts.torch}"
        yield Diagnosis(True, _sentence(f"{built}: {facts.load_error}"))
    else:
        yield Diagnosis(True, _sentence(facts.load_error))


def _gpu_findings(facts: Facts) -> Iterator[Diagnosis]:
    if facts.load_error is not None:  # nothing runs yet, and the CUDA library was not tried
        return
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
        if facts.has_nvidia_driver:
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
        yield Diagnosis(False, _sentence(facts.cuda_problem))
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
            "--force-reinstall --no-deps .` in the source folder.",
        )
    elif facts.toolkit_is_too_new:
        driver = ".".join(map(str, facts.driver_cuda or ()))
        yield Diagnosis(
            False,
            f"The CUDA library was built with CUDA {facts.cuda_toolkit}, and the NVIDIA driver runs up to {driver}: "
            f"update the driver, or rebuild with `CUDA_HOME` naming a CUDA {driver.split('.')[0]} toolkit.",
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


def _state(exists: bool, state: str) -> str:
    return state if exists else "not built"


def report(facts: Facts) -> str:
    """The facts as a table."""

    isa = f", {facts.cpu_isa} kernels, built against torch {facts.built_with_torch}" if facts.cpu_isa else ""
    if facts.cuda_toolkit:
        cuda_state = f"loaded, CUDA {facts.cuda_toolkit}, for {' '.join(facts.cuda_architectures)}"
    elif facts.torch_cuda is None:
        cuda_state = "present, not needed"
    else:
        cuda_state = "not tried" if facts.load_error else "does not load"
    kernels = facts.operators
    registered = f"{kernels['CPU']} CPU, {kernels['CUDA']} CUDA, {kernels['Meta']} Meta" if kernels else "none"
    if kernels and facts.cuda_problem is not None:
        registered = f"{kernels['CPU']} CPU, {kernels['Meta']} Meta; CUDA tensors get an explanation"
    capability = f" ({facts.capability[0]}.{facts.capability[1]})" if facts.capability else ""
    driver = f", driver for CUDA {facts.driver_cuda[0]}.{facts.driver_cuda[1]}" if facts.driver_cuda else ""
    lines = {
        "mixture_of_mamba": f"{__version__} in {facts.folder}",
        "python": f"{platform.python_version()} on {facts.system} {facts.machine}",
        "torch": f"{facts.torch}, CUDA {facts.torch_cuda or 'none'}",
        "GPU": f"{facts.gpu}{capability}{driver}" if facts.gpu else "none",
        "nvcc": facts.nvcc or "none",
        "CPU library": _state(facts.has_cpu_library, "does not load" if facts.load_error else f"loaded{isa}"),
        "CUDA library": _state(facts.has_cuda_library, cuda_state),
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
