# SPDX-License-Identifier: Apache-2.0
"""What docs/training.md shows runs; what it needs beyond torch is looked for first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[3] / "docs/training.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(?:.*?)```python\n(.*?)```", GUIDE.read_text(), re.DOTALL | re.MULTILINE))


def test_every_snippet_is_found():
    assert len(SECTIONS) == GUIDE.read_text().count("```python") == 7


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.filterwarnings("ignore")
def test_snippets_run(section):
    for needed in re.findall(r"^(?:import|from) (accelerate|peft)", SECTIONS[section], re.MULTILINE):
        pytest.importorskip(needed)
    exec(compile(SECTIONS[section], GUIDE.name, "exec"), {})
