# SPDX-License-Identifier: Apache-2.0
"""A linear layer with one weight per modality, and what it takes to call any module on sorted rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mixture_of_mamba.ops import grouped_linear
from mixture_of_mamba.routing import Routing

__all__ = ["ModalityLinear"]

# A shared expert costs one more product, 2 operations per row and matrix element, or M sums of matrices, which move 3 M
# values per element. The two take equally long at 500 M rows on an H200 (4.2 TB/s, 700 TFLOP/s, 16 bits) and at 60 M on
# a CPU core (10 GB/s, 100 GFLOP/s, 32 bits). So sums are for training (thousands of rows), where they also keep the
# block one operator, and products for decoding (a few).
SUM_WEIGHTS_FROM_ROWS = 256


def is_watched(module: nn.Module) -> bool:
    """Whether something else runs when ``module`` is called: hooks, or a ``forward`` of this one instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def plain_parameters(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias where calling ``module`` is exactly ``x @ weight.T + bias``, with nobody watching the call.

    A weight that is a tensor of another kind (quantised, sharded) brings a multiplication of its own.
    """
    if type(module) is not nn.Linear or is_watched(module):
        return None
    weight = module.weight
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return None
    return weight, module.bias


def is_plain_linear(module: nn.Module) -> bool:
    return plain_parameters(module) is not None


class ModalityLinear(nn.ModuleList):
    """``y[rows of m] = self[m](x[rows of m])``, plus ``self.shared(x)`` where there is one; padding rows become 0.

    A ``ModuleList`` of ``nn.Linear``, one per modality, so adapters, hooks, quantisation, freezing and
    per-modality learning rates reach each of them. While every child is a plain ``nn.Linear`` without
    hooks the whole is one ``grouped_linear`` call; otherwise the children are called on their rows.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        num_modalities: number of modalities.
        shared_expert: one more ``nn.Linear`` without bias, ``shared``, for the tokens of all modalities, so that
            ``y = x @ (W_m + W_shared).T + b_m`` (AlignMamba-2's sum of shared and specific experts). It starts at
            zero, where it changes nothing and its gradient is the sum of the specific ones. It is no member of the
            list: ``len`` and iteration are about modalities.
    """

    shared: nn.Linear | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_modalities: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        shared_expert: bool = False,
    ) -> None:
        if num_modalities < 1:
            raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
        super().__init__(
            nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype) for _ in range(num_modalities)
        )
        self.in_features = in_features
        self.out_features = out_features
        self.num_modalities = num_modalities
        self.shared = None  # no entry among the modules, whose places del and insert count
        if shared_expert:
            self.shared = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype)
            nn.init.zeros_(self.shared.weight)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(module for name, module in self._modules.items() if module is not None and name != "shared")

    def __len__(self) -> int:
        return len(self._modules) - ("shared" in self._modules)

    def __getitem__(self, index: int | slice) -> Any:
        """One modality's module; a slice gives a plain ``ModuleList``."""
        return nn.ModuleList(list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    @property
    def linears(self) -> list[nn.Linear]:
        """The modalities' children, which are ``nn.Linear`` unless somebody replaced them."""
        return cast(list[nn.Linear], list(self))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def plain_parameters(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """One matrix per modality, without the shared expert's, and one bias each or none.

        None where a child is not plain, or children are not alike. Hooks on the whole do not matter here.
        """
        weights, biases = [], []
        for child in self:
            parameters = plain_parameters(child)
            if parameters is None:
                return None
            weights.append(parameters[0])
            if parameters[1] is not None:
                biases.append(parameters[1])
        if len(biases) not in (0, len(weights)):
            return None
        if self.shared is not None:
            parameters = plain_parameters(self.shared)
            if parameters is None or parameters[1] is not None:
                return None
        return weights, biases

    def with_shared(self, weights: list[Tensor]) -> list[Tensor]:
        """The shared expert added to each, where there is one. For plain children."""
        return weights if self.shared is None else [weight + self.shared.weight for weight in weights]

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        """``x [batch, length, in_features]`` with rows in sorted order -> ``[batch, length, out_features]``.

        One modality needs no routing.
        """
        got = routing.num_modalities if isinstance(routing, Routing) else type(routing).__name__
        if got != len(self) and not (routing is None and len(self) == 1):
            raise ValueError(f"routing must be a Routing of {len(self)} modalities, got {got}")
        parameters = self.plain_parameters()
        if parameters is None:
            y = apply_per_modality(self, x, routing)
        else:
            weights, biases = parameters
            summed = math.prod(x.shape[:-1]) >= SUM_WEIGHTS_FROM_ROWS
            y = linear_per_modality(x, self.with_shared(weights) if summed else weights, biases, routing)
            if summed:
                return y
        return y if self.shared is None else y + apply_to_all(self.shared, x, routing)


def apply_per_modality(modules: nn.ModuleList | list[nn.Module], x: Tensor, routing: Routing | None) -> Tensor:
    """Call each module on its rows. Needs the row boundaries on the host (one wait when they are not)."""
    if routing is None:
        return cast(Tensor, modules[0](x))
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


def apply_to_all(module: nn.Module, x: Tensor, routing: Routing | None) -> Tensor:
    """Call what all modalities share; padding rows, when there are any, stay out of it and become 0."""
    if is_plain_linear(module):
        linear = cast(nn.Linear, module)
        return linear_of_all(x, linear.weight, linear.bias, routing)
    if routing is None or not routing.has_padding:
        return cast(Tensor, module(x))
    return apply_per_modality([module], x, routing.merged())


def linear_per_modality(x: Tensor, weights: list[Tensor], biases: list[Tensor], routing: Routing | None) -> Tensor:
    """One weight per modality and as many biases or none; without a routing there is one modality."""
    if routing is None:
        return linear_of_all(x, weights[0], biases[0] if biases else None, None)
    return grouped_linear(x, weights, biases or None, routing.offsets, routing.host_offsets)


def linear_of_all(x: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing | None) -> Tensor:
    """One GEMM over all rows that are not padding, in the dtype of ``x`` as ``grouped_linear`` is."""
    if routing is None or not routing.has_padding:
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    merged = routing.merged()
    return grouped_linear(x, [weight], None if bias is None else [bias], merged.offsets, merged.host_offsets)
