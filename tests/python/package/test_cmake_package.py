# SPDX-License-Identifier: Apache-2.0
"""``python -m mixture_of_mamba --cmake-prefix`` and what CMake finds there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mixture_of_mamba

PACKAGE = Path(mixture_of_mamba.__file__).resolve().parent
CONSUMER = Path(__file__).parents[2] / "cpp/consumer"


def ask(*arguments, package=PACKAGE):
    command = [sys.executable, "-m", "mixture_of_mamba", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=package.parent)


@pytest.fixture
def prefix():
    if not (PACKAGE / "lib/cmake").is_dir():
        pytest.skip("imported from a source folder, without files for C++")
    return ask("--cmake-prefix").stdout.strip()


def test_the_prefix_is_the_package(prefix):
    assert Path(prefix) == PACKAGE
    headers = PACKAGE / "lib/mixture_of_mamba/frontend/include/mixture_of_mamba"
    assert {"nn.h", "ops.h", "routing.h"} <= {path.name for path in headers.iterdir()}


def test_a_package_without_files_for_cpp_says_what_to_do(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "mixture_of_mamba", ignore=shutil.ignore_patterns("cmake", "__pycache__"))
    answer = ask("--cmake-prefix", package=tmp_path / "mixture_of_mamba")
    assert answer.returncode == 1
    assert "holds no files for C++ programs: run `pip install .`" in answer.stderr


def test_the_version_and_the_help():
    assert ask("--version").stdout.strip() == mixture_of_mamba.__version__
    assert "--cmake-prefix" in ask().stdout


def run_cmake(project, build, *options):
    found = f"-DTorch_DIR={torch.utils.cmake_prefix_path}/Torch"
    command = ["cmake", "-S", str(project), "-B", str(build), found, *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def needs_torch_s_own_package(tmp_path_factory):
    """That of a torch with CUDA wants all of its toolkit."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    if torch.version.cuda:
        project = tmp_path_factory.mktemp("torch")
        lines = "cmake_minimum_required(VERSION 3.25)\nproject(asks LANGUAGES CXX)\nfind_package(Torch REQUIRED)\n"
        (project / "CMakeLists.txt").write_text(lines)
        if run_cmake(project, project / "build").returncode != 0:
            pytest.skip("find_package(Torch) alone fails here, for want of the CUDA toolkit")


def configure(tmp_path, prefix, project=CONSUMER):
    return run_cmake(project, tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")


@pytest.mark.usefixtures("needs_torch_s_own_package")
def test_cmake_finds_the_package(tmp_path, prefix):
    done = configure(tmp_path, prefix)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("needs_torch_s_own_package")
def test_cmake_refuses_an_unknown_component_and_another_version(tmp_path, prefix):
    for request, reason in (("COMPONENTS ops gpu", "components are ops and nn, got gpu"), ("9.9", "version: 0.1.0")):
        project = tmp_path / request.split()[0]
        project.mkdir()
        (project / "CMakeLists.txt").write_text(
            "cmake_minimum_required(VERSION 3.25)\nproject(asks LANGUAGES CXX)\n"
            f"find_package(MixtureOfMamba {request} REQUIRED)\n"
        )
        done = configure(project, prefix, project)
        assert done.returncode != 0
        assert reason in " ".join(done.stderr.split())
