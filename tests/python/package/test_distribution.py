# SPDX-License-Identifier: Apache-2.0
"""What is distributed: the wheel's tag, the source archive, the installed files, and what an import needs."""

from __future__ import annotations

import importlib.metadata
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools

import mixture_of_mamba

PACKAGE = Path(mixture_of_mamba.__file__).parent
SOURCE = Path(__file__).parents[3]

in_source_tree = pytest.mark.skipif(not (SOURCE / "setup.py").exists(), reason="not in a source tree")


def python(program, *arguments, **options):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


@in_source_tree
def test_one_wheel_serves_every_python(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(SOURCE / "setup.py"))
    command = given["cmdclass"]["bdist_wheel"](setuptools.Distribution())
    command.finalize_options()
    command.root_is_pure = False
    python_tag, abi, platform = command.get_tag()
    assert (python_tag, abi) == ("py3", "none")
    assert platform != "any"


@in_source_tree
def test_setup_hands_the_environments_choices_to_cmake(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    monkeypatch.setenv("MOM_CUDA", "ON")
    monkeypatch.setenv("MOM_TORCH_ROOT", "/env/torch")
    runpy.run_path(str(SOURCE / "setup.py"))
    assert sorted(given["cmake_args"]) == ["-DMOM_CUDA=ON", "-DMOM_TORCH_ROOT=/env/torch"]


@in_source_tree
def test_the_source_archive_holds_what_the_build_needs(tmp_path):
    names = ("csrc", "cmake", "mixture_of_mamba", "tools")
    for name in names:
        shutil.copytree(SOURCE / name, tmp_path / name, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    for path in SOURCE.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    (tmp_path / "tests/python").mkdir(parents=True)
    (tmp_path / "tests/python/test_something.py").touch()
    archive = python("from setuptools import build_meta; print(build_meta.build_sdist('dist'))", cwd=tmp_path)
    with tarfile.open(tmp_path / "dist" / archive.splitlines()[-1]) as packed:
        members = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
    needed = {path.relative_to(tmp_path).as_posix() for name in names[:3] for path in (tmp_path / name).rglob("*.*")}
    needed |= {"CMakeLists.txt", "pyproject.toml", "setup.py", "tools/build_backend.py", "LICENSE", "README.md"}
    assert needed <= members
    assert not [name for name in members if name.startswith("tests") or name.endswith((".so", ".pyc"))]


def test_torch_is_the_only_dependency():
    try:
        requirements = importlib.metadata.requires("mixture_of_mamba") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("imported from a source folder, without metadata")
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.11"]


def test_the_package_is_typed_and_holds_no_tests():
    assert (PACKAGE / "py.typed").exists()
    assert not list(PACKAGE.rglob("test_*.py"))


def test_an_import_brings_in_nothing_but_torch():
    """Torch's own FLOP counter, whose registry is filled, imports triton where torch came with it."""
    program = (
        "import sys, torch.utils.flop_counter; before = {name.split('.')[0] for name in sys.modules};"
        "import mixture_of_mamba; after = {name.split('.')[0] for name in sys.modules};"
        "print(*sorted(after - before - set(sys.stdlib_module_names)))"
    )
    assert python(program).split() == ["mixture_of_mamba"]


def test_an_import_needs_no_gpu_and_no_toolkit(tmp_path):
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": "", "CUDA_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment["PYTHONPATH"] = str(PACKAGE.parent)
    program = (
        "import torch, mixture_of_mamba as mom; x = torch.ones(1, 3, 2, requires_grad=True);"
        "y, _ = mom.causal_conv1d(x, torch.ones(2, 2), silu=False); y.sum().backward(); print(x.grad.sum().item())"
    )
    assert python(program, cwd=tmp_path, env=environment).split() == ["10.0"]


CUDA_LIBRARIES = {
    "is missing": (None, r"built without CUDA; install the CUDA toolkit \(nvcc\) and rebuild"),
    "does not load": ("not a library", r"CUDA library does not load with torch .*; rebuild"),
}


@pytest.mark.parametrize("case", CUDA_LIBRARIES)
def test_an_import_survives_a_cuda_library_that(case, tmp_path):
    """On a torch with CUDA: the CPU works, and CUDA tensors get the reason."""
    content, reason = CUDA_LIBRARIES[case]
    ignored = shutil.ignore_patterns("*_cuda.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "mixture_of_mamba", ignore=ignored)
    if content is not None:
        (tmp_path / "mixture_of_mamba/lib/libmixture_of_mamba_cuda.so").write_text(content)
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.version.cuda = torch.version.cuda or '13.0';"
        "import mixture_of_mamba as mom; assert mom.__file__.startswith(sys.argv[1]);"
        "mom.modality_routing(torch.zeros(1, 2, dtype=torch.int32), 1); print(mom._library.cuda_problem())"
    )
    problem = python(program, tmp_path)
    assert re.search(reason, problem), problem
