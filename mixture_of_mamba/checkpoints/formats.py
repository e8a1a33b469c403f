# SPDX-License-Identifier: Apache-2.0
"""The names of one layer's tensors in each format, and the conversion between any two of them.

All formats descend from ``mamba_ssm.Mamba``, so the tensors and most names are the same everywhere. They differ in
what they call the projection of one modality: that is the whole table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mixture_of_mamba.nn import PROJECTIONS
from mixture_of_mamba.nn.mixing import NORMS

__all__ = ["FORMATS", "OURS", "PREFIX_HINT", "CheckpointError", "convert", "read_names", "write_name"]

OURS = "mixture_of_mamba"

#: Format -> what it calls one modality's projection; None where there is one for all tokens.
FORMATS: dict[str, str | None] = {
    OURS: "{projection}.{modality}",
    "mamba_ssm": None,
    "transformers": None,
    "published": "local_experts_{projection}.{modality}",
}

_PROJECTION = f"({'|'.join(PROJECTIONS)})"
_SHARED = re.compile(rf"A_log|D|(conv1d|{_PROJECTION})\.(weight|bias)|({'|'.join(NORMS)})\.weight")
_SHARED_EXPERT = re.compile(rf"{_PROJECTION}\.shared\.weight")
_OURS_PER_MODALITY = re.compile(rf"{_PROJECTION}\.(\d+)\.(weight|bias)")
_SHARED_DT_BIAS = "dt_proj.bias"


class CheckpointError(ValueError):
    """A state dict does not fit. The names are those of the state dict.

    Attributes:
        missing: names that are needed and not there.
        unexpected: names that have no place.
        mismatched: names of tensors that cannot be copied, each with what was required and what came.
    """

    def __init__(
        self,
        summary: str,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        mismatched: Mapping[str, str] | None = None,
        hint: str = "",
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.mismatched = dict(mismatched or {})
        lines = [summary]
        if missing:
            lines.append(f"missing: {', '.join(missing)}")
        if unexpected:
            lines.append(f"unexpected: {', '.join(unexpected)}")
        lines += [f"{name} {problem}" for name, problem in self.mismatched.items()]
        super().__init__("\n  ".join(lines) + (f"\n{hint}" if hint else ""))


def convert(
    state_dict: Mapping[str, Tensor], source: str = OURS, target: str = OURS, prefix: str = ""
) -> dict[str, Tensor]:
    """Rename one layer's tensors, so that the target's layer computes what the source's layer computes.

    The tensors are passed on, not copied, with two exceptions. The published layer never adds the bias of a ``dt_proj``
    that is shared by all modalities: coming from there it becomes zeros; on the way there it must be zeros. And it has
    no shared experts: on the way there they are added to the specific ones, which computes the same.

    Args:
        state_dict: the layer's tensors, or a model's together with ``prefix``.
        source, target: names in :data:`FORMATS`.
        prefix: take the entries whose names begin so (``"backbone.layers.3.mixer."``), without it.

    Raises:
        CheckpointError: naming entries that the source does not have or the target cannot hold.
        ValueError: an unknown format, a bias of dt that the target would not add, or an A_log or D per modality
            that it cannot hold.
    """
    tensors, unexpected = read_names(state_dict, source, prefix)
    if unexpected:
        raise CheckpointError(
            f'state_dict is not a layer in the format "{source}"', unexpected=unexpected, hint=PREFIX_HINT
        )
    if target == "published":
        tensors = _without_shared_experts(tensors)
    for name, dims in (("A_log", 2), ("D", 1)):
        if target != OURS and name in tensors and tensors[name].dim() > dims:
            shape = list(tensors[name].shape)
            raise ValueError(f'{prefix}{name} must be one for all modalities in the format "{target}", got {shape}')
    names = {name: write_name(name, target) for name in tensors}
    homeless = [_source_name(name, source, prefix) for name, new in names.items() if new is None]
    if homeless:
        raise CheckpointError(
            f'the format "{target}" has one weight per projection, but state_dict one per modality', unexpected=homeless
        )
    if target == "published" and source != "published" and _SHARED_DT_BIAS in tensors:
        bias = tensors[_SHARED_DT_BIAS]
        if not bias.is_meta and bool(torch.count_nonzero(bias)):
            raise ValueError(
                f"{prefix}{_SHARED_DT_BIAS} must be zeros, since the published layer does not add the bias of a "
                "dt_proj shared by all modalities, got other values; a layer with dt_proj per modality can be converted"
            )
    if source == "published" and target != "published":
        tensors = without_unused_bias(tensors)
    return {new: tensors[name] for name, new in names.items() if new is not None}


PREFIX_HINT = "Entries of one layer inside a model are chosen with prefix, which ends in a dot."


def read_names(state_dict: Mapping[str, Tensor], source: str, prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """The layer's tensors under our names, and the names (as given) that the format does not have."""
    template = _template(source)
    per_modality = None
    if template is not None:
        pattern = template.format(projection=_PROJECTION, modality=r"(\d+)")
        per_modality = re.compile(rf"{pattern}\.(weight|bias)")
    tensors, unexpected = {}, []
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict must map names to tensors, got {type(state_dict).__name__}")
    for full_name, tensor in state_dict.items():
        if not full_name.startswith(prefix):
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state_dict must map names to tensors, got {type(tensor).__name__} for {full_name}")
        name = full_name[len(prefix) :]
        if _SHARED.fullmatch(name) or (source == OURS and _SHARED_EXPERT.fullmatch(name)):
            tensors[name] = tensor
        elif per_modality is not None and (match := per_modality.fullmatch(name)):
            tensors[".".join(match.groups())] = tensor
        else:
            unexpected.append(full_name)
    return tensors, unexpected


def write_name(name: str, target: str) -> str | None:
    """What ``target`` calls our ``name``; None where it has no such thing."""
    template = _template(target)
    if _SHARED_EXPERT.fullmatch(name) and target != OURS:
        return None
    match = _OURS_PER_MODALITY.fullmatch(name)
    if match is None:
        return name
    if template is None:
        return None
    return f"{template.format(projection=match[1], modality=match[2])}.{match[3]}"


def without_unused_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published layer's tensors, with zeros for the bias that it keeps and does not add."""
    if _SHARED_DT_BIAS not in tensors:
        return tensors
    return tensors | {_SHARED_DT_BIAS: torch.zeros_like(tensors[_SHARED_DT_BIAS])}


def _without_shared_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function: each modality's weight with the shared expert's added."""
    result = {}
    for name, tensor in tensors.items():
        match = _OURS_PER_MODALITY.fullmatch(name)
        shared = tensors.get(f"{match[1]}.shared.weight") if match and match[3] == "weight" else None
        if not _SHARED_EXPERT.fullmatch(name):
            result[name] = tensor if shared is None else tensor + shared
    return result


def _source_name(name: str, source: str, prefix: str) -> str:
    return prefix + (write_name(name, source) or name)


def _template(format: str) -> str | None:
    if format not in FORMATS:
        raise ValueError(f"a format must be one of {tuple(FORMATS)}, got {format!r}")
    return FORMATS[format]
