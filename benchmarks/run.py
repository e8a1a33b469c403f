# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.run block --device cuda`: a correctness gate, then interleaved times, then JSON."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import peers
from benchmarks.cases import CASES
from benchmarks.saving import device_name, save
from benchmarks.shapes import Case, Shape
from benchmarks.timing import Timing, measure

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_SHAPES = {
    "cpu": Shape(batch=1, length=512, d_model=512, dtype=torch.float32, device="cpu"),
    "cuda": Shape(batch=4, length=4096, d_model=2048, dtype=torch.bfloat16, device="cuda"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("case", choices=[*CASES, "all"])
    parser.add_argument("--device", choices=list(DEFAULT_SHAPES), default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32 on the CPU, bfloat16 on a GPU")
    for name in ("batch", "length", "d_model", "d_state", "d_conv", "modalities"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the size quoted in the README")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds after three of warm-up")
    parser.add_argument("--peers", action="store_true", help="also run neighbours that are importable")
    parser.add_argument("--published", type=Path, help="path of the published MixtureOfMamba.py")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/<case>.json")
    return parser.parse_args(argv)


def shape_of(arguments: argparse.Namespace) -> Shape:
    shape = DEFAULT_SHAPES[arguments.device]
    names = ("batch", "length", "d_model", "d_state", "d_conv", "modalities")
    sizes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.dtype is not None:
        sizes["dtype"] = DTYPES[arguments.dtype]
    return replace(shape, **sizes)


def report(title: str, case: Case, timings: dict[str, Timing]) -> None:
    ours = next(iter(timings.values())).median
    print(f"\n{title}")
    for name, timing in timings.items():
        line = f"  {name:<28} {timing.median:9.3f} ms  [{timing.low:.3f} .. {timing.high:.3f}]"
        line += f"  {timing.median / ours:7.2f}x"
        if timing.wall is not None:
            line += f"  wall {timing.wall:.3f} ms"
        if moved := case.bytes_of.get(name, case.bytes_moved):
            line += f"  {moved / timing.median / 1e6:8.0f} GB/s"
        if case.flops:
            line += f"  {case.flops / timing.median / 1e9:8.2f} TFLOP/s"
        print(line)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    peers.published_layer_file = arguments.published
    shape = shape_of(arguments)
    print(f"{shape} on {device_name(shape.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in CASES if arguments.case == "all" else [arguments.case]:
        torch.manual_seed(0)
        results: dict[str, dict[str, object]] = {}
        for title, case in CASES[name](shape, arguments.peers).items():
            error = case.gate()
            if not error <= case.tolerance:
                print(f"{title}: WRONG, relative error {error:.2e} > {case.tolerance:.0e}; not timed", file=sys.stderr)
                return 1
            timings = measure(case.contenders, shape.device, rounds=arguments.rounds)
            report(f"{title} (relative error {error:.1e})", case, timings)
            results[title] = {"relative_error": error, **{n: asdict(t) for n, t in timings.items()}}
        if arguments.save:
            sizes = {**asdict(shape), "dtype": str(shape.dtype)}
            title = f"{name}-{shape.batch}x{shape.length}x{shape.d_model}"
            print(f"saved {save(title, shape.device, shape=sizes, results=results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
