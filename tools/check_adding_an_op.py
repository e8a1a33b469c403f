#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Carries out docs/adding_an_op.md in a copy of the working tree: writes its files, applies its patches, builds,
compiles its CUDA kernel where nvcc is found, and runs the new operator's tests.

    python tools/check_adding_an_op.py /tmp/fifth_op [cpu|cuda]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "docs" / "adding_an_op.md"
# A path alone on its line, then its listing; or a patch, which names its files itself.
LISTING = re.compile(r"^`([\w./]+)`\n\n```(?:cpp|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATCH = re.compile(r"^```diff\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def copy_working_tree(target: Path) -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def follow(guide: str, target: Path) -> list[str]:
    written = []
    for name, text in LISTING.findall(guide):
        path = target / name
        if path.exists():
            raise SystemExit(f"the guide creates {name}, but the repository has it already")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        written.append(name)
    for patch in PATCH.findall(guide):
        subprocess.run(
            ["patch", "--strip=1", "--forward", "--no-backup-if-mismatch"],
            cwd=target,
            input=patch,
            text=True,
            check=True,
        )
    return written


def main() -> None:
    if len(sys.argv) not in (2, 3):
        raise SystemExit(__doc__)
    backend = sys.argv[2] if len(sys.argv) == 3 else "cpu"
    target = Path(sys.argv[1]).resolve()
    if target.exists() and any(target.iterdir()):
        raise SystemExit(f"{target} must be a new or empty folder")
    copy_working_tree(target)
    written = follow(GUIDE.read_text(), target)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(target)}
    subprocess.run([str(target / "tools" / "build_dev.sh"), backend], cwd=target, env=environment, check=True)
    if backend == "cpu" and shutil.which("nvcc"):
        nvcc = ["nvcc", "-std=c++20", "-arch=sm_90", "--expt-relaxed-constexpr", "-Icsrc", "-c", "-o", os.devnull]
        for name in written:
            if name.endswith(".cu"):
                subprocess.run([*nvcc, name], cwd=target, check=True)
    tests = [name for name in written if Path(name).name.startswith("test_")]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=target, env=environment, check=True)


if __name__ == "__main__":
    main()
