# SPDX-License-Identifier: Apache-2.0
"""Names that the tests of the example scripts share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "python"
CONCEPTS = 32  # in the data pack of the tests

RunScript = Callable[[str, list[str]], int]
