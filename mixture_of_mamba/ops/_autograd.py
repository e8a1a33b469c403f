# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the operators.

``torch.library.register_autograd`` in few words: it takes the arguments of every call apart as a tree and puts them
together again, which for an operator with lists is half a millisecond on the host, more than all of its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active as in_transform
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from mixture_of_mamba.ops._registration import NAMESPACE, has_tangent, keep_alive

__all__ = ["forbid_double_backward", "past_autograd", "register_autograd"]


def register_autograd(
    name: str,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    for_derivative: Callable[[tuple[Any, ...]], tuple[Any, ...]] = lambda arguments: arguments,
) -> None:
    """As ``torch.library.register_autograd``, for operators without keyword-only arguments.

    Args:
        name: of the operator, in this library's namespace.
        backward: ``(ctx, *grad_outputs)`` -> one gradient per argument, for a list a list. ``ctx.needs_input_grad``
            is nested alike.
        setup_context: ``(ctx, arguments, outputs)``, before the outputs are returned.
        for_derivative: the arguments of a call whose derivative is wanted, from those that came.
    """
    overload = getattr(torch.ops.mixture_of_mamba, name).default
    schema = overload._schema
    lists = tuple(i for i, argument in enumerate(schema.arguments) if _is_list(argument))
    list_returns = tuple(i for i, returned in enumerate(schema.returns) if _is_list(returned))
    defaults = tuple(argument.default_value for argument in schema.arguments)

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def node_forward(ctx: Any, call: _Call, *_: Any) -> Any:
        with _for_outer_transforms() if in_transform() else nullcontext():
            outputs = below(call.keyset, call.arguments)
        setup_context(ctx, call.arguments, outputs)
        ctx.sizes = [len(call.arguments[i]) for i in lists]
        call.return_sizes = [len(outputs[i]) for i in list_returns]
        return _flatten(outputs, list_returns) if list_returns else outputs

    def node_backward(ctx: Any, *gradients: Any) -> Any:
        flat_needs = ctx.needs_input_grad
        ctx.needs_input_grad = _nest(flat_needs[1:], lists, ctx.sizes)
        try:
            results = backward(ctx, *gradients)
        finally:
            ctx.needs_input_grad = flat_needs
        return None, *_flatten(results if isinstance(results, tuple) else (results,), lists)

    # Its name is that of the node in graphs and messages, and torch reads it when the class is made.
    # Its base is that of torch.autograd.Function: a kernel is asked by torch.func's transforms for one level at a time.
    methods: dict[str, Any] = {"forward": node_forward, "backward": node_backward}
    methods["_compiled_autograd_key"] = torch.autograd.Function._compiled_autograd_key
    node: Any = type(name, (_SingleLevelFunction,), {key: staticmethod(method) for key, method in methods.items()})

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _forbid_tangents(name, _flatten(arguments, lists))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keyset, arguments)
        arguments += defaults[len(arguments) :]  # the dispatcher drops trailing defaults
        call = _Call(keyset, for_derivative(arguments))
        with enable_single_level_autograd_function() if in_transform() else nullcontext():
            outputs = node.apply(call, *_flatten(call.arguments, lists))
        return _nest(outputs, list_returns, call.return_sizes) if list_returns else outputs

    library = keep_alive(torch.library.Library(NAMESPACE, "IMPL"))
    library.impl(name, kernel, "Autograd", with_keyset=True)


def past_autograd() -> AbstractContextManager[Any]:
    """Around a backward's operator alone: where nobody asks for a second derivative, it need not come by its kernel.

    For one with tens of arguments, which would be converted twice. Saved tensors must have been unpacked before:
    checkpointing makes them again at that moment, with autograd.
    """
    if torch.is_grad_enabled() or in_transform() or forward_ad._current_level >= 0 or torch.compiler.is_compiling():
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


def forbid_double_backward(name: str) -> None:
    """Make the second derivative an error. Without a registration it would silently be zero."""

    def setup_context(ctx: Any, arguments: tuple[Any, ...], outputs: Any) -> None:
        pass

    def backward(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no derivative: double backward is not supported; "
            "mixture_of_mamba.reference has differentiable versions in plain torch"
        )

    register_autograd(name, backward, setup_context)


@contextmanager
def _for_outer_transforms() -> Iterator[None]:
    """In a node's forward, where derivatives are off: another transform around this one may want one as well."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _forbid_tangents(name: str, values: Sequence[Any]) -> None:
    """Without this, forward-mode derivatives would silently be zero."""
    if any(has_tangent(value) for value in values):
        raise RuntimeError(
            f"{NAMESPACE}::{name} has no forward-mode derivative (jvp, jacfwd, dual tensors); reverse mode has one, "
            "and mixture_of_mamba.reference has differentiable versions in plain torch"
        )


class _Call:
    """Arguments on their way past autograd, which looks into no list."""

    def __init__(self, keyset: Any, arguments: tuple[Any, ...]) -> None:
        self.keyset, self.arguments = keyset, arguments
        self.return_sizes: list[int] = []


def _is_list(value: Any) -> bool:
    return isinstance(value.type, torch.ListType)


def _flatten(values: Sequence[Any], lists: tuple[int, ...]) -> tuple[Any, ...]:
    if not lists:
        return tuple(values)
    flat: list[Any] = []
    for i, value in enumerate(values):
        if i in lists:
            flat.extend(value)
        else:
            flat.append(value)
    return tuple(flat)


def _nest(flat: Sequence[Any], lists: tuple[int, ...], sizes: list[int]) -> tuple[Any, ...]:
    values = list(flat)
    for i, size in zip(lists, sizes, strict=True):  # in order: what is before i is as it will be
        values[i : i + size] = [values[i : i + size]]
    return tuple(values)
