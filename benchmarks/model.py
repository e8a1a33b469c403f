# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.model --save`: a training step of four layers on a GPU, in every way that a script may run it.

Levels of memory (default, lean, selective and full activation checkpointing), torch.compile, and a CUDA graph; each
with its time, launches included, its peak of memory above the parameters, and whether its gradients are the default's.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mixture_of_mamba as mom
from benchmarks.saving import save
from benchmarks.shapes import placed, relative_error

LAYERS, MODALITIES = 4, 3

Step = Callable[[], list[Tensor]]


class Model(nn.Module):
    """Norm, mixer and residual, four times, in bfloat16; the loss is a mean of squares."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(LAYERS))
        self.mixers = nn.ModuleList(mom.MixtureOfMamba(width, MODALITIES) for _ in range(LAYERS))
        self.checkpointing: Callable[..., Tensor] | None = None

    def layer(self, index: int, x: Tensor, routing: mom.Routing) -> Tensor:
        return x + self.mixers[index](self.norms[index](x), routing, sorted=True)

    def forward(self, x: Tensor, routing: mom.Routing) -> Tensor:
        for index in range(LAYERS):
            x = (
                self.layer(index, x, routing)
                if self.checkpointing is None
                else self.checkpointing(self.layer, index, x, routing)
            )
        return x.float().square().mean()


def ways(model: Model, x: Tensor, ids: Tensor) -> dict[str, Step]:
    """Each a step that returns the gradients of all parameters."""
    parameters = list(model.parameters())
    routing = mom.Routing.from_ids(ids, MODALITIES, device=x.device)
    # Boundaries on the device alone: nothing that is captured depends on the mix.
    any_mix = mom.Routing.from_ids(ids.to(x.device), MODALITIES)

    def step(
        memory: str = "default",
        checkpointing: Callable[..., Tensor] | None = None,
        forward: Callable[..., Tensor] = model,
        routing: mom.Routing = routing,
    ) -> list[Tensor]:
        for mixer in model.mixers:
            mixer.memory = memory
        model.checkpointing = checkpointing
        return list(torch.autograd.grad(forward(x, routing), parameters))

    full = functools.partial(checkpoint, use_reentrant=False)
    kept = functools.partial(create_selective_checkpoint_contexts, mom.sac_save_list())
    selective = functools.partial(full, context_fn=kept)
    compiled = torch.compile(model, fullgraph=True)
    compiled_to_graphs = torch.compile(model, fullgraph=True, mode="reduce-overhead")

    def step_in_graphs() -> list[Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return step(forward=compiled_to_graphs, routing=any_mix)

    return {
        "default": step,
        "lean": functools.partial(step, "lean"),
        "selective checkpointing": functools.partial(step, "default", selective),
        "full checkpointing": functools.partial(step, "default", full),
        "torch.compile": functools.partial(step, forward=compiled),
        "torch.compile to graphs": step_in_graphs,
        "CUDA graph": graphed(step),
        "CUDA graph, any mix": graphed(functools.partial(step, routing=any_mix)),
    }


def graphed(step: Step) -> Step:
    """Replays of the step. Of boundaries on the host the mix is the captured one."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()

    def replay() -> list[Tensor]:
        graph.replay()
        return captured

    return replay


def milliseconds(step: Step, repeats: int) -> float:
    """Of a step among many in a row, launches included: the median of five rows."""
    rows = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        rows.append((time.perf_counter() - begin) * 1e3 / repeats)
    return sorted(rows)[2]


def peak(step: Step) -> float:
    """MiB above what was there before the step."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure_shape(batch: int, length: int, width: int) -> dict[str, object]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model(width).to("cuda", torch.bfloat16)
    for mixer in model.mixers:
        placed(mixer, "cuda", torch.bfloat16)
    x = torch.randn(batch, length, width, device="cuda", dtype=torch.bfloat16)
    ids = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), batch * length, replacement=True).view(batch, length)
    print(f"\n{LAYERS} layers, {batch} x {length} tokens, d_model {width}, {MODALITIES} modalities, bfloat16")
    results: dict[str, object] = {}
    expected: list[Tensor] = []
    for name, step in ways(model, x, ids).items():
        for _ in range(3):
            gradients = step()
        expected = expected or [g.clone() for g in gradients]
        equal = all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
        error = max(relative_error(a, b) for a, b in zip(gradients, expected, strict=True))
        if error > 5e-2:
            raise SystemExit(f"{name}: WRONG, relative error {error:.1e}; not timed")
        repeats = max(3, min(20, 200000 // (batch * length)))
        result = {"ms": milliseconds(step, repeats), "peak MiB": peak(step), "bitwise": equal, "error": error}
        results[name] = result
        same = "bitwise the default's gradients" if equal else f"gradients within {error:.1e}"
        print(f"  {name:<24} {result['ms']:8.3f} ms {result['peak MiB']:9.0f} MiB  {same}", flush=True)
    return {"batch": batch, "length": length, "d_model": width, "results": results}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/<device>/model.json")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("needs a GPU, and torch sees none", file=sys.stderr)
        return 2
    shapes = [measure_shape(*shape) for shape in ((4, 4096, 2048), (1, 4096, 2048), (1, 1024, 1024))]
    if arguments.save:
        save("model", "cuda", layers=LAYERS, shapes=shapes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
