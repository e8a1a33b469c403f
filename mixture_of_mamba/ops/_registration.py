# SPDX-License-Identifier: Apache-2.0
"""What the operators' registrations share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "NAMESPACE",
    "accumulation_dtype",
    "cast_floating",
    "forbid_gradients",
    "given",
    "has_tangent",
    "keep_alive",
    "lower_precision_autocast",
    "mark_written",
    "num_sequences",
    "register_fake",
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


def has_tangent(value: Any) -> bool:
    """Of a forward-mode derivative."""
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def forbid_gradients(name: str, *inputs: Tensor | None) -> None:
    """Steps update their state in place and are for inference."""
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if not wanted and forward_ad._current_level >= 0:
        wanted = any(has_tangent(x) for x in inputs)
    if wanted:
        raise RuntimeError(
            f"{name} is for inference: it updates its state in place and records no gradient; call it under "
            f"torch.no_grad(), or use {name.removesuffix('_step')} with initial_state for a differentiable step"
        )


def mark_written(*states: Tensor) -> None:
    """What a step wrote in place, so that autograd sees it where a graph keeps the old values."""
    if torch.compiler.is_compiling():  # there writing is a copy_ at the end, which marks it
        return
    for state in states:
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As ``torch.library.register_fake``, refusing tensors of several devices as the kernels do.

    Otherwise one parameter on the meta device would make a call on a CPU return memory that nobody wrote.
    """
    names = [a.name for a in getattr(torch.ops.mixture_of_mamba, name).default._schema.arguments]

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*arguments: Any) -> Any:
            first: tuple[str, torch.device] | None = None
            for argument, value in zip(names, arguments, strict=False):  # without trailing defaults
                if argument == "host_offsets":
                    continue
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    if not isinstance(tensor, Tensor):
                        continue
                    first = first or (argument, tensor.device)
                    if tensor.device.type != first[1].type:
                        raise RuntimeError(
                            f"{NAMESPACE}::{name}: {argument} must be on the device of {first[0]} ({first[1]}), "
                            f"got {tensor.device}"
                        )
            return fake(*arguments)

        torch.library.register_fake(f"{NAMESPACE}::{name}")(checked)
        return fake

    return register


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

        if info.batch_size == 0:
            raise RuntimeError(f"vmap over {NAMESPACE}::{name} must have a mapped dimension of at least 1, got 0")
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
