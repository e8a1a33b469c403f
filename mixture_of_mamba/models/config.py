# SPDX-License-Identifier: Apache-2.0
"""Sizes and settings of a decoder, and those of the paper by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from mixture_of_mamba.nn import PROJECTIONS
from mixture_of_mamba.nn.checks import checked_names
from mixture_of_mamba.nn.dt_limit import checked_dt_limit

__all__ = ["SIZES", "DecoderConfig", "named_config"]

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class DecoderConfig:
    """What a :class:`Decoder` is made of.

    Attributes:
        d_model: width of the residual stream.
        layers: number of layers.
        num_modalities: modality ids are 0 .. num_modalities - 1.
        decouple: which projections of a mixer have one weight per modality; () is dense Mamba. ``"D"`` and ``"A_log"``
            may be among them, as in ``MixtureOfMamba``.
        shared_expert: which of those projections have a shared expert beside the specific ones.
        bcdt_norm, dt_limit: norms on B, C and dt, and bounds on delta, of every mixer.
        mixers_per_layer: Mamba blocks in one layer, each with its norm and residual. The paper's code has two, about
            the parameters (2 x 6.4 d_model^2) of one Transformer layer (12 d_model^2).
        d_state, d_conv, expand: of every mixer, as in ``MixtureOfMamba``.
        attention_every: every so many layers, the last of them is attention and an MLP instead of Mamba; 0 is none.
        attention_heads: heads of those layers.
        norm_eps: of all RMS norms.
        memory: "lean" keeps fewer activations in each mixer for backward and computes them again.
        checkpointing: activation checkpointing of whole layers: "full" keeps a layer's input only, "selective" also
            the outputs of the operators in ``sac_save_list()``.
        bidirectional: pictures are also scanned from their last token to their first (see ``models.pictures``).
        modulated: norms and residuals of picture tokens are modulated by the picture's condition (adaLN-zero).
    """

    d_model: int
    layers: int
    num_modalities: int = 2
    decouple: tuple[str, ...] = PROJECTIONS
    mixers_per_layer: int = 2
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    attention_every: int = 0
    attention_heads: int = 0
    norm_eps: float = 1e-5
    memory: Literal["default", "lean"] = "default"
    checkpointing: Checkpointing = "none"
    bidirectional: bool = False
    modulated: bool = False
    shared_expert: tuple[str, ...] = ()
    bcdt_norm: bool = False
    dt_limit: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        decouple = checked_names("decouple", self.decouple, (*PROJECTIONS, "A_log", "D"))
        object.__setattr__(self, "decouple", decouple)
        shared = checked_names("shared_expert", self.shared_expert, decouple, but=("A_log", "D"))
        object.__setattr__(self, "shared_expert", shared)
        object.__setattr__(self, "dt_limit", checked_dt_limit(self.dt_limit))
        for name in ("d_model", "layers", "num_modalities", "mixers_per_layer", "d_state", "d_conv", "expand"):
            _require_integer(name, getattr(self, name), 1)
        for name in ("attention_every", "attention_heads"):
            _require_integer(name, getattr(self, name), 0)
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        if self.memory not in ("default", "lean"):
            raise ValueError(f'memory must be "default" or "lean", got {self.memory!r}')
        if self.checkpointing not in ("none", "full", "selective"):
            raise ValueError(f'checkpointing must be "none", "full" or "selective", got {self.checkpointing!r}')
        if self.attention_every and (self.attention_heads < 1 or self.d_model % self.attention_heads):
            raise ValueError(
                f"attention_heads must divide d_model = {self.d_model} when attention_every is given, "
                f"got {self.attention_heads}"
            )
        if not self.attention_every and self.attention_heads:
            raise ValueError(f"attention_heads must come with attention_every, got {self.attention_heads} alone")

    def is_attention(self, layer: int) -> bool:
        """Whether that layer, counted from 0, is attention."""
        return self.attention_every > 0 and (layer + 1) % self.attention_every == 0

    @property
    def has_specific_projections(self) -> bool:
        """Whether any projection is per modality."""
        return any(name in PROJECTIONS for name in self.decouple)

    @property
    def residuals(self) -> int:
        """How often something is added to the residual stream."""
        return sum(2 if self.is_attention(layer) else self.mixers_per_layer for layer in range(self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> DecoderConfig:
        """The inverse of :meth:`to_dict`. Raises a ValueError that names unknown or missing entries."""
        known = {field.name for field in fields(DecoderConfig)}
        unknown = sorted(set(values) - known)
        missing = sorted({"d_model", "layers"} - set(values))
        if unknown or missing:
            raise ValueError(f"values must be those of a DecoderConfig, got unknown {unknown}, missing {missing}")
        return DecoderConfig(**values)


def _require_integer(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")


#: Name -> (d_model, layers). The paper gives the names and not these numbers, which are derived: a Transformer of
#: 12 d_model^2 parameters a layer with untied embedding and head of 65,536 (Chameleon) or 32,000 (Transfusion) tokens
#: has the size that the name says within 5 %. In Mamba, with two mixers a layer as in the paper's code, the same width
#: and depth have 0 to 8 % more: 37.1, 94.2, 454, 917 and 1537 M; 170, 814 and 1400 M. So many are active for each token
#: in a mixture, too.
SIZES: dict[str, tuple[int, int]] = {
    "chameleon-37m": (256, 4),
    "chameleon-94m": (512, 8),
    "chameleon-443m": (1024, 24),
    "chameleon-880m": (1536, 24),
    "chameleon-1.5b": (2048, 24),
    "transfusion-163m": (768, 16),
    "transfusion-760m": (1536, 24),
    "transfusion-1.4b": (2048, 24),
}


def named_config(name: str, **changes: Any) -> DecoderConfig:
    """The decoder of one of the paper's models (a name in :data:`SIZES`, whose sizes are derived), with changes.

    ``named_config("chameleon-443m", num_modalities=3, memory="lean")``.
    """
    if name not in SIZES:
        raise ValueError(f"name must be one of {', '.join(SIZES)}, got {name!r}")
    d_model, layers = SIZES[name]
    return replace(DecoderConfig(d_model, layers), **changes)
