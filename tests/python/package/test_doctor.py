# SPDX-License-Identifier: Apache-2.0
"""The doctor names each way in which an installation can be off, with its fix, and only then."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mixture_of_mamba import doctor
from mixture_of_mamba.doctor import Facts, diagnose, report, runs_on

HEALTHY = Facts(
    system="Linux",
    machine="x86_64",
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_hip=None,
    gpu="NVIDIA H200",
    capability=(9, 0),
    has_mps=False,
    nvcc="/usr/local/cuda/bin/nvcc",
    folder="/env/site-packages/mixture_of_mamba",
    is_source_tree=False,
    has_cpu_library=True,
    has_cuda_library=True,
    load_error=None,
    cuda_problem=None,
    built_with_torch="2.13.0",
    cpu_isa="avx512",
    cuda_toolkit="13.0",
    cuda_architectures=("90-real",),
    operators={"CPU": 10, "CUDA": 10, "Meta": 10},
    neighbours=(),
)

ILL = {
    "another torch's ABI": (
        {"load_error": "undefined symbol: aoti_torch_new", "operators": {}},
        True,
        r"Built against torch 2\.13\.0, running torch 2\.13\.0\+cu130: undefined symbol",
    ),
    "built without nvcc": (
        {"has_cuda_library": False, "nvcc": None, "cuda_toolkit": None},
        False,
        r"built without CUDA: install the CUDA toolkit \(nvcc\) 13\.0",
    ),
    "built with CUDA off": ({"has_cuda_library": False, "cuda_toolkit": None}, False, r"MOM_CUDA=ON pip install"),
    "source folder shadows the package": (
        {"load_error": "x", "has_cpu_library": False, "is_source_tree": True},
        True,
        r"source folder .* not built: run `pip install -e \.`",
    ),
    "half an installation": ({"load_error": "x", "has_cpu_library": False}, True, r"lacks .*--force-reinstall"),
    "CUDA library does not load": (
        {"cuda_problem": "the CUDA library does not load: rebuild mixture_of_mamba in this environment"},
        False,
        r"The CUDA library does not load: rebuild",
    ),
    "neighbours that clash": (
        {"neighbours": ("mamba_ssm",)},
        False,
        r"mamba_ssm installed beside: .*selective_scan_fn",
    ),
    "neighbouring convolution": ({"neighbours": ("causal_conv1d",)}, False, r"causal_conv1d_fn from mixture_of_mamba"),
    "Windows": ({"system": "Windows", "load_error": "x", "has_cpu_library": False}, True, r"Windows is not supported"),
    "newer GPU": ({"capability": (12, 0)}, False, r'no kernel image.*TORCH_CUDA_ARCH_LIST="12\.0"'),
    "AMD": ({"torch_hip": "6.4", "torch_cuda": None}, False, r"AMD GPUs \(ROCm 6\.4\)"),
    "Apple": ({"has_mps": True, "torch_cuda": None, "gpu": None}, False, r"Apple GPUs \(mps\) have no kernels"),
    "no GPU": ({"gpu": None, "capability": None}, False, r"sees no GPU: check `nvidia-smi`"),
}


def test_a_healthy_installation_has_no_finding():
    assert diagnose(HEALTHY) == []


@pytest.mark.parametrize("case", ILL)
def test_each_failure_gets_one_sentence_with_its_fix(case):
    changes, fatal, sentence = ILL[case]
    (finding,) = diagnose(replace(HEALTHY, **changes))
    assert finding.fatal == fatal
    assert re.search(sentence, finding.sentence), finding.sentence
    assert "\n" not in finding.sentence


def test_an_nvidia_driver_beside_a_cpu_torch(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    (finding,) = diagnose(replace(HEALTHY, torch_cuda=None, gpu=None, capability=None))
    assert "built without CUDA: install a CUDA build of torch" in finding.sentence


def test_fatal_findings_come_first():
    facts = replace(HEALTHY, load_error="broken", neighbours=("mamba_ssm",))
    assert [finding.fatal for finding in diagnose(facts)] == [True, False]


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("90-real",), (9, 0), True),
        (("90-real",), (10, 0), False),
        (("90",), (10, 0), True),  # PTX is compiled for newer GPUs by the driver
        (("80-real",), (8, 6), True),  # machine code runs on later minor versions
        (("86-real",), (8, 0), False),
        (("80-real", "120"), (9, 0), False),
        (("90a-real",), (9, 0), True),
        ((), (9, 0), False),
    ],
)
def test_which_gpu_runs_which_code(architectures, capability, runs):
    assert runs_on(architectures, capability) == runs


def test_the_report_names_everything():
    text = report(HEALTHY)
    for word in ("H200 (9.0)", "avx512", "2.13.0+cu130", "for 90-real", "10 CPU, 10 CUDA, 10 Meta"):
        assert word in text


def test_the_command_runs_here():
    done = subprocess.run(
        [sys.executable, "-m", "mixture_of_mamba.doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "CPU library       loaded" in done.stdout


def test_the_command_runs_when_the_library_is_missing(tmp_path):
    """The package cannot be imported then; the doctor still can."""
    program = (
        "import sys, pathlib; sys.orig_argv = ['python', '-m', 'mixture_of_mamba.doctor'];"
        "import importlib.util as u; s = u.find_spec('mixture_of_mamba');"
        "import shutil; shutil.copytree(pathlib.Path(s.origin).parent, sys.argv[1] + '/mixture_of_mamba',"
        " ignore=shutil.ignore_patterns('lib', '__pycache__'));"
        "sys.path.insert(0, sys.argv[1]);"
        "from mixture_of_mamba import doctor; assert sys.argv[1] in doctor.__file__; sys.exit(doctor.main())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM  The installed package lacks libmixture_of_mamba.so" in done.stdout


def test_import_without_the_library_fails_with_one_sentence(tmp_path):
    program = (
        "import sys, pathlib, shutil, importlib.util as u; s = u.find_spec('mixture_of_mamba');"
        "shutil.copytree(pathlib.Path(s.origin).parent, sys.argv[1] + '/mixture_of_mamba',"
        " ignore=shutil.ignore_patterns('lib', '__pycache__'));"
        "sys.path.insert(0, sys.argv[1]); import mixture_of_mamba"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: mixture_of_mamba is not built:" in done.stderr
