# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the operators.

``torch.library.register_autograd`` in few words: it takes the arguments of every call apart as a tree and puts them
together again, which for an operator with lists is half a millisecond on the host, more than all of its launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mixture_of_mamba.ops._registration import NAMESPACE, keep_alive

__all__ = ["forbid_double_backward", "register_autograd"]


def register_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[[Any, tuple[Any, ...], Any], None]
) -> None:
    """As ``torch.library.register_autograd``, for operators without keyword-only arguments.

    Args:
        name: of the operator, in this library's namespace.
        backward: ``(ctx, *grad_outputs)`` -> one gradient per argument, for a list a list. ``ctx.needs_input_grad``
            is nested alike.
        setup_context: ``(ctx, arguments, outputs)``, before the outputs are returned.
    """
    overload = getattr(torch.ops.mixture_of_mamba, name).default
    schema = overload._schema
    lists = tuple(i for i, argument in enumerate(schema.arguments) if _is_list(argument))
    list_returns = tuple(i for i, returned in enumerate(schema.returns) if _is_list(returned))
    defaults = tuple(argument.default_value for argument in schema.arguments)

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: _Call, *_: Any) -> Any:
            outputs = below(call.keyset, call.arguments)
            setup_context(ctx, call.arguments, outputs)
            ctx.sizes = [len(call.arguments[i]) for i in lists]
            call.return_sizes = [len(outputs[i]) for i in list_returns]
            return _flatten(outputs, list_returns) if list_returns else outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            flat_needs = ctx.needs_input_grad
            ctx.needs_input_grad = _nest(flat_needs[1:], lists, ctx.sizes)
            try:
                results = backward(ctx, *gradients)
            finally:
                ctx.needs_input_grad = flat_needs
            return None, *_flatten(results if isinstance(results, tuple) else (results,), lists)

    Node.__name__ = Node.__qualname__ = f"{name}_node"

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)):
            return below(keyset, arguments)
        call = _Call(keyset, arguments + defaults[len(arguments) :])  # the dispatcher drops trailing defaults
        outputs = Node.apply(call, *_flatten(call.arguments, lists))
        return _nest(outputs, list_returns, call.return_sizes) if list_returns else outputs

    library = keep_alive(torch.library.Library(NAMESPACE, "IMPL"))
    library.impl(name, kernel, "Autograd", with_keyset=True)


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
