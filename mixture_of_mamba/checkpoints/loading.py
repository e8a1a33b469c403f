# SPDX-License-Identifier: Apache-2.0
"""A layer's weights out of a state dict in any format, with one report of all that does not fit."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mixture_of_mamba.checkpoints.formats import (
    FORMATS,
    OURS,
    PREFIX_HINT,
    CheckpointError,
    read_names,
    without_unused_bias,
    write_name,
)
from mixture_of_mamba.nn import MixtureOfMamba

__all__ = ["load"]


def load(layer: MixtureOfMamba, state_dict: Mapping[str, Tensor], format: str = OURS, prefix: str = "") -> None:
    """Copy one layer's tensors into ``layer``, which keeps its dtypes, its device and the marks on its parameters.

    A layer on the meta device gets memory where the tensors are. Nothing is changed when something does not fit.

    Args:
        state_dict, prefix: as in :func:`convert`.
        format: the state dict's, a name in :data:`FORMATS`.

    Raises:
        CheckpointError: naming everything that is missing, unexpected or of another shape.
        ValueError: a layer that is none of this library, a state_dict that holds no tensors, or an unknown format.
    """
    if not isinstance(layer, MixtureOfMamba):
        raise ValueError(f"layer must be a MixtureOfMamba or a Mamba, got {type(layer).__name__}")
    tensors, unexpected = read_names(state_dict, format, prefix)
    if format == "published":
        tensors = without_unused_bias(tensors)

    def given(name: str) -> str:
        return prefix + (write_name(name, format) or name)

    own = layer.state_dict()
    missing = [given(name) for name in own if name not in tensors]
    unexpected += [given(name) for name in tensors if name not in own]
    mismatched = {}
    for name, tensor in tensors.items():
        if name not in own:
            continue
        if tensor.shape != own[name].shape:
            mismatched[given(name)] = f"must have shape {list(own[name].shape)}, got {list(tensor.shape)}"
        elif tensor.is_meta and not own[name].is_meta:
            mismatched[given(name)] = "must have values, got a tensor on the meta device"
    if missing or unexpected or mismatched:
        nothing_fits = len(missing) == len(own)
        hint = ""
        if nothing_fits:
            hint = PREFIX_HINT
        elif FORMATS[format] is None and layer.decouple:
            hint = "A dense layer's weights become a mixture's with upcycle."
        raise CheckpointError(
            f'state_dict in the format "{format}" does not fit the layer '
            f"(d_model={layer.d_model}, num_modalities={layer.num_modalities}, decouple={layer.decouple})",
            missing,
            unexpected,
            mismatched,
            hint,
        )
    if not any(tensor.is_meta for tensor in own.values()):
        layer.load_state_dict(tensors)
        return
    # assign puts new parameters in, in which the marks must be written again, and takes the given dtype.
    marks = {name: dict(vars(parameter)) for name, parameter in layer.named_parameters()}
    copies = {name: tensor.detach().to(own[name].dtype, copy=True) for name, tensor in tensors.items()}
    layer.load_state_dict(copies, assign=True)
    for name, parameter in layer.named_parameters():
        vars(parameter).update(marks[name])
