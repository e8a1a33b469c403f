# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.scan_table --save`: the scan against mamba_ssm's over many shapes, on a GPU.

Tokens of three modalities are interleaved at random. mamba_ssm's scan gets the same tokens in time order, channels
first, which is the layout it wants; packed documents it gets padded to the longest one. Before a time is taken, the
outputs and the gradients of u of both are compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import mixture_of_mamba as mom
from benchmarks.saving import save
from benchmarks.shapes import relative_error
from benchmarks.timing import measure

MODALITIES = 3
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Row:
    """A shape; ``lengths`` are those of packed documents."""

    batch: int
    length: int
    channels: int
    states: int = 16
    dtype: torch.dtype = torch.bfloat16
    lengths: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        packed = (
            f", {len(self.lengths)} documents of {min(self.lengths)} to {max(self.lengths)}" if self.lengths else ""
        )
        return f"{self.batch} x {self.length} x {self.channels}, {self.states} states, {dtype}{packed}"


def _documents(total: int, *lengths: int) -> tuple[int, ...]:
    """``lengths`` again and again, until there are ``total`` tokens."""
    chosen: list[int] = []
    while sum(chosen) < total:
        chosen.append(min(lengths[len(chosen) % len(lengths)], total - sum(chosen)))
    return tuple(chosen)


def _long_tail(total: int) -> tuple[int, ...]:
    """A document of half of the tokens, one of a quarter, and so on down to 16 tokens, and then 16 each."""
    chosen: list[int] = []
    while (left := total - sum(chosen)) > 0:
        chosen.append(min(left, max(left // 2, 16)))
    return tuple(chosen)


def _packed(total: int, channels: int, lengths: tuple[int, ...]) -> Row:
    return Row(1, total, channels, lengths=lengths)


ROWS = [
    *(Row(b, t, 4096) for b, t in ((4, 4096), (8, 2048), (1, 16384), (1, 4096), (2, 1024), (1, 1024), (1, 65536))),
    *(Row(b, t, 1536) for b, t in ((16, 4096), (4, 2048), (1, 2048), (1, 16384), (1, 256))),
    *(Row(b, t, c) for b, t, c in ((8, 4096, 2048), (32, 512, 768), (1, 512, 1024), (2, 4096, 5120), (4, 4096, 8192))),
    *(Row(b, t, 4096) for b, t in ((64, 127), (128, 100), (256, 64), (512, 32), (1024, 16), (256, 1), (1, 1))),
    *(Row(b, t, 1536) for b, t in ((128, 100), (1024, 24))),
    *(Row(b, t, c) for b, t, c in ((3, 1000, 1000), (2, 333, 4100), (5, 777, 129), (7, 127, 1537), (4, 4095, 4096))),
    *(Row(4, 2048, 2048, states) for states in (8, 32, 64, 128)),
    *(Row(1, 4096, 1536, states) for states in (8, 32, 64, 128)),
    *(Row(b, t, c, dtype=torch.float16) for b, t, c in ((4, 4096, 4096), (8, 2048, 1536), (64, 128, 4096))),
    *(
        Row(b, t, c, dtype=torch.float32)
        for b, t, c in ((4, 4096, 4096), (4, 1024, 1024), (1, 4096, 1536), (64, 128, 1024))
    ),
    *(_packed(16384, c, _documents(16384, 700, 90, 1500, 33)) for c in (4096, 1536)),
    *(_packed(16384, c, _long_tail(16384)) for c in (4096, 1536)),
    _packed(16384, 4096, _documents(16384, 50, 120, 7)),
    _packed(65536, 1536, _documents(65536, 3000, 100, 9000, 20)),
]


class Problem:
    """One row's inputs, for both libraries."""

    def __init__(self, row: Row) -> None:
        torch.manual_seed(0)
        self.row = row
        shape = (row.batch, row.length)

        def randn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, device="cuda").to(row.dtype)

        ids = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), row.batch * row.length, replacement=True).view(shape)
        self.routing = mom.Routing.from_ids(ids, MODALITIES, device="cuda")
        width = row.channels + row.channels % 2  # rows of z are not where words begin, otherwise
        xz = randn(*shape, width + row.channels)
        bc = randn(*shape, 2 * row.states)
        rates = torch.arange(1, row.states + 1, device="cuda").float()
        self.inputs = {
            "u": randn(*shape, row.channels),
            "dt": randn(*shape, row.channels) * 0.5,
            "A": -rates.expand(row.channels, -1).contiguous(),
            "B": bc[..., : row.states],
            "C": bc[..., row.states :],
            "D": torch.ones(row.channels, device="cuda"),
            "z": xz[..., width:],
            "dt_bias": (torch.rand(row.channels, device="cuda") * 2 - 5).expand(MODALITIES, -1).contiguous(),
        }
        self.leaves = {name: value.detach().requires_grad_() for name, value in self.inputs.items()}
        self.grad = randn(*shape, row.channels)
        self.order: dict[str, Any] = {"rows": self.routing.rows, "offsets": self.routing.offsets}
        if row.lengths:
            bounds = torch.tensor([0, *row.lengths]).cumsum(0, dtype=torch.int32)
            self.order["cu_seqlens"] = bounds.cuda()

    def padded(self, rows: Tensor) -> Tensor:
        """Sorted rows, in time order and channels first; a document a sequence where they are packed."""
        time = self.routing.unsort(rows)
        if self.row.lengths:
            time = torch.nn.utils.rnn.pad_sequence(list(time[0].split(list(self.row.lengths))), batch_first=True)
        return time.transpose(1, 2).contiguous()

    def unpadded(self, channels_first: Tensor) -> Tensor:
        time = channels_first.transpose(1, 2)
        if self.row.lengths:
            time = torch.cat([time[i, :n] for i, n in enumerate(self.row.lengths)]).unsqueeze(0)
        return self.routing.sort(time.contiguous())

    def ours(self) -> Tensor:
        return mom.selective_scan(**self.leaves, **self.order)[0]

    def ours_backward(self, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.ours(), wanted, self.grad)


