# SPDX-License-Identifier: Apache-2.0
"""PEP 517 backend: scikit-build-core's setuptools plugin, building against the target environment's torch.

pip builds in an isolated environment that has no torch, and fetching gigabytes of it for its headers would be
absurd, and wrong when the versions differ. The environment that the package is for is still visible, so its torch is
used; only where there is none does the build ask for one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from scikit_build_core.setuptools import build_meta
from scikit_build_core.setuptools.build_meta import *  # noqa: F403

TORCH_REQUIREMENT = "torch>=2.11"


def torch_folder() -> Path | None:
    """The ``torch`` package of the environment that the build is for."""
    folders = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")]
    if environment := os.environ.get("VIRTUAL_ENV"):  # uv isolates with another interpreter
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        folders.append(Path(environment) / "lib" / version / "site-packages")
    for folder in folders:
        if (folder / "torch" / "version.py").exists():
            return folder / "torch"
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _torch_requirement() -> list[str]:
    return [] if "MOM_TORCH_ROOT" in os.environ or torch_folder() else [TORCH_REQUIREMENT]


def _set_up_build() -> None:
    if folder := torch_folder():
        os.environ.setdefault("MOM_TORCH_ROOT", str(folder))
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", jobs)


def get_requires_for_build_wheel(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: dict[str, str | list[str]] | None = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, str | list[str]] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _set_up_build()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, str | list[str]] | None = None,
    metadata_directory: str | None = None,
) -> str:
    _set_up_build()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
