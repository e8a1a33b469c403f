# SPDX-License-Identifier: Apache-2.0
"""What docs/training.md shows runs; what it needs beyond torch is looked for first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs/training.md"
PARTS = dict(part.split("\n", 1) for part in GUIDE.read_text().split("\n## ")[1:])
SNIPPETS = {title: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for title, part in PARTS.items()}
# The snippets of a section are one program.
SECTIONS = {title: "\n".join(snippets) for title, snippets in SNIPPETS.items() if snippets}
ON_TWO_RANKS = [title for title, code in SECTIONS.items() if "init_process_group" in code]


def test_every_snippet_is_found():
    assert sum(map(len, SNIPPETS.values())) == GUIDE.read_text().count("```python") == 12
    assert ON_TWO_RANKS == ["DDP", "FSDP2 in bfloat16"]


@pytest.mark.parametrize("section", [title for title in SECTIONS if title not in ON_TWO_RANKS])
@pytest.mark.filterwarnings("ignore")
def test_snippets_run(section):
    for needed in re.findall(r"^(?:import|from) (accelerate|peft)", SECTIONS[section], re.MULTILINE):
        pytest.importorskip(needed)
    exec(compile(SECTIONS[section], GUIDE.name, "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("section", ON_TWO_RANKS)
def test_snippets_run_under_torchrun(section, tmp_path):
    """With two lines more: every parameter has a gradient, on both ranks; and an exit as in two_ranks.py."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    script = tmp_path / "train.py"
    lines = ("assert all(p.grad is not None for p in model.parameters())", "__import__('os')._exit(0)")
    script.write_text("\n".join((SECTIONS[section], *lines)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
