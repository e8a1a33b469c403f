# SPDX-License-Identifier: Apache-2.0
"""More modalities out of fewer: every new one starts as a copy, so the function does not change."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeVar, cast

from torch import nn

from mixture_of_mamba.nn import PROJECTIONS, MixtureOfMamba, ModalityLinear
from mixture_of_mamba.nn.mixing import NORMS

__all__ = ["add_modality", "upcycle"]

T = TypeVar("T", bound=nn.Module)


def upcycle(
    dense: MixtureOfMamba,
    num_modalities: int,
    decouple: Iterable[str] = PROJECTIONS,
    *,
    memory: Literal["default", "lean"] | None = None,
    shared_expert: Iterable[str] = (),
) -> MixtureOfMamba:
    """A mixture that computes, for all ids, exactly what the dense layer computes, and is free to part from it.

    Args:
        dense: a :class:`Mamba`, or a mixture without decoupled projections. It is copied and not changed.
        num_modalities, decouple, memory, shared_expert: as in :class:`MixtureOfMamba`; memory is the dense layer's
            when None. Shared experts are zero, and the specific ones the dense weights.

    Device, dtypes, ``requires_grad``, marks on parameters and hooks on the projections come along. No random
    number is drawn.
    """
    if not isinstance(dense, MixtureOfMamba):
        raise ValueError(f"dense must be a Mamba or a MixtureOfMamba, got {type(dense).__name__}")
    if dense.decouple:
        raise ValueError(f"dense must have no projection per modality, got decouple={dense.decouple}")
    if num_modalities < 1:
        raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
    return _rebuild(dense, decouple, shared_expert, [0] * num_modalities, memory)


def add_modality(layer: MixtureOfMamba, like: int = 0) -> MixtureOfMamba:
    """A copy of the layer with one more modality, the last id, which starts as a copy of modality ``like``."""
    if not isinstance(layer, MixtureOfMamba):
        raise ValueError(f"layer must be a MixtureOfMamba, got {type(layer).__name__}")
    if not 0 <= like < layer.num_modalities:
        raise ValueError(f"like must be a modality of the layer, 0 .. {layer.num_modalities - 1}, got {like}")
    return _rebuild(layer, layer.decouple, layer.shared_expert, [*range(layer.num_modalities), like], None)


def _rebuild(
    layer: MixtureOfMamba,
    decouple: Iterable[str],
    shared_expert: Iterable[str],
    origins: Sequence[int],
    memory: Literal["default", "lean"] | None,
) -> MixtureOfMamba:
    """A layer whose modality m is a copy of ``layer``'s modality ``origins[m]``."""
    # On the meta device: sizes and options only. Everything that has values is put in from copies below.
    result = MixtureOfMamba(
        d_model=layer.d_model,
        num_modalities=len(origins),
        decouple=decouple,
        d_state=layer.d_state,
        d_conv=layer.d_conv,
        expand=cast(int, Fraction(layer.d_inner, layer.d_model)),
        dt_rank=layer.dt_rank,
        dt_min=layer.dt_min,
        dt_max=layer.dt_max,
        dt_init=cast(Any, layer.dt_init),
        dt_scale=layer.dt_scale,
        dt_init_floor=layer.dt_init_floor,
        layer_idx=layer.layer_idx,
        device="meta",
        memory=memory or cast(Any, layer.memory),
        dt_limit=layer.dt_limit,
        shared_expert=shared_expert,
    )
    for name in PROJECTIONS:
        old, new = getattr(layer, name), getattr(result, name)
        if isinstance(new, ModalityLinear):
            for modality, origin in enumerate(origins):
                new[modality] = _copy(old[origin] if isinstance(old, ModalityLinear) else old)
            if new.shared is not None:
                existing = old.shared if isinstance(old, ModalityLinear) else None
                new.shared = _zeros(new.shared, layer) if existing is None else _copy(existing)
        else:
            setattr(result, name, _copy(old))
    result.conv1d = _copy(layer.conv1d)
    for name in NORMS:
        norm = getattr(layer, name)
        setattr(result, name, None if norm is None else _copy(norm))
    for name in ("A_log", "D"):
        parameter = getattr(layer, name)
        copied = _copy_parameter(parameter)
        if name in result.decouple:
            values = parameter.detach() if name in layer.decouple else parameter.detach().unsqueeze(0)
            rows = nn.Parameter(values[list(origins)].clone(), requires_grad=parameter.requires_grad)
            copied = _copy_marks(parameter, rows)
        setattr(result, name, copied)
    return result.train(layer.training)


def _zeros(linear: nn.Linear, layer: MixtureOfMamba) -> nn.Linear:
    """The linear, on meta so far, as zeros beside the layer's weights."""
    like = layer.conv1d.weight
    linear.to_empty(device=like.device).to(like.dtype)
    nn.init.zeros_(linear.weight)
    return linear


def _copy(module: T) -> T:
    twin = copy.deepcopy(module)
    for old, new in zip(module.parameters(), twin.parameters(), strict=True):
        _copy_marks(old, new)
    return twin


def _copy_parameter(parameter: nn.Parameter) -> nn.Parameter:
    return _copy_marks(parameter, copy.deepcopy(parameter))


def _copy_marks(old: nn.Parameter, new: nn.Parameter) -> nn.Parameter:
    """Marks are attributes (``_no_weight_decay``), which deepcopy of a parameter leaves behind."""
    vars(new).update(vars(old))
    return new
