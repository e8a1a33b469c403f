# SPDX-License-Identifier: Apache-2.0
"""The Mixture-of-Mamba block (arXiv 2501.16295) and its dense special case, Mamba (arXiv 2312.00752)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from mixture_of_mamba.nn.modality_linear import ModalityLinear, apply_per_modality, is_plain_linear, is_watched
from mixture_of_mamba.nn.state import MambaState
from mixture_of_mamba.ops import (
    causal_conv1d,
    causal_conv1d_step,
    grouped_linear,
    mamba_block,
    selective_scan,
    selective_scan_step,
)
from mixture_of_mamba.routing import Routing

__all__ = ["PROJECTIONS", "Mamba", "MixtureOfMamba"]

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")


class MixtureOfMamba(nn.Module):
    """Mamba block whose projections may be per modality; convolution, A and D are shared by all.

    Args:
        d_model: width of the residual stream.
        num_modalities: number of modalities, ids 0 .. num_modalities - 1.
        decouple: which of ``in_proj, x_proj, dt_proj, out_proj`` are per modality; any of the 16 subsets.
        d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias,
            layer_idx, device, dtype: as in ``mamba_ssm.Mamba``. A_log and D are always float32.
        memory: "lean" keeps fewer activations for backward and computes them again there (see ``ops.mamba_block``).

    Parameter names are those of ``mamba_ssm.Mamba``; a decoupled projection holds one ``nn.Linear`` per
    modality (``in_proj.0.weight``, ``in_proj.1.weight``, ...).
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
    ) -> None:
        super().__init__()
        self.decouple = tuple(decouple)
        unknown = [name for name in self.decouple if name not in PROJECTIONS]
        if unknown:
            raise ValueError(f"decouple must name projections among {PROJECTIONS}, got {unknown}")
        if num_modalities < 1:
            raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
        if dt_init not in ("random", "constant"):
            raise ValueError(f'dt_init must be "random" or "constant", got {dt_init!r}')
        if memory not in ("default", "lean"):
            raise ValueError(f'memory must be "default" or "lean", got {memory!r}')
        self.memory = memory
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
                return ModalityLinear(in_features, out_features, num_modalities, bias, device, dtype)
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
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=torch.float32))
        self.out_proj = projection("out_proj", self.d_inner, d_model, bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as in the Mamba paper: dt in [dt_min, dt_max] per modality, A = -(1 .. d_state), D = 1."""
        linears = (nn.Linear, nn.Conv1d)
        for module in self.modules():
            if isinstance(module, linears):
                module.reset_parameters()
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=self.A_log.device)
        self.A_log.copy_(states.log().expand(self.d_inner, -1))
        self.D.fill_(1.0)
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        bound = self.dt_rank**-0.5 * self.dt_scale
        for child in self.dt_proj.linears if isinstance(self.dt_proj, ModalityLinear) else [self.dt_proj]:
            if self.dt_init == "constant":
                child.weight.fill_(bound)
            else:
                child.weight.uniform_(-bound, bound)
            low, high = math.log(self.dt_min), math.log(self.dt_max)
            dt = torch.rand(self.d_inner, dtype=torch.float32, device=child.bias.device)
            dt = (low + dt * (high - low)).exp().clamp(min=self.dt_init_floor)
            child.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            child.bias._no_reinit = True  # type: ignore[attr-defined]
            child.bias._no_weight_decay = True  # type: ignore[attr-defined]

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, num_modalities={self.num_modalities}, decouple={self.decouple}"

    def allocate_state(self, batch: int, *, device: Any = None, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first token. ``dtype`` is that of the activations (by default the weights')."""
        weight = self.conv1d.weight
        dtype = dtype or weight.dtype
        device = device or weight.device
        ssm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return MambaState(
            conv=torch.zeros(batch, self.d_conv - 1, self.d_inner, device=device, dtype=dtype),
            ssm=torch.zeros(batch, self.d_inner, self.d_state, device=device, dtype=ssm_dtype),
        )

    @overload
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | None = ...,
        *,
        sorted: bool = ...,
        cu_seqlens: Tensor | None = ...,
        state: MambaState | None = ...,
        return_state: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | None = ...,
        *,
        sorted: bool = ...,
        cu_seqlens: Tensor | None = ...,
        state: MambaState | None = ...,
        return_state: Literal[True],
    ) -> tuple[Tensor, MambaState]: ...
    def forward(
        self,
        x: Tensor,
        modality: Tensor | Routing | None = None,
        *,
        sorted: bool = False,
        cu_seqlens: Tensor | None = None,
        state: MambaState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MambaState]:
        """Mix tokens along time; any length, prefill and continuation alike.

        Args:
            x: ``[batch, length, d_model]`` in time order, or with rows in sorted order when ``sorted``.
            modality: integer ids ``[batch, length]`` (-1 = padding), or a :class:`Routing` of them, made once
                per batch for many layers. May be None when there is one modality.
            sorted: x is, and the result shall be, in the routing's sorted order (no permutation here).
            cu_seqlens: int32 ``[sequences + 1]`` boundaries of packed documents in flat time order.
            state: where each sequence starts from; differentiable.
            return_state: also return the state after the last token; differentiable.

        Returns:
            ``y`` with the shape and order of ``x``, or ``(y, state)``.

        Raises:
            ValueError, RuntimeError: naming the argument, what was required, and what came.
        """
        routing = self._routing(x, modality)
        if routing is not None and not sorted:
            x = routing.sort(x)
        y, new_state = self._mix(x, routing, cu_seqlens, state)
        if routing is not None and not sorted:
            y = routing.unsort(y)
        return (y, new_state) if return_state else y

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        state: MambaState,
        modality: Tensor | Routing | None = None,
    ) -> Tensor:
        """Decode one or a few tokens ``[batch, length, d_model]``, updating ``state`` in place (inference only)."""
        routing = self._routing(x, modality)
        x = x if routing is None else routing.sort(x)
        rows = None if routing is None else routing.rows
        offsets = None if routing is None else routing.offsets
        x, z = self._project("in_proj", x, routing).chunk(2, dim=-1)
        u = causal_conv1d_step(x, state.conv, *self._conv_parameters(), rows=rows, offsets=offsets)
        dt, dt_bias, B, C = self._scan_inputs(u, routing)
        A = -torch.exp(self.A_log.float())
        y = selective_scan_step(u, state.ssm, dt, A, B, C, self.D, z, dt_bias, rows=rows, offsets=offsets)
        y = self._project("out_proj", y, routing)
        return y if routing is None else routing.unsort(y)

    def _mix(
        self, x: Tensor, routing: Routing | None, cu_seqlens: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        if self._is_one_op(x, routing):
            return self._mix_in_one_op(x, routing, cu_seqlens, state)
        rows = None if routing is None else routing.rows
        offsets = None if routing is None else routing.offsets
        x, z = self._project("in_proj", x, routing).chunk(2, dim=-1)
        u, conv_state = causal_conv1d(
            x,
            *self._conv_parameters(),
            rows=rows,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.conv,
        )
        dt, dt_bias, B, C = self._scan_inputs(u, routing)
        y, ssm_state = selective_scan(
            u,
            dt,
            -torch.exp(self.A_log.float()),
            B,
            C,
            self.D,
            z,
            dt_bias,
            rows=rows,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.ssm,
        )
        return self._project("out_proj", y, routing), MambaState(conv_state, ssm_state)

    def _is_one_op(self, x: Tensor, routing: Routing | None) -> bool:
        """Whether nobody watches or has replaced a projection, and row boundaries are on the host."""
        if routing is not None and routing.host_offsets is None and x.device.type != "cpu":
            return False
        for name in PROJECTIONS:
            projection = getattr(self, name)
            several = isinstance(projection, ModalityLinear)
            if several and is_watched(projection):
                return False
            for child in projection if several else [projection]:
                if not is_plain_linear(child) or (name == "x_proj" and child.bias is not None):
                    return False
        return True

    def _mix_in_one_op(
        self, x: Tensor, routing: Routing | None, cu_seqlens: Tensor | None, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        def parameters(name: str) -> tuple[list[Tensor], list[Tensor]]:
            projection = getattr(self, name)
            children = projection.linears if isinstance(projection, ModalityLinear) else [projection]
            return [child.weight for child in children], [child.bias for child in children if child.bias is not None]

        x_weight, _ = parameters("x_proj")
        y, conv_state, ssm_state = mamba_block(
            x,
            *parameters("in_proj"),
            *self._conv_parameters(),
            x_weight,
            *parameters("dt_proj"),
            self.A_log,
            self.D,
            *parameters("out_proj"),
            rows=None if routing is None else routing.rows,
            offsets=None if routing is None else routing.offsets,
            host_offsets=None if routing is None else routing.host_offsets,
            cu_seqlens=cu_seqlens,
            conv_state=None if state is None else state.conv,
            ssm_state=None if state is None else state.ssm,
            lean=self.memory == "lean",
        )
        return y, MambaState(conv_state, ssm_state)

    def _conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def _scan_inputs(self, u: Tensor, routing: Routing | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """dt (without bias where possible), its bias for the scan to add in float32, B and C."""
        sizes = [self.dt_rank, self.d_state, self.d_state]
        dt_low, B, C = self._project("x_proj", u, routing).split(sizes, dim=-1)
        dt_proj = self.dt_proj
        if isinstance(dt_proj, ModalityLinear):
            assert routing is not None
            if not dt_proj.is_plain():
                return dt_proj(dt_low, routing), None, B, C
            weights = [child.weight for child in dt_proj.linears]
            dt = grouped_linear(dt_low, weights, None, routing.offsets, routing.host_offsets)
            return dt, torch.stack([child.bias for child in dt_proj.linears]), B, C
        if not is_plain_linear(dt_proj):
            return self._project("dt_proj", dt_low, routing), None, B, C
        return self._linear(dt_proj, dt_low, routing, bias=False), dt_proj.bias, B, C

    def _project(self, name: str, x: Tensor, routing: Routing | None) -> Tensor:
        projection = getattr(self, name)
        if isinstance(projection, ModalityLinear):
            assert routing is not None
            return projection(x, routing)
        if is_plain_linear(projection):
            return self._linear(projection, x, routing, bias=True)
        if routing is None or not routing.has_padding:
            return projection(x)
        return apply_per_modality([projection], x, routing.merged())

    @staticmethod
    def _linear(linear: nn.Linear, x: Tensor, routing: Routing | None, bias: bool) -> Tensor:
        """A shared projection: one GEMM over all rows, which must leave padding rows out when there are any."""
        use_bias = linear.bias if bias else None
        if routing is None or not routing.has_padding:
            return nn.functional.linear(x, linear.weight, use_bias)
        merged = routing.merged()
        biases = None if use_bias is None else [use_bias]
        return grouped_linear(x, [linear.weight], biases, merged.offsets, merged.host_offsets)

    def _routing(self, x: Tensor, modality: Tensor | Routing | None) -> Routing | None:
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape [batch, length, d_model = {self.d_model}], got {list(x.shape)}")
        if modality is None:
            if self.num_modalities > 1:
                raise ValueError(
                    f"modality must be ids [batch, length] or a Routing, since the layer has {self.num_modalities} "
                    "modalities, got None"
                )
            if self.decouple:
                modality = torch.zeros(x.shape[:2], dtype=torch.int64, device="cpu")
            else:
                return None
        if isinstance(modality, Tensor):
            ids = modality.clamp(max=0) if self.num_modalities == 1 else modality
            modality = Routing.from_ids(ids, self.num_modalities, device=x.device)
        if self.num_modalities == 1 and modality.num_modalities > 1:
            modality = modality.merged()
        if modality.num_modalities != self.num_modalities:
            raise ValueError(
                f"modality must be a Routing of {self.num_modalities} modalities, got {modality.num_modalities}"
            )
        if modality.shape != tuple(x.shape[:2]):
            raise ValueError(
                f"modality must have the batch and length of x, {list(x.shape[:2])}, got {list(modality.shape)}"
            )
        return modality


class Mamba(MixtureOfMamba):
    """The dense Mamba block: one modality, no projection decoupled; the same code as :class:`MixtureOfMamba`.

    Constructor, parameter names and forward are those of ``mamba_ssm.Mamba``. ``modality`` may be given to
    mark padding (-1); all other ids count as one modality.
    """

    def __init__(
        self,
        d_model: int,
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
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        memory: Literal["default", "lean"] = "default",
    ) -> None:
        del use_fast_path  # there is one path here; accepted because existing code passes it
        super().__init__(
            d_model=d_model,
            num_modalities=1,
            decouple=(),
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            dt_init_floor=dt_init_floor,
            conv_bias=conv_bias,
            bias=bias,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
