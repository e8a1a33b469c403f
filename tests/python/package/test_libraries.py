# SPDX-License-Identifier: Apache-2.0
"""The shared libraries: what they need from torch, what they keep to themselves, and what they say of themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixture_of_mamba
from mixture_of_mamba import _library

LIBRARIES = [path for path in (_library.CPU_LIBRARY, _library.CUDA_LIBRARY) if path.exists()]
SOURCE = Path(__file__).parents[3]

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
each_library = pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)


def symbols(library: Path, *options: str) -> list[str]:
    command = ["nm", "--dynamic", "--demangle", *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_nm
@each_library
def test_nothing_of_torchs_cpp_interface_is_needed(library):
    """Only the C functions of the stable ABI: c10, at and torch symbols change between versions."""
    needed = [line.split(maxsplit=1)[1] for line in symbols(library, "--undefined-only")]
    unstable = [name for name in needed if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert unstable == []
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in needed)


@needs_nm
@each_library
def test_no_python_symbol_is_needed(library):
    needed = " ".join(symbols(library, "--undefined-only"))
    assert not re.search(r"\b_?Py[A-Z_]", needed)


@needs_nm
@each_library
def test_only_the_self_description_is_exported(library):
    """Anything else could clash with another extension that is loaded into the process."""
    exported = [line.split(maxsplit=2)[2] for line in symbols(library, "--defined-only")]
    from_compiler = ("std::", "typeinfo", "vtable", "__bss_start", "_edata", "_end", "_init", "_fini")
    ours = [name for name in exported if not name.startswith(from_compiler)]
    assert ours
    assert all(name.startswith("mixture_of_mamba_") for name in ours), ours


def test_the_file_tells_the_torch_it_was_built_against():
    """So that it can be read where the library does not load."""
    assert re.search(rb"mixture_of_mamba built with torch \d+\.\d+", _library.CPU_LIBRARY.read_bytes())


def test_versions_agree():
    cmake = (SOURCE / "CMakeLists.txt").read_text() if (SOURCE / "CMakeLists.txt").exists() else None
    if cmake is None:
        pytest.skip("not in a source tree")
    assert f"project(mixture_of_mamba VERSION {mixture_of_mamba.__version__} " in cmake


def test_the_public_names_exist_and_are_documented():
    for name in mixture_of_mamba.__all__:
        thing = getattr(mixture_of_mamba, name)
        if callable(thing):
            assert thing.__doc__, f"{name} has no docstring"


@pytest.mark.parametrize("name", ["checkpoints", "models", "reference", "integrations.mamba_ssm"])
def test_submodules_are_there_when_they_are_named(name):
    """As pages and messages write them, after `import mixture_of_mamba` alone."""
    code = f"import mixture_of_mamba; print(mixture_of_mamba.{name}.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"mixture_of_mamba.{name}"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        mixture_of_mamba.nothing  # noqa: B018
