# SPDX-License-Identifier: Apache-2.0
"""Other libraries, measured in the same run where they are importable."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import mixture_of_mamba as mom
    from benchmarks.shapes import Shape

__all__ = ["add_block", "add_conv", "add_scan", "add_step", "published_layer_file"]

Contenders = dict[str, Callable[[], object]]

# The published Mixture-of-Mamba is a file, not a package: --published gives its path.
published_layer_file: Path | None = None


def _module(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a neighbour that fails to import must not stop the benchmark
        print(f"peer {name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def _channels_first(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(1, 2).contiguous().requires_grad_()


def add_scan(forward: Contenders, both: Contenders, inputs: dict[str, Tensor], grad: Tensor) -> None:
    module = _module("mamba_ssm.ops.selective_scan_interface")
    if module is None:
        return
    u, dt, B, C, z = (_channels_first(inputs[name]) for name in ("u", "dt", "B", "C", "z"))
    A, D, bias = (t.detach().requires_grad_() for t in (inputs["A"], inputs["D"], inputs["dt_bias"][0]))
    leaves = [u, dt, A, B, C, D, z, bias]
    grad = grad.transpose(1, 2).contiguous()

    def run() -> Tensor:
        return module.selective_scan_fn(u, dt, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)

    forward["mamba_ssm"] = run
    both["mamba_ssm"] = lambda: torch.autograd.grad(run(), leaves, grad)


def add_conv(forward: Contenders, both: Contenders, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> None:
    module = _module("causal_conv1d")
    if module is None:
        return
    first, grad_first = _channels_first(x), grad.transpose(1, 2).contiguous()

    def run() -> Tensor:
        return module.causal_conv1d_fn(first, weight, bias, activation="silu")

    forward["causal-conv1d"] = run
    both["causal-conv1d"] = lambda: torch.autograd.grad(run(), (first, weight, bias), grad_first)


def add_block(
    forward: Contenders, both: Contenders, shape: Shape, x: Tensor, grad: Tensor, routing: mom.Routing
) -> None:
    module = _module("mamba_ssm.modules.mamba_simple")
    if module is not None:
        dense = module.Mamba(shape.d_model, device=shape.device, dtype=shape.dtype)
        forward["mamba_ssm dense"] = torch.no_grad()(lambda: dense(x))
        both["mamba_ssm dense"] = lambda: torch.autograd.grad(dense(x), [x, *dense.parameters()], grad)
    if published_layer_file is None:
        return
    layer = _published_layer(published_layer_file, shape)
    rows = routing.rows.long()
    ids = torch.bucketize(rows, routing.offsets[1:].long(), right=True)
    masks = torch.stack([ids == m for m in range(shape.modalities)])
    forward["published MoM"] = torch.no_grad()(lambda: layer(x, masks))
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    both["published MoM"] = lambda: torch.autograd.grad(layer(x, masks), leaves, grad, allow_unused=True)


def add_step(contenders: Contenders, shape: Shape, x: Tensor) -> None:
    module = _module("mamba_ssm.modules.mamba_simple")
    if module is None:
        return
    dense = module.Mamba(shape.d_model, d_state=shape.d_state, d_conv=shape.d_conv)
    dense = dense.to(shape.device, shape.dtype)
    states = dense.allocate_inference_cache(shape.batch, 1)
    contenders["mamba_ssm dense"] = torch.no_grad()(lambda: dense.step(x, *states))


def _published_layer(path: Path, shape: Shape) -> torch.nn.Module:
    # The file imports a class that was not published with it; it is used for annotations only.
    for name in ("src", "src.args"):
        sys.modules.setdefault(name, ModuleType(name))
    sys.modules["src.args"].ModelArgs = SimpleNamespace  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("published_mixture_of_mamba", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layer: torch.nn.Module = module.MixtureOfMamba(
        SimpleNamespace(n_modalities=shape.modalities), shape.d_model, device=shape.device, dtype=shape.dtype
    )
    return layer
