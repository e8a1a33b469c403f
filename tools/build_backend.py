# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: scikit-build-core's setuptools plugin, building against the target environment's torch.

pip builds in an isolated environment that has no torch, and fetching gigabytes of it for its headers would be
absurd, and wrong when the versions differ. The environment that the package is for is still visible, so its torch is
used; only where there is none does the build ask for one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

BUILD_REQUIREMENTS = {"scikit-build-core": (1, 1), "setuptools": (77,)}  # as in pyproject.toml
MINIMUM_TORCH = (2, 11)


def check_build_requirements() -> None:
    """With --no-build-isolation nobody else does, and the user would meet a traceback."""
    for name, minimum in BUILD_REQUIREMENTS.items():
        try:
            installed = tuple(int(part) for part in metadata.version(name).split(".")[:2])
        except metadata.PackageNotFoundError:
            installed = ()
        if installed < minimum:
            wanted = " ".join(f"'{name}>={'.'.join(map(str, least))}'" for name, least in BUILD_REQUIREMENTS.items())
            sys.exit(f"Without build isolation, install what the build needs first: pip install {wanted}")


check_build_requirements()

from scikit_build_core.errors import FailedLiveProcessError  # noqa: E402
from scikit_build_core.setuptools import build_meta  # noqa: E402
from scikit_build_core.setuptools.build_meta import *  # noqa: E402, F403

Settings = dict[str, str | list[str]] | None


def is_recent(torch: Path) -> bool:
    """Whether a folder is a torch package that can be built against; an older one is about to be replaced."""
    version_file = torch / "version.py"
    if not version_file.exists():
        return False
    version = re.search(r"^__version__.*?['\"](\d+)\.(\d+)", version_file.read_text(), re.MULTILINE)
    return version is not None and (int(version[1]), int(version[2])) >= MINIMUM_TORCH


def torch_folder() -> Path | None:
    """The ``torch`` package of the environment that the build is for.

    Within pip's isolation this interpreter still knows it. uv and build isolate with another interpreter; they leave
    the environment that is activated, or that lies in the user's folder, to be found. Any torch that is recent enough
    will do: the libraries run on all of them.
    """
    folders = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")]
    on_path = (Path(entry).parent for entry in os.environ.get("PATH", "").split(os.pathsep))
    environments = [folder for folder in on_path if (folder / "pyvenv.cfg").exists()]
    environments.append(Path(os.environ.get("PWD", ".")) / ".venv")
    for environment in environments:
        folders += sorted(environment.glob("lib/python3*/site-packages"))
    if (spec := importlib.util.find_spec("torch")) and spec.origin:
        folders.append(Path(spec.origin).parents[1])
    return next((folder / "torch" for folder in folders if is_recent(folder / "torch")), None)


def _torch_requirement() -> list[str]:
    return [] if "MOM_TORCH_ROOT" in os.environ or torch_folder() else [f"torch>={MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}"]


@contextlib.contextmanager
def _build(config_settings: Settings) -> Iterator[None]:
    _set_up(config_settings)
    try:
        yield
    except FailedLiveProcessError as error:
        # CMake or the compiler has already said why; a traceback through setuptools would bury it.
        sys.exit(f"{error}: see the messages above")


def _set_up(config_settings: Settings) -> None:
    if folder := torch_folder():
        os.environ.setdefault("MOM_TORCH_ROOT", str(folder))
    # Said anew in every build: CMake would go on with what an earlier one in this folder was given.
    if "cmake.define.MOM_CUDA" not in (config_settings or {}) and not os.environ.get("MOM_CUDA"):
        os.environ["MOM_CUDA"] = "AUTO"
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", jobs)
    # setuptools packs all that lies in its staging folder, modules deleted since the last build included.
    for staged in Path("build").glob("lib*/mixture_of_mamba"):
        shutil.rmtree(staged)


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    with _build(config_settings):
        return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    with _build(config_settings):
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
