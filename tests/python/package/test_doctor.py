# SPDX-License-Identifier: Apache-2.0
"""The doctor names each way in which an installation can be off, with its fix, and only then."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from mixture_of_mamba import _installation, _library
from mixture_of_mamba.doctor import Facts, diagnose, report, runs_on

HEALTHY = Facts(
    system="Linux",
    machine="x86_64",
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_hip=None,
    gpu="NVIDIA H200",
    capability=(9, 0),
    driver_cuda=(13, 0),
    has_nvidia_driver=True,
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
    "another torch's ABI, built by who knows": (
        {"load_error": "undefined symbol: aoti_torch_new", "operators": {}, "built_with_torch": None},
        True,
        r"^Undefined symbol",
    ),
    "a torch from before the stable ABI": (
        {"torch": "2.7.1+cu128", "load_error": "x", "operators": {}, "built_with_torch": None},
        True,
        r"torch 2\.7\.1\+cu128 is too old, .* needs torch >= 2\.11: `pip install --upgrade torch`",
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
    "nothing else is said while nothing runs": (
        {"load_error": "broken", "has_cuda_library": False, "cuda_toolkit": None, "cuda_architectures": ()},
        True,
        r"broken\.$",
    ),
    "neighbours that clash": (
        {"neighbours": ("mamba_ssm",)},
        False,
        r"mamba_ssm installed beside: .*selective_scan_fn",
    ),
    "neighbouring convolution": ({"neighbours": ("causal_conv1d",)}, False, r"causal_conv1d_fn from mixture_of_mamba"),
    "Windows": ({"system": "Windows", "load_error": "x", "has_cpu_library": False}, True, r"Windows is not .* WSL2"),
    "Mac": (
        {"system": "Darwin", "load_error": "x", "has_cpu_library": False, "has_mps": True, "torch_cuda": None},
        True,
        r"macOS is not supported.*use Linux, a container",
    ),
    "newer GPU": ({"capability": (12, 0)}, False, r'no kernel image.*TORCH_CUDA_ARCH_LIST="12\.0"'),
    "older GPU": ({"capability": (8, 0)}, False, r'is 8\.0 \("no kernel image"\).*TORCH_CUDA_ARCH_LIST="8\.0"'),
    "older driver": (
        {"driver_cuda": (12, 8)},
        False,
        r"built with CUDA 13\.0, and the NVIDIA driver runs up to 12\.8: update .*, or rebuild with `CUDA_HOME`",
    ),
    "an NVIDIA driver beside a CPU torch": (
        {"torch_cuda": None, "gpu": None, "capability": None},
        False,
        r"NVIDIA driver, but torch .* is built without CUDA: install a CUDA build of torch",
    ),
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
    assert re.fullmatch(r"[A-Zmtc].*\.", finding.sentence), "one line, one full stop at its end"
    assert not re.search(r"\. [A-Z]", finding.sentence), "one sentence"


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
    words = "H200 (9.0), driver for CUDA 13.0", "avx512", "2.13.0+cu130", "for 90-real", "10 CPU, 10 CUDA, 10 Meta"
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"has_cuda_library": False, "cuda_toolkit": None}, "CUDA library      not built"),
        ({"torch_cuda": None, "cuda_toolkit": None}, "CUDA library      present, not needed"),
        ({"cuda_problem": "x", "cuda_toolkit": None}, "CUDA library      does not load"),
        ({"load_error": "x", "cuda_toolkit": None, "operators": {}}, "CUDA library      not tried"),
        ({"load_error": "x", "operators": {}}, "CPU library       does not load"),
        ({"cuda_problem": "x"}, "operators         10 CPU, 10 Meta; CUDA tensors get an explanation"),
        ({"gpu": None, "capability": None}, "GPU               none"),
    ],
)
def test_the_report_of_an_ill_installation(changes, line):
    assert line in report(replace(HEALTHY, **changes)).splitlines()


def test_a_library_that_does_not_load_still_tells_its_torch(monkeypatch, tmp_path):
    library = tmp_path / "libmixture_of_mamba.so"
    library.write_bytes(b"\x7fELF, cut short")
    monkeypatch.setattr(_library, "CPU_LIBRARY", library)
    assert _installation._built_with_torch() is None
    library.write_bytes(b"\x7fELF\0mixture_of_mamba built with torch 2.13.0+cpu\0")
    assert _installation._built_with_torch() == "2.13.0+cpu"


def test_libraries_of_other_sources_are_told_apart(monkeypatch):
    """After `git pull` without a build, Python knows operators that the libraries do not have."""
    monkeypatch.setattr(_library, "_loaded", False)
    monkeypatch.setattr(_library, "OPERATORS", (*_library.OPERATORS, "future_operator"))
    with pytest.raises(ImportError, match=r"built from other sources .* it lacks future_operator; rebuild it .*`pip"):
        _library.load()


def test_a_cuda_library_of_other_sources_is_told_apart(monkeypatch):
    monkeypatch.setattr(_library.torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_LIBRARY", _library.CPU_LIBRARY)
    monkeypatch.setattr(_library, "_has_cuda_kernel", lambda name: name != "selective_scan")
    assert re.search(r"^the CUDA library was built .* lacks selective_scan; rebuild it", _library._load_cuda())


@pytest.mark.parametrize("options", [[], ["-u"], ["-X", "utf8", "-W", "ignore"]])
def test_the_doctor_is_recognised_behind_any_option(monkeypatch, options):
    monkeypatch.setattr(sys, "orig_argv", ["python", *options, "-m", "mixture_of_mamba.doctor"])
    assert _library.doctor_was_called()
    monkeypatch.setattr(sys, "orig_argv", ["python", *options, "-m", "pytest", "mixture_of_mamba.doctor"])
    assert not _library.doctor_was_called()


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


@pytest.mark.parametrize("doctor", [False, True])
def test_without_torch_there_is_one_sentence_too(tmp_path, doctor):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        f"sys.orig_argv = ['python', '-m', 'mixture_of_mamba.doctor'] if {doctor} else sys.orig_argv;"
        "import mixture_of_mamba"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    sentence = "mixture_of_mamba needs torch >= 2.11, and torch cannot be imported (libcudart.so.13: cannot open"
    assert f"{'PROBLEM  ' if doctor else 'ImportError: '}{sentence}" in done.stderr
    assert ("Traceback" in done.stderr) != doctor
