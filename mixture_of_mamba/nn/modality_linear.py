# SPDX-License-Identifier: Apache-2.0
"""A linear layer with one weight per modality."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixture_of_mamba.ops import grouped_linear
from mixture_of_mamba.routing import Routing

__all__ = ["ModalityLinear"]


def is_watched(module: nn.Module) -> bool:
    """Whether hooks run when ``module`` is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling ``module`` is exactly ``x @ weight.T + bias``, with nobody watching the call.

    A weight that is a tensor of another kind (quantised, sharded) brings a multiplication of its own.
    """
    return type(module) is nn.Linear and not is_watched(module) and not is_traceable_wrapper_subclass(module.weight)


class ModalityLinear(nn.ModuleList):
    """``y[rows of m] = self[m](x[rows of m])``; padding rows become 0.

    A ``ModuleList`` of ``nn.Linear``, one per modality, so adapters, hooks, quantisation, freezing and
    per-modality learning rates reach each of them. While every child is a plain ``nn.Linear`` without
    hooks the whole is one ``grouped_linear`` call; otherwise the children are called on their rows.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        num_modalities: number of modalities.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_modalities: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype) for _ in range(num_modalities)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.num_modalities = num_modalities

    def __getitem__(self, index: int | slice) -> Any:
        """One modality's module; a slice gives a plain ``ModuleList``."""
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    @property
    def linears(self) -> list[nn.Linear]:
        """The children, which are ``nn.Linear`` unless somebody replaced them."""
        return cast(list[nn.Linear], list(self))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def is_plain(self) -> bool:
        """Whether all children are plain, and alike: with a bias or without. Hooks on the whole do not matter here."""
        alike = len({child.bias is None for child in self.linears if is_plain_linear(child)}) == 1
        return alike and all(is_plain_linear(child) for child in self)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """``x [batch, length, in_features]`` with rows in sorted order -> ``[batch, length, out_features]``."""
        if self.is_plain():
            weights = [child.weight for child in self.linears]
            biases = [child.bias for child in self.linears if child.bias is not None]
            return grouped_linear(x, weights, biases or None, routing.offsets, routing.host_offsets)
        return apply_per_modality(self, x, routing)


def apply_per_modality(modules: nn.ModuleList | list[nn.Module], x: Tensor, routing: Routing) -> Tensor:
    """Call each module on its rows. Needs the row boundaries on the host (one wait when they are not)."""
    host_offsets = routing.with_host_offsets().host_offsets
    assert host_offsets is not None
    boundaries: list[int] = host_offsets.tolist()
    rows = x.reshape(-1, x.shape[-1])
    parts = [
        module(rows[begin:end]) for module, begin, end in zip(modules, boundaries[:-1], boundaries[1:], strict=True)
    ]
    padding = rows.shape[0] - boundaries[-1]
    if padding:
        parts.append(parts[0].new_zeros(padding, parts[0].shape[-1]))
    return torch.cat(parts).reshape(*x.shape[:-1], parts[0].shape[-1])
