# SPDX-License-Identifier: Apache-2.0
"""Decoding with the state kept in a cache of all layers, as ``mamba_ssm``'s generation loop does it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from mixture_of_mamba.nn.state import MambaState

if TYPE_CHECKING:
    from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = ["InferenceParams", "forward_with_cache"]


class InferenceParams(Protocol):
    """What is used of ``mamba_ssm.utils.generation.InferenceParams``.

    Attributes:
        key_value_memory_dict: by ``layer_idx``, the :class:`MambaState` of each layer.
        seqlen_offset: the number of tokens seen so far; the caller counts.
    """

    key_value_memory_dict: dict[int, Any]
    seqlen_offset: int


def forward_with_cache(layer: MixtureOfMamba, x: Tensor, params: InferenceParams, **modality: Any) -> Tensor:
    """Prefill when no token has been seen, else step. The state is kept without its history."""
    if not hasattr(params, "key_value_memory_dict") or not hasattr(params, "seqlen_offset"):
        raise ValueError(
            f"inference_params must have key_value_memory_dict and seqlen_offset, got {type(params).__name__}"
        )
    index, cache = layer.layer_idx, params.key_value_memory_dict
    if index is None:
        raise ValueError("inference_params must come to a layer made with layer_idx, its key in the cache, got None")
    if params.seqlen_offset == 0:
        y, state = layer.forward(x, **modality, return_state=True)  # the layer's hooks run around the call we are in
        _keep(cache, index, state.detach())
        return y
    if not isinstance(cache.get(index), MambaState):
        raise ValueError(
            f"inference_params.key_value_memory_dict must hold the MambaState of layer {index} when seqlen_offset is "
            f"{params.seqlen_offset}, got {type(cache.get(index)).__name__}"
        )
    return layer.step(x, cache[index], **modality)


def _keep(cache: dict[int, Any], index: int, state: MambaState) -> None:
    """Into the tensors that are there, when they fit: a captured CUDA graph of the step reads those.

    A state of 16 bits that is there already, as of ``allocate_state``, says that 16 bits are wanted.
    """
    old = cache.get(index)
    if isinstance(old, MambaState) and old.ssm.dtype == old.conv.dtype == state.conv.dtype:
        state = state.to(ssm_dtype=old.ssm.dtype)
    if isinstance(old, MambaState) and _alike(old.conv, state.conv) and _alike(old.ssm, state.ssm):
        old.conv.copy_(state.conv)
        old.ssm.copy_(state.ssm)
    else:
        cache[index] = state


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
