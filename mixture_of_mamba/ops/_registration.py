# SPDX-License-Identifier: Apache-2.0
"""What the operators' registrations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "NAMESPACE",
    "accumulation_dtype",
    "cast_floating",
    "forbid_gradients",
    "given",
    "keep_alive",
    "lower_precision_autocast",
    "num_sequences",
    "vmap_by_loop",
]

NAMESPACE = "mixture_of_mamba"

_libraries: list[torch.library.Library] = []


def keep_alive(library: torch.library.Library) -> torch.library.Library:
    """Registrations last as long as the object that made them: here, the life of the process."""
    _libraries.append(library)
    return library


def num_sequences(activation: Tensor, cu_seqlens: Tensor | None) -> int:
    """Sequences of a ``[batch, length, channels]`` activation, packed or not."""
    return activation.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def accumulation_dtype(*activations: Tensor | None) -> torch.dtype:
    """Of parameters, states and sums beside these activations."""
    wide = any(x is not None and x.dtype == torch.float64 for x in activations)
    return torch.float64 if wide else torch.float32


def given(gradient: Tensor, value: Tensor | None) -> Tensor | None:
    """The gradient of an input that was given; operators return an empty tensor for one that was not."""
    return None if value is None else gradient


def forbid_gradients(name: str, *inputs: Tensor | None) -> None:
    """Steps update their state in place and are for inference."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        raise RuntimeError(
            f"{name} is for inference: it updates its state in place and records no gradient; call it under "
            f"torch.no_grad(), or use {name.removesuffix('_step')} with initial_state for a differentiable step"
        )


def lower_precision_autocast(name: str, cast: Callable[[torch.dtype, tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Run the operator in the autocast dtype. ``cast`` maps the dtype and the arguments to cast arguments."""
    library = keep_alive(torch.library.Library(NAMESPACE, "IMPL"))
    overload = getattr(torch.ops.mixture_of_mamba, name).default

    def register(device_type: str, key: torch._C.DispatchKey) -> None:
        def autocast(*arguments: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return overload(*cast(torch.get_autocast_dtype(device_type), arguments))

        library.impl(name, autocast, f"Autocast{device_type.upper()}")

    register("cpu", torch._C.DispatchKey.AutocastCPU)
    register("cuda", torch._C.DispatchKey.AutocastCUDA)


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Cast what autocast casts: floating tensors other than float64."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def vmap_by_loop(name: str) -> None:
    """vmap as a loop over the mapped dimension: right for every argument, and no slower than separate calls."""
    overload = getattr(torch.ops.mixture_of_mamba, name).default

    def loop(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def at(index: int, dim: Any, argument: Any) -> Any:
            if isinstance(argument, (list, tuple)):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
                return [at(index, d, a) for d, a in zip(dims, argument, strict=True)]
            return argument if dim is None else argument.select(dim, index)

        results = [
            overload(*(at(i, dim, argument) for dim, argument in zip(in_dims, arguments, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(stacked(column) for column in zip(*results, strict=True)), (0,) * len(results[0])

    def stacked(outputs: tuple[Any, ...]) -> Any:
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs)
        return [torch.stack(column) for column in zip(*outputs, strict=True)]

    torch.library.register_vmap(f"{NAMESPACE}::{name}", loop)
