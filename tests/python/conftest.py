# SPDX-License-Identifier: Apache-2.0
"""What all Python tests share: the ``cuda`` marker, ``--fuzz``, devices, seeds and poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

DEFAULT_FUZZ = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        default=DEFAULT_FUZZ,
        metavar="N",
        help=f"random configurations over all operators (default {DEFAULT_FUZZ}, always the same ones; "
        "any other number draws new ones)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU; skipped where there is none")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(20250127)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN (the largest value for integers), so an element never written is seen."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def full_precision_matmul() -> Iterator[None]:
    """float32 means float32: no TF32 in the products that are compared."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[[float], dict[str, object]]:
    """Hypothesis settings for a share of the ``--fuzz`` configurations."""
    total = request.config.getoption("--fuzz")

    def settings(share: float) -> dict[str, object]:
        examples = max(1, round(share * total))
        return {
            "max_examples": examples,
            "deadline": None,
            "derandomize": total == DEFAULT_FUZZ,
            "database": None,
            "print_blob": True,
        }

    return settings
