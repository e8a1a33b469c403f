# SPDX-License-Identifier: Apache-2.0
"""What a call of a layer costs beside its arithmetic, in Python and in C++: one sequence of 8 tokens of width 16.

    cmake --build build/tests --target overhead                    # after make test-cpp has configured it
    python benchmarks/cpp/overhead.py

Both run on one core, in turns, so that other work on the machine hits both alike. Of every turn the median of its calls
counts; printed are the median, the lowest and the highest of the turns, in microseconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import mixture_of_mamba as mom

PROGRAM = Path(__file__).resolve().parents[2] / "build/tests/benchmarks/cpp/overhead"


def microseconds(calls: int, call: Callable[[], object]) -> float:
    for _ in range(calls // 4):
        call()
    times = []
    for _ in range(calls):
        begin = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - begin) / 1e3)
    return statistics.median(times)


def in_python(calls: int) -> dict[str, float]:
    layer = mom.MixtureOfMamba(16, 2)
    ids = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1]])
    routing = mom.Routing.from_ids(ids, 2)
    x, one = torch.randn(1, 8, 16), torch.randn(1, 1, 16)

    def training() -> None:
        layer(x, routing).sum().backward()
        layer.zero_grad()

    times = {"training": microseconds(calls, training)}
    with torch.no_grad():
        times["routing"] = microseconds(calls, lambda: mom.Routing.from_ids(ids, 2))
        times["forward"] = microseconds(calls, lambda: layer(x, routing))
        state = layer.allocate_state(1)
        times["step"] = microseconds(calls, lambda: layer.step(one, state, 1))
    return times


def in_cpp(program: Path, calls: int) -> dict[str, float]:
    output = subprocess.run([program, str(calls)], check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in map(str.split, output.splitlines())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", type=Path, default=PROGRAM, help="the compiled half")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--calls", type=int, default=1000, help="in a turn")
    args = parser.parse_args()
    if not args.program.is_file():
        raise SystemExit(f"{args.program} is not built: cmake --build build/tests --target overhead")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the program's too
    turns = [(in_python(args.calls), in_cpp(args.program, args.calls)) for _ in range(args.turns)]
    print(f"{'':10}{'Python':>22}{'C++':>22}")
    for name in turns[0][0]:
        columns = [[turn[language][name] for turn in turns] for language in (0, 1)]
        cells = [f"{statistics.median(c):8.1f} ({min(c):.1f} .. {max(c):.1f})" for c in columns]
        print(f"{name:10}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main()
