# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.sweep --save`: time and memory of a block against length, batch, modalities and their shares.

`python -m benchmarks.sweep --plot FILE` draws what was saved (needs matplotlib, no GPU).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mixture_of_mamba as mom
from benchmarks.saving import save
from benchmarks.shapes import placed

Point = dict[str, Any]


def point(batch: int, length: int, width: int, shares: list[float]) -> Point:
    """Forward and backward of a block in bfloat16: median ms of the device, and the peak above its parameters."""
    torch.manual_seed(0)
    modalities = len(shares)
    layer = placed(mom.MixtureOfMamba(width, modalities), "cuda", torch.bfloat16)
    parts = torch.tensor(shares)
    ids = torch.multinomial(parts, batch * length, replacement=True).view(batch, length)
    routing = mom.Routing.from_ids(ids, modalities, device="cuda")
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    leaves = [x, *layer.parameters()]

    def step() -> None:
        torch.autograd.grad(layer(x, routing, sorted=True), leaves, grad)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # so that the launches are queued before the first begins
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    tokens = batch * length
    return {"ms": sorted(times)[2], "peak MiB": peak, "tokens": tokens, "ns per token": sorted(times)[2] * 1e6 / tokens}


def equal(count: int) -> list[float]:
    return [1.0 / count] * count


SWEEPS: dict[str, tuple[list[float], Callable[[float], Point]]] = {
    "length": ([2**k for k in range(10, 21)], lambda n: point(1, int(n), 1024, equal(3))),
    "batch": ([1, 2, 4, 8, 16, 32], lambda n: point(int(n), 2048, 2048, equal(3))),
    "modalities": ([1, 2, 3, 4, 6, 8], lambda n: point(4, 4096, 2048, equal(int(n)))),
    "share of the first of two modalities": (
        [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0],
        lambda share: point(4, 4096, 2048, [share, 1 - share]),
    ),
}


def plot(document: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(SWEEPS), figsize=(4 * len(SWEEPS), 6), layout="constrained")
    for column, (name, points) in enumerate(document["sweeps"].items()):
        xs = [p["at"] for p in points]
        for row, quantity in enumerate(("ms", "peak MiB")):
            axis = axes[row][column]
            axis.plot(xs, [p[quantity] for p in points], marker="o", markersize=3)
            axis.set(xlabel=name, ylabel={"ms": "ms, forward + backward"}.get(quantity, quantity))
            if name in ("length", "batch"):
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 1.2 * max(p[quantity] for p in points))
            axis.grid(alpha=0.3)
    figure.suptitle(f"A Mixture-of-Mamba block on {document['device']}, bfloat16")
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/sweep.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a saved sweep into <FILE>'s folder as .png")
    arguments = parser.parse_args(argv)
    if arguments.plot:
        plot(json.loads(arguments.plot.read_text()), arguments.plot.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        print("needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    sweeps: dict[str, list[Point]] = {}
    for name, (values, measure) in SWEEPS.items():
        print(f"\n{name}")
        sweeps[name] = []
        for value in values:
            result = {"at": value, **measure(value)}
            sweeps[name].append(result)
            line = f"{result['ms']:9.3f} ms {result['ns per token']:9.1f} ns a token {result['peak MiB']:9.0f} MiB"
            print(f"  {value:<8} {line}", flush=True)
            torch.cuda.empty_cache()
    if arguments.save:
        save("sweep", "cuda", sweeps=sweeps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
