# SPDX-License-Identifier: Apache-2.0
"""``python -m mixture_of_mamba --cmake-prefix``: where CMake's ``find_package(MixtureOfMamba)`` shall look."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mixture_of_mamba.version import __version__

PACKAGE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mixture_of_mamba", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--cmake-prefix", action="store_true", help="print what belongs into CMAKE_PREFIX_PATH")
    if not parser.parse_args().cmake_prefix:
        parser.print_help()
        return
    if not (PACKAGE / "lib/cmake").is_dir():
        sys.exit(f"{PACKAGE} holds no files for C++ programs: run `pip install .` in the source folder")
    print(PACKAGE)


if __name__ == "__main__":
    main()
