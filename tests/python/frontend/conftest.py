# SPDX-License-Identifier: Apache-2.0
"""The C++ modules, as a Python module."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from cpp_build import module_path


@pytest.fixture(scope="session")
def cpp_path() -> Path:
    if (path := module_path()) is None:
        pytest.skip("the C++ modules are not built for this torch (make test-cpp builds them)")
    return path


@pytest.fixture(scope="session")
def cpp(cpp_path) -> Any:
    spec = importlib.util.spec_from_file_location("mixture_of_mamba_cpp", cpp_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
