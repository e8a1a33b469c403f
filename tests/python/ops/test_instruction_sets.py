# SPDX-License-Identifier: Apache-2.0
"""The narrower instruction sets of the CPU kernels, which this machine would not choose by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = ("test_selective_scan.py", "test_causal_conv1d.py", "test_steps.py", "test_determinism.py")


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_definitions_hold(instruction_set):
    """MOM_CPU_ISA is read once per process, so another process runs the operators' own tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not gradcheck and not cuda"]
    result = subprocess.run(
        [*command, *(str(HERE / name) for name in FILES)],
        env={**os.environ, "MOM_CPU_ISA": instruction_set},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
