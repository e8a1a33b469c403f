# SPDX-License-Identifier: Apache-2.0
"""Moving rows between time order and sorted order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixture_of_mamba.ops._autograd import register_autograd
from mixture_of_mamba.ops._registration import register_fake

__all__ = ["permute_rows"]


def permute_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """``out[i] = x[index[i]]`` over the rows of ``x``; the gradient is the gather by ``inverse``.

    Args:
        x: ``[..., channels]``, any dtype; its rows are all dimensions but the last.
        index, inverse: int32 ``[rows]``, a permutation and its inverse, as ``Routing.order`` and ``Routing.rows``.

    Returns:
        A contiguous tensor with the shape of ``x``. A row whose index is out of range is 0.

    Raises:
        RuntimeError: index or inverse of a wrong dtype, length or device.
    """
    return torch.ops.mixture_of_mamba.permute_rows.default(x, index, inverse)


@register_fake("permute_rows")
def _fake(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, index, inverse = inputs
    ctx.save_for_backward(index, inverse)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    index, inverse = ctx.saved_tensors
    return permute_rows(grad, inverse, index), None, None


register_autograd("permute_rows", _backward, _setup_context)


@torch.library.register_vmap("mixture_of_mamba::permute_rows")
def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, index: Tensor, inverse: Tensor) -> tuple[Tensor, int]:
    x_dim, index_dim, inverse_dim = in_dims
    if index_dim is None and inverse_dim is None:
        rows = x.movedim(x_dim, -2)  # the mapped dimension rides along with the channels
        flat = rows.reshape(*rows.shape[:-2], -1)
        return permute_rows(flat, index, inverse).reshape(rows.shape), rows.dim() - 2

    def pick(tensor: Tensor, dim: int | None, i: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, i)

    parts = [
        permute_rows(pick(x, x_dim, i), pick(index, index_dim, i), pick(inverse, inverse_dim, i))
        for i in range(info.batch_size)
    ]
    return torch.stack(parts), 0
