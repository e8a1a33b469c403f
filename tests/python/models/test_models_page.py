# SPDX-License-Identifier: Apache-2.0
"""What docs/models.md shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.findall(r"\w+\(", snippet)[0][:-1])
def test_snippets_run(snippet):
    exec(compile(snippet, "docs/models.md", "exec"), {})


def test_sizes_are_those_of_the_code():
    from mixture_of_mamba.models import SIZES

    rows = re.findall(r"\| `([\w.-]+)` \| (\d+), (\d+) \|", PAGE.read_text())
    assert {name: (int(d_model), int(layers)) for name, d_model, layers in rows} == SIZES
