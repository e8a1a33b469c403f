# SPDX-License-Identifier: Apache-2.0
"""The build backend: which torch is built against, what a build is told, and its errors."""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[3]
BACKEND = SOURCE / "tools" / "build_backend.py"

pytestmark = pytest.mark.skipif(not BACKEND.exists(), reason="not in a source tree")


class FailedLiveProcessError(Exception):
    """Stands for scikit-build-core's."""


def load(monkeypatch, versions):
    """The backend beside a stand-in for scikit-build-core, in an environment with these packages."""

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    hooks = ("build_wheel", "build_editable", "build_sdist", "get_requires_for_build_wheel")
    build_meta = types.ModuleType("scikit_build_core.setuptools.build_meta")
    for hook in (*hooks, "get_requires_for_build_editable"):
        setattr(build_meta, hook, lambda *args: ["ninja"])
    plugin = types.ModuleType("scikit_build_core.setuptools")
    plugin.build_meta = build_meta
    errors = types.ModuleType("scikit_build_core.errors")
    errors.FailedLiveProcessError = FailedLiveProcessError
    core = types.ModuleType("scikit_build_core")
    for module in (core, errors, plugin, build_meta):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location("backend_under_test", BACKEND)
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)
    return backend


@pytest.fixture
def backend(monkeypatch, tmp_path):
    """In an empty folder, in an environment without torch."""
    loaded = load(monkeypatch, {"scikit-build-core": "1.1.2", "setuptools": "84.2.1"})
    monkeypatch.setattr(loaded.sysconfig, "get_paths", lambda: {"purelib": tmp_path / "site", "platlib": tmp_path})
    monkeypatch.setattr(loaded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PWD", str(tmp_path))
    for name in ("MOM_TORCH_ROOT", "MOM_CUDA", "MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what the backend sets is undone
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return loaded


def put_torch(site: Path, version: str) -> Path:
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "version.py").write_text(f"from typing import Optional\n__version__ = '{version}'\n")
    return site / "torch"


@pytest.mark.parametrize(
    ("version", "recent"),
    [("2.11.0", True), ("2.13.0+cpu", True), ("3.0.0a0+git1", True), ("2.10.1+cu128", False), ("1.13.1", False)],
)
def test_the_target_environments_torch_is_used_when_it_is_recent(backend, tmp_path, version, recent):
    torch = put_torch(tmp_path / "site", version)
    assert backend.torch_folder() == (torch if recent else None)
    wanted = ["ninja"] if recent else ["ninja", "torch>=2.11"]
    assert backend.get_requires_for_build_wheel() == wanted
    assert backend.get_requires_for_build_editable() == wanted


def test_an_activated_environment_is_found_from_any_isolation(backend, tmp_path, monkeypatch):
    torch = put_torch(tmp_path / "env/lib/python3.11/site-packages", "2.13.0")
    monkeypatch.setenv("PATH", f"/isolated/bin:{tmp_path}/env/bin")
    assert backend.torch_folder() is None  # any folder may be on PATH
    (tmp_path / "env/pyvenv.cfg").touch()
    assert backend.torch_folder() == torch


def test_the_environment_in_the_users_folder_is_found(backend, tmp_path, monkeypatch):
    torch = put_torch(tmp_path / "project/.venv/lib/python3.12/site-packages", "2.13.0")
    monkeypatch.setenv("PWD", str(tmp_path / "project"))
    assert backend.torch_folder() == torch


def test_a_given_torch_is_enough(backend, monkeypatch):
    monkeypatch.setenv("MOM_TORCH_ROOT", "/elsewhere/torch")
    assert backend.get_requires_for_build_wheel() == ["ninja"]
    backend.build_wheel("out")
    assert backend.os.environ["MOM_TORCH_ROOT"] == "/elsewhere/torch"


def test_an_earlier_build_leaves_nothing(backend, tmp_path):
    """setuptools would pack it into the wheel."""
    staged = tmp_path / "build/lib.linux-x86_64-cpython-311/mixture_of_mamba"
    (staged / "lib").mkdir(parents=True)
    (staged / "lib/libmixture_of_mamba_cuda.so").touch()
    compiled = tmp_path / "build/temp.linux-x86_64-cpython-311"
    compiled.mkdir()
    backend.build_wheel("out")
    assert not staged.exists()
    assert compiled.exists()


@pytest.mark.parametrize(
    ("given", "settings", "told"),
    [
        (None, None, "AUTO"),
        ("", {}, "AUTO"),
        ("ON", None, "ON"),
        (None, {"cmake.define.MOM_CUDA": "OFF"}, None),
    ],
)
def test_every_build_says_whether_it_wants_cuda(backend, monkeypatch, given, settings, told):
    """CMake's cache would answer with an earlier build's choice."""
    if given is not None:
        monkeypatch.setenv("MOM_CUDA", given)
    backend.build_editable("out", settings)
    assert backend.os.environ.get("MOM_CUDA") == told


def test_max_jobs(backend, monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    backend.build_wheel("out")
    assert backend.os.environ["CMAKE_BUILD_PARALLEL_LEVEL"] == "3"


def test_a_failed_build_ends_without_a_traceback(backend, monkeypatch):
    def fail(*args):
        raise FailedLiveProcessError("CMake configuration failed")

    monkeypatch.setattr(backend.build_meta, "build_wheel", fail)
    with pytest.raises(SystemExit, match="CMake configuration failed: see the messages above"):
        backend.build_wheel("out")


@pytest.mark.parametrize(
    "versions", [{"setuptools": "84.2.1"}, {"scikit-build-core": "1.1.2", "setuptools": "65.5.0"}, {}]
)
def test_without_isolation_the_missing_requirements_are_named(monkeypatch, versions):
    with pytest.raises(SystemExit, match=r"pip install 'scikit-build-core>=1\.1' 'setuptools>=77'$"):
        load(monkeypatch, versions)


def test_the_requirements_are_those_of_the_project(backend):
    listed = re.search(r"^requires = \[(.*)\]$", (SOURCE / "pyproject.toml").read_text(), re.MULTILINE)[1]
    stated = re.findall(r'"([\w-]+)(?:\[[\w-]+\])?>=([\d.]+)"', listed)
    assert {name: tuple(map(int, version.split("."))) for name, version in stated} == backend.BUILD_REQUIREMENTS
