# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers' Mamba-1 models (Mamba, FalconMamba, Jamba, Zamba) on this library's operators.

The mixers of transformers call convolution, scan and their decode steps through names of the modelling module. Without
mamba_ssm and causal-conv1d these lead to loops in Python. :func:`enable` binds the names to this library, for models
that exist and for those to come, and :func:`disable` binds them to what they were. transformers is imported by
:func:`enable` only.

The one-call path for training, ``mamba_inner_fn``, is declined on purpose: it is not given the padding mask, and it
reads the weights of x_proj and out_proj past adapters and hooks. Declined, a mixer trains on convolution and scan with
its own masks and modules in between, as transformers does without kernels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mixture_of_mamba.integrations import causal_conv1d, mamba_ssm

__all__ = ["disable", "enable", "enabled"]

Function = Callable[..., Any]

_MODELS = ("mamba", "falcon_mamba", "jamba", "zamba")
_replaced: list[tuple[ModuleType, str, Function]] = []  # what disable() puts back


def _gradient_needed(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _convolution(original: Function) -> Function:
    def causal_conv1d_fn(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Any = None,
        **kwargs: Any,
    ) -> Any:
        for name in ("seq_idx", "cu_seqlens"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} must be None: transformers' Mamba-1 mixers do not hand it to their scan, so packed "
                    f"sequences would see each other, got a {type(kwargs[name]).__name__}"
                )
        if activation not in (None, "silu", "swish"):
            return original(hidden_states, weight, bias, activation=activation, **kwargs)
        return causal_conv1d.causal_conv1d_fn(hidden_states, weight, bias, activation=activation)

    return causal_conv1d_fn


def _convolution_step(original: Function) -> Function:
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: Any = None,
    ) -> Any:
        if activation not in (None, "silu", "swish") or _gradient_needed(hidden_states, conv_state, weight, bias):
            return original(hidden_states, conv_state, weight, bias, activation=activation)
        return causal_conv1d.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)

    return causal_conv1d_update


def _scan(original: Function) -> Function:
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,  # which of transformers' own scans to take
    ) -> Any:
        return mamba_ssm.selective_scan_fn(
            hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )

    return mamba_selective_scan


def _scan_step(original: Function) -> Function:
    def mamba_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if _gradient_needed(state, hidden_states, dt, A, B, C, D, dt_bias, z):
            return original(
                state, hidden_states, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, z=z, **kwargs
            )
        return mamba_ssm.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return mamba_selective_state_update


def _declined(original: Function) -> Function:
    def mamba_inner_fn(*args: Any, **kwargs: Any) -> None:
        return None

    return mamba_inner_fn


_REQUIRED: dict[str, Callable[[Function], Function]] = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _scan_step,
}
_OPTIONAL: dict[str, Callable[[Function], Function]] = {"mamba_inner_fn": _declined}


def _version() -> str:
    try:
        version: str = importlib.import_module("transformers").__version__
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise  # something that transformers itself needs
        raise ImportError(
            "mixture_of_mamba.integrations.transformers needs transformers, which is not installed: "
            "pip install transformers"
        ) from error
    return version


def _modelling_module(model: str) -> ModuleType | None:
    """The module, or None where transformers has no such model."""
    try:
        return importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("transformers.models"):
            raise
        return None


def enable() -> tuple[str, ...]:
    """Run transformers' Mamba-1 models on this library until :func:`disable`; a second call changes nothing.

    Mamba must be there. FalconMamba, Jamba and Zamba are served where transformers has them in the same form.
    What has no counterpart here keeps transformers' own code: other activations than silu, and a gradient through a
    decode step.

    Returns:
        The models that are served, by the names of their modules: ``("mamba", "falcon_mamba", "jamba", "zamba")``.
    """
    if not _replaced:
        version = _version()
        found: list[tuple[ModuleType, str, Function]] = []
        for model in _MODELS:
            module = _modelling_module(model)
            missing = [name for name in _REQUIRED if not callable(getattr(module, name, None))]
            if missing and model == "mamba":
                raise ImportError(
                    f"transformers.models.mamba.modeling_mamba must have the functions {', '.join(_REQUIRED)}, but in "
                    f"transformers {version} there is no {', '.join(missing)}"
                )
            if module is None or missing:
                continue
            present = [name for name in (*_REQUIRED, *_OPTIONAL) if hasattr(module, name)]
            found.extend((module, name, getattr(module, name)) for name in present)
        for module, name, original in found:
            setattr(module, name, (_REQUIRED | _OPTIONAL)[name](original))
        _replaced.extend(found)
    return tuple(dict.fromkeys(module.__name__.split(".")[-2] for module, _, _ in _replaced))


def disable() -> None:
    """Put back exactly what :func:`enable` found; without it, nothing."""
    while _replaced:
        module, name, original = _replaced.pop()
        setattr(module, name, original)


@contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for a block; afterwards it is on or off as before, so blocks nest."""
    before = bool(_replaced)
    enable()
    try:
        yield
    finally:
        if before:
            enable()
        else:
            disable()
