# SPDX-License-Identifier: Apache-2.0
"""Thin: metadata is in pyproject.toml, the build in CMakeLists.txt."""

import os

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel


class AnyPython(bdist_wheel):
    """The libraries use torch's stable ABI and no Python symbol, so one wheel serves every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


options = {name: os.environ[name] for name in ("MOM_TORCH_ROOT", "MOM_CUDA") if os.environ.get(name)}

setup(
    cmake_source_dir=".",
    cmake_args=[f"-D{name}={value}" for name, value in options.items()],
    cmdclass={"bdist_wheel": AnyPython},
)