class Peer:
    """mamba_ssm's scan on a problem."""

    def __init__(self, problem: Problem) -> None:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        self.function = selective_scan_fn
        inputs = problem.inputs
        u, dt, B, C, z = (problem.padded(inputs[name]).requires_grad_() for name in ("u", "dt", "B", "C", "z"))
        A, D, bias = (t.detach().clone().requires_grad_() for t in (inputs["A"], inputs["D"], inputs["dt_bias"][0]))
        self.leaves = [u, dt, A, B, C, D, z, bias]
        self.grad = problem.padded(problem.grad)

    def forward(self) -> Tensor:
        u, dt, A, B, C, D, z, bias = self.leaves
        return self.function(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    def backward(self, wanted: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), wanted, self.grad)


def compare(row: Row, rounds: int) -> dict[str, Any]:
    problem = Problem(row)
    peer = Peer(problem)
    grad_u = problem.ours_backward([problem.leaves["u"]])[0]
    peer_grad_u = problem.unpadded(peer.backward([peer.leaves[0]])[0])
    error = max(
        relative_error(problem.ours().detach(), problem.unpadded(peer.forward().detach())),
        relative_error(grad_u, peer_grad_u),
    )
    if not error <= TOLERANCE[row.dtype]:
        raise SystemExit(f"{row.name}: WRONG, relative error {error:.2e}; not timed")
    del grad_u, peer_grad_u
    leaves = list(problem.leaves.values())
    forward = measure(
        {"ours": torch.no_grad()(problem.ours), "mamba_ssm": torch.no_grad()(peer.forward)}, "cuda", rounds=rounds
    )
    both = measure(
        {"ours": lambda: problem.ours_backward(leaves), "mamba_ssm": lambda: peer.backward(peer.leaves)},
        "cuda",
        rounds=rounds,
    )
    work = row.batch * row.length * row.channels * row.states
    result: dict[str, Any] = {"row": row.name, "relative_error": error}
    for name, timings in (("forward", forward), ("forward + backward", both)):
        ours, theirs = timings["ours"], timings["mamba_ssm"]
        result[name] = {
            "ours": asdict(ours),
            "mamba_ssm": asdict(theirs),
            "ratio": theirs.median / ours.median,
            "picoseconds per token, channel and state": ours.median * 1e9 / work,
        }
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scan_table", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/scan-table.json")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    print("ms, forward then forward + backward: ours, mamba_ssm, ratio, ours in ps per token, channel and state")
    results = []
    for row in ROWS:
        result = compare(row, arguments.rounds)
        results.append(result)
        line = f"{row.name:<78}"
        for name in ("forward", "forward + backward"):
            timing = result[name]
            line += f" {timing['ours']['median']:8.3f} {timing['mamba_ssm']['median']:8.3f} {timing['ratio']:6.2f}x"
            line += f" {timing['picoseconds per token, channel and state']:7.2f}"
        print(line, flush=True)
        torch.cuda.empty_cache()
    slowest = min(min(r["forward"]["ratio"], r["forward + backward"]["ratio"]) for r in results)
    print(f"{len(results)} rows, the lowest ratio {slowest:.2f}x")
    if arguments.save:
        save("scan-table", "cuda", results=results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
