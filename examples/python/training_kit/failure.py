# SPDX-License-Identifier: Apache-2.0
"""How an example ends when something outside it is wrong: one line on stderr, exit status 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

__all__ = ["fail"]


def fail(message: str) -> NoReturn:
    line = " ".join(message.split())
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
    raise SystemExit(2)
