# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Mamba block (arXiv 2501.16295)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn

from mixture_of_mamba.nn.checks import check_cu_seqlens, check_options, check_state, checked_names
from mixture_of_mamba.nn.dt_limit import checked_dt_limit
from mixture_of_mamba.nn.inference_cache import InferenceParams, forward_with_cache
from mixture_of_mamba.nn.initialisation import initialise, mark
from mixture_of_mamba.nn.mixing import PROJECTIONS, decode, mix
from mixture_of_mamba.nn.modality_argument import routing_of
from mixture_of_mamba.nn.modality_linear import ModalityLinear
from mixture_of_mamba.nn.state import MambaState, checked_ssm_dtype
from mixture_of_mamba.routing import Routing

__all__ = ["PROJECTIONS", "MixtureOfMamba"]


class MixtureOfMamba(nn.Module):
    """Mamba block whose projections may be per modality; the convolution is shared by all, A and D unless asked.

    Args:
        d_model: width of the residual stream.
        num_modalities: number of modalities, ids 0 .. num_modalities - 1.
        decouple: which of ``in_proj, x_proj, dt_proj, out_proj`` are per modality; any of the 16 subsets. With ``"D"``
            among them D is ``[num_modalities, d_inner]``. The scan then leaves the skip to elementwise operators: the
            same numbers, but slower, and the block is the operators one by one. With ``"A_log"`` A_log is
            ``[num_modalities, d_inner, d_state]``, meant for ablations: the scan, step by step too, then keeps several
            activations of ``d_inner * d_state`` per token in float32 and takes several times the time. A layer without
            these two goes its fast way as ever.
        d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias,
            layer_idx, device, dtype: as in ``mamba_ssm.Mamba``. A_log and D are float32 whatever ``dtype`` is.
        memory: "lean" keeps fewer activations for backward and computes them again there (see ``ops.mamba_block``).
            It matters while every projection is a plain ``nn.Linear`` that nobody watches, and the block one operator.
        bcdt_norm: RMS norms with weights, shared by all modalities, on B, C and the low-rank dt before ``dt_proj``:
            Jamba's, with its names ``b_layernorm, c_layernorm, dt_layernorm``. FalconMamba's have weights of 1.
        dt_limit: ``(low, high)``, bounds on delta = softplus(dt + bias), as in ``mamba_ssm.Mamba2``. With a norm or a
            limit the block is the operators one by one, and ``memory`` changes nothing.
        shared_expert: which of the decoupled projections have one more linear for the tokens of all modalities, beside
            the specific ones: ``y = x @ (W_m + W_shared).T + b_m``, see :class:`ModalityLinear`. It starts at zero. In
            training the weights are added, M sums of matrices and no further product; backward keeps the sums.

    Parameter names are those of ``mamba_ssm.Mamba``; a decoupled projection holds one ``nn.Linear`` per
    modality (``in_proj.0.weight``, ``in_proj.1.weight``, ..., and ``in_proj.shared.weight``).

    Raises:
        ValueError: naming the option, what was required, and what came.
    """

    def __init__(
        self,
        d_model: int,
        num_modalities: int,
        decouple: Iterable[str] = PROJECTIONS,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory: Literal["default", "lean"] = "default",
        bcdt_norm: bool = False,
        dt_limit: tuple[float, float] | None = None,
        shared_expert: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.decouple = checked_names("decouple", decouple, (*PROJECTIONS, "A_log", "D"))
        self.shared_expert = checked_names("shared_expert", shared_expert, self.decouple, but=("A_log", "D"))
        check_options(
            {"d_model": d_model, "num_modalities": num_modalities, "d_state": d_state, "d_conv": d_conv},
            expand=expand,
            dt_rank=dt_rank,
            dt_range=(dt_min, dt_max),
            dt_init=dt_init,
            memory=memory,
            dtype=dtype,
        )
        self.memory = memory
        self.dt_limit = checked_dt_limit(dt_limit)
        self.d_model = d_model
        self.num_modalities = num_modalities
        self.d_state = d_state
        self.d_conv = d_conv
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_min, self.dt_max = dt_min, dt_max
        self.dt_init, self.dt_scale, self.dt_init_floor = dt_init, dt_scale, dt_init_floor
        self.layer_idx = layer_idx

        def projection(name: str, in_features: int, out_features: int, bias: bool) -> nn.Linear | ModalityLinear:
            if name in self.decouple:
                shared = name in self.shared_expert
                return ModalityLinear(in_features, out_features, num_modalities, bias, device, dtype, shared)
            return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)

        self.in_proj = projection("in_proj", d_model, 2 * self.d_inner, bias)
        self.conv1d = nn.Conv1d(
            self.d_inner,
            self.d_inner,
            kernel_size=d_conv,
            groups=self.d_inner,
            padding=d_conv - 1,
            bias=conv_bias,
            device=device,
            dtype=dtype,
        )
        self.x_proj = projection("x_proj", self.d_inner, self.dt_rank + 2 * d_state, False)
        self.dt_proj = projection("dt_proj", self.dt_rank, self.d_inner, True)

        def recurrent(name: str, *shape: int) -> nn.Parameter:
            shape = (num_modalities, *shape) if name in self.decouple else shape
            return nn.Parameter(torch.empty(shape, device=device, dtype=torch.float32))

        self.A_log, self.D = recurrent("A_log", self.d_inner, d_state), recurrent("D", self.d_inner)
        self.out_proj = projection("out_proj", self.d_inner, d_model, bias)

        def norm(size: int) -> nn.RMSNorm | None:
            return nn.RMSNorm(size, eps=1e-6, device=device, dtype=dtype) if bcdt_norm else None

        self.dt_layernorm, self.b_layernorm, self.c_layernorm = norm(self.dt_rank), norm(d_state), norm(d_state)
        self.register_load_state_dict_post_hook(_mark_after_loading)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as in the Mamba paper: dt in [dt_min, dt_max] per modality, A = -(1 .. d_state), D = 1."""
        initialise(self)

    def mark_parameters(self) -> None:
        """Mark ``_no_weight_decay`` (A_log, D, biases of dt) and ``_no_reinit`` (biases of dt), as ``mamba_ssm`` does.

        Needed only after what puts other parameters in the place of the layer's, such as ``fully_shard``.
        """
        mark(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After ``copy.deepcopy`` and after unpickling; a parameter's deepcopy leaves its marks behind."""
        super().__setstate__(state)
        self.mark_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MixtureOfMamba:
        super()._apply(fn, recurse)  # to_empty from the meta device makes new parameters
        self.mark_parameters()
        return self

    def extra_repr(self) -> str:
        limit = "" if self.dt_limit is None else f", dt_limit={self.dt_limit}"
        shared = f", shared_expert={self.shared_expert}" if self.shared_expert else ""
        return f"d_model={self.d_model}, num_modalities={self.num_modalities}, decouple={self.decouple}{limit}{shared}"

    def allocate_state(
        self,
        batch: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        ssm_dtype: torch.dtype | None = None,
    ) -> MambaState:
        """The state before the first token. ``dtype`` is that of the activations (by default the weights').

        ``ssm_dtype`` is that of the scan's part: float32 (float64 for float64), or ``dtype`` where that has 16 bits. It
        then has half of the bytes, and every step rounds it.
        """
        weight = self.conv1d.weight
        dtype = dtype or weight.dtype
        if not isinstance(batch, (int, torch.SymInt)) or batch < 0:
            raise ValueError(f"batch must be an integer of at least 0, got {batch!r}")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        device = weight.device if device is None else device
        ssm_dtype = checked_ssm_dtype("ssm_dtype", ssm_dtype, dtype)
        return MambaState(
            conv=torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=ssm_dtype),
        )

    @overload
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | int | None = ...,
        *,
        modality_masks: Tensor | Sequence[Tensor] | None = ...,
        sorted: bool = ...,
        cu_seqlens: Tensor | None = ...,
        state: MambaState | None = ...,
        return_state: Literal[False] = ...,
        inference_params: InferenceParams | None = ...,
        reverse: bool = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | int | None = ...,
        *,
        modality_masks: Tensor | Sequence[Tensor] | None = ...,
        sorted: bool = ...,
        cu_seqlens: Tensor | None = ...,
        state: MambaState | None = ...,
        return_state: Literal[True],
        inference_params: None = ...,
        reverse: bool = ...,
    ) -> tuple[Tensor, MambaState]: ...
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | int | None = None,
        *,
        modality_masks: Tensor | Sequence[Tensor] | None = None,
        sorted: bool = False,
        cu_seqlens: Tensor | None = None,
        state: MambaState | None = None,
        return_state: bool = False,
        inference_params: InferenceParams | None = None,
        reverse: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mix tokens along time; any length, prefill and continuation alike.

        Args:
            x: ``[batch, length, d_model]`` in time order, or with rows in sorted order when ``sorted``.
            modality: integer ids ``[batch, length]`` (-1 = padding), or a :class:`Routing` of them, made once
                per batch for many layers. An int or a bool is the one modality of all tokens. May be None when
                there is one modality. A layer of one modality takes ids of many for that one.
            modality_masks: instead of ``modality``, bool masks as in :meth:`Routing.from_masks`; a token in no mask
                is padding.
            sorted: x is, and the result shall be, in the routing's sorted order (no permutation here).
            cu_seqlens: int32 ``[sequences + 1]`` boundaries of packed documents in flat time order.
            state: where each sequence starts from; differentiable.
            return_state: also return the state after the last token; differentiable.
            inference_params: the cache of ``mamba_ssm``'s generation; it keeps the state under ``layer_idx``. Prefill
                while its ``seqlen_offset`` is 0, then :meth:`step`. x is in time order.
            reverse: mix along time from last to first, in each sequence: what flipping x, ids and result would give,
                without a flip. Convolution and scan walk the other way; state is where the last token starts from.
                Two layers, ``one(x, r) + other(x, r, reverse=True)``, see both sides of a token.

        Returns:
            ``y`` with the shape and order of ``x``, or ``(y, state)``.

        Raises:
            ValueError, RuntimeError: naming the argument, what was required, and what came.
        """
        if inference_params is not None:
            if sorted or return_state or state is not None or cu_seqlens is not None or reverse:
                raise ValueError(
                    "inference_params must come without sorted, cu_seqlens, state and return_state, or reverse"
                )
            return forward_with_cache(self, x, inference_params, modality=modality, modality_masks=modality_masks)
        check_state(state)
        check_cu_seqlens(cu_seqlens)
        routing = routing_of(self, x, modality, modality_masks, needed=reverse)
        if routing is not None and not sorted:
            x = routing.sort(x)
        walk = routing.reversed(cu_seqlens) if routing is not None and reverse else routing
        y, new_state = mix(self, x, walk, cu_seqlens, state)
        if routing is not None and not sorted:
            y = routing.unsort(y)
        return (y, new_state) if return_state else y

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        state: MambaState,
        modality: Tensor | Routing | int | None = None,
        *,
        modality_masks: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Decode one or a few tokens ``[batch, length, d_model]``, updating ``state`` in place (inference only)."""
        check_state(state, needed=True)
        routing = routing_of(self, x, modality, modality_masks)
        x = x if routing is None else routing.sort(x)
        y = decode(self, x, routing, state)
        return y if routing is None else routing.unsort(y)


def _mark_after_loading(layer: nn.Module, incompatible_keys: object) -> None:
    """``load_state_dict(assign=True)`` puts new parameters in the place of the old ones."""
    cast(MixtureOfMamba, layer).mark_parameters()
