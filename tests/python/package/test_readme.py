# SPDX-License-Identifier: Apache-2.0
"""What the README shows runs, and what it links to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[1])
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/checkpoints.md",
        "docs/cpp.md",
        "docs/design.md",
        "docs/features.md",
        "docs/measured.md",
        "docs/models.md",
        "docs/training.md",
        "examples/cpp/README.md",
        "examples/python/README.md",
    ],
)
def test_links_lead_somewhere(document):
    folder = (ROOT / document).parent
    prose = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
        assert (folder / target).exists(), target


def test_the_two_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("demo", "test"))
