# SPDX-License-Identifier: Apache-2.0
"""What a block computes with its children: one operator while nobody watches them, else one step after the other.

Both give the same numbers. The second calls every projection that is not a plain ``nn.Linear`` as the module that it
is, so hooks, adapters, and weights that are tensors of another kind are reached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from mixture_of_mamba.nn.checks import check_conv_state, check_step_state
from mixture_of_mamba.nn.conv_parameters import conv_parameters
from mixture_of_mamba.nn.dt_limit import limited_dt
from mixture_of_mamba.nn.modality_linear import (
    ModalityLinear,
    apply_to_all,
    is_plain_linear,
    is_watched,
    linear_of_all,
    linear_per_modality,
    plain_parameters,
)
from mixture_of_mamba.nn.per_row import of_rows
from mixture_of_mamba.nn.scan_of_pairs import scan_of_pairs, scan_of_pairs_step
from mixture_of_mamba.nn.state import MambaState
from mixture_of_mamba.ops import (
    causal_conv1d,
    causal_conv1d_step,
    mamba_block,
    mamba_block_step,
    selective_scan,
    selective_scan_step,
)
from mixture_of_mamba.routing import Routing

if TYPE_CHECKING:
    from mixture_of_mamba.nn.mixture_of_mamba import MixtureOfMamba

__all__ = [
    "NORMS",
    "PROJECTIONS",
    "block_parameters",
    "decode",
    "mix",
    "project",
    "scan",
    "scan_inputs",
]

PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]  # dt, A, B, C, dt_bias


def mix(
    layer: MixtureOfMamba, x: Tensor, routing: Routing | None, cu_seqlens: Tensor | None, state: MambaState | None
) -> tuple[Tensor, MambaState]:
    """``x`` and ``y`` have rows in the routing's sorted order."""
    parameters = block_parameters(layer, x, routing)
    if parameters is None:
        return mix_step_by_step(layer, x, routing, cu_seqlens, state)
    y, conv_state, ssm_state = mamba_block(
        x,
        *parameters,
        **_order_of_block(routing),
        cu_seqlens=cu_seqlens,
        conv_state=None if state is None else state.conv,
        ssm_state=None if state is None else state.ssm,
        lean=layer.memory == "lean",
    )
    return y, MambaState(conv_state, ssm_state)


def block_parameters(layer: MixtureOfMamba, x: Tensor, routing: Routing | None) -> tuple[Any, ...] | None:
    """Those of ``mamba_block``, if nobody watches or has replaced a projection, nothing is between them, and, where
    boundaries are on a GPU alone, all are decoupled; else None, and the steps are taken one by one.
    """
    if layer.dt_limit is not None or any(getattr(layer, name) is not None for name in NORMS):
        return None
    A_log, D = layer.A_log, layer.D
    if A_log.dim() > 2 or D.dim() > 1:  # one per modality
        return None
    projections = [getattr(layer, name) for name in PROJECTIONS]
    plain = []
    for projection in projections:
        parameters = _plain_parameters(projection)
        if parameters is None:
            return None
        plain.append(parameters)
    if plain[1][1]:  # the operator has no biases of x_proj
        return None
    if (
        routing is not None
        and routing.host_offsets is None
        and x.device.type != "cpu"
        and any(len(weights) != routing.num_modalities for weights, _ in plain)
    ):
        return None
    in_proj, x_proj, dt_proj, out_proj = (
        (_with_shared(projection, weights), biases)
        for projection, (weights, biases) in zip(projections, plain, strict=True)
    )
    return *in_proj, *conv_parameters(layer), x_proj[0], *dt_proj, A_log, D, *out_proj


def _order(routing: Routing | None) -> dict[str, Any]:
    """Of the tokens, for a convolution or a scan."""
    return {} if routing is None else {"rows": routing.rows, "offsets": routing.offsets}


def _order_of_block(routing: Routing | None) -> dict[str, Any]:
    return {} if routing is None else {**_order(routing), "host_offsets": routing.host_offsets}


def mix_step_by_step(
    layer: MixtureOfMamba, x: Tensor, routing: Routing | None, cu_seqlens: Tensor | None, state: MambaState | None
) -> tuple[Tensor, MambaState]:
    x, z = project(layer.in_proj, x, routing).chunk(2, dim=-1)
    u, conv_state = causal_conv1d(
        x,
        *conv_parameters(layer),
        **_order(routing),
        cu_seqlens=cu_seqlens,
        initial_state=None if state is None else state.conv,
    )
    inputs = scan_inputs(layer, u, routing)
    y, ssm_state = scan(layer, u, z, inputs, routing, cu_seqlens, None if state is None else state.ssm)
    return project(layer.out_proj, y, routing), MambaState(conv_state, ssm_state)


def scan(
    layer: MixtureOfMamba,
    u: Tensor,
    z: Tensor,
    inputs: ScanInputs,
    routing: Routing | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None = None,
    *,
    skip: bool = True,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """From the convolution's output to ``out_proj``'s input, and the last state. ``skip``: with D."""
    dt, A, B, C, dt_bias = inputs
    if A.dim() > 2:
        assert routing is not None
        y, last = scan_of_pairs(
            u,
            dt,
            A,
            B,
            C,
            z,
            dt_bias,
            routing=routing,
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            reverse=reverse,
        )
    else:
        y, last = selective_scan(
            u,
            dt,
            A,
            B,
            C,
            _fused_skip(layer) if skip else None,
            z,
            dt_bias,
            **_order(routing),
            cu_seqlens=cu_seqlens,
            initial_state=initial_state,
            reverse=reverse,
        )
    return _with_skip(layer, y, u, z, routing) if skip else y.to(u.dtype), last


def decode(layer: MixtureOfMamba, x: Tensor, routing: Routing | None, state: MambaState) -> Tensor:
    """:func:`mix` of one or a few tokens that updates the state in place."""
    if not _is_autocast(x.device.type):
        parameters = block_parameters(layer, x, routing)
        if parameters is not None:
            check_conv_state(state, x.dtype)
            return mamba_block_step(x, state.conv, state.ssm, *parameters, **_order_of_block(routing))
    x, z = project(layer.in_proj, x, routing).chunk(2, dim=-1)
    check_conv_state(state, x.dtype)
    check_step_state(state, x.shape[0], layer.d_inner, layer.d_state)  # before the first part of it is written
    u = causal_conv1d_step(x, state.conv, *conv_parameters(layer), **_order(routing))
    return project(layer.out_proj, _scan_step(layer, u, z, routing, state.ssm), routing)


def _is_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _scan_step(layer: MixtureOfMamba, u: Tensor, z: Tensor, routing: Routing | None, state: Tensor) -> Tensor:
    """:func:`scan` that updates the state in place."""
    dt, A, B, C, dt_bias = scan_inputs(layer, u, routing)
    if A.dim() > 2:
        assert routing is not None
        y = scan_of_pairs_step(u, state, dt, A, B, C, z, dt_bias, routing=routing)
    else:
        y = selective_scan_step(u, state, dt, A, B, C, _fused_skip(layer), z, dt_bias, **_order(routing))
    return _with_skip(layer, y, u, z, routing)


def _decay_rates(layer: MixtureOfMamba) -> Tensor:
    """A, ``[d_inner, d_state]`` or one per modality, in float32 at least."""
    return -torch.exp(layer.A_log.to(torch.promote_types(layer.A_log.dtype, torch.float32)))


def _fused_skip(layer: MixtureOfMamba) -> Tensor | None:
    """What the scan adds by itself; nothing when every modality has its own D."""
    return layer.D if layer.D.dim() == 1 else None


def _with_skip(layer: MixtureOfMamba, y: Tensor, u: Tensor, z: Tensor, routing: Routing | None) -> Tensor:
    """The scan's output with ``D * u * silu(z)``, which the scan leaves out where D or A is per modality.

    The rest is gated already. This part is a few elementwise operators in float32 at least.
    """
    if layer.A_log.dim() == 2 and layer.D.dim() == 1:
        return y
    D = layer.D.to(torch.promote_types(layer.D.dtype, torch.float32))
    if D.dim() > 1:
        assert routing is not None
        D = of_rows(D, routing).view(u.shape)
    return (y + D * u * nn.functional.silu(z.to(D.dtype))).to(u.dtype)


def scan_inputs(layer: MixtureOfMamba, u: Tensor, routing: Routing | None) -> ScanInputs:
    """dt (without bias where possible), A, B and C, and dt's bias for the scan to add in float32."""
    sizes = [layer.dt_rank, layer.d_state, layer.d_state]
    parts = project(layer.x_proj, u, routing).split(sizes, dim=-1)
    dt_low, B, C = (_normalised(getattr(layer, name), part) for name, part in zip(NORMS, parts, strict=True))
    dt, dt_bias = _dt_and_bias(layer.dt_proj, dt_low, routing)
    if layer.dt_limit is not None:
        dt, dt_bias = limited_dt(dt, dt_bias, layer.dt_limit, routing), None
    return dt, _decay_rates(layer), B, C, dt_bias


def _normalised(norm: nn.Module | None, x: Tensor) -> Tensor:
    """Computed in the weight's dtype where that is wider, as under autocast; rounded, so as not to widen the scan."""
    if norm is None:
        return x
    weight = getattr(norm, "weight", None)
    wide = x if weight is None else x.to(torch.promote_types(x.dtype, weight.dtype))
    return cast(Tensor, norm(wide)).to(x.dtype)


def _dt_and_bias(
    dt_proj: nn.Linear | ModalityLinear, dt_low: Tensor, routing: Routing | None
) -> tuple[Tensor, Tensor | None]:
    if isinstance(dt_proj, ModalityLinear):
        parameters = _plain_parameters(dt_proj)
        if parameters is None:
            return dt_proj(dt_low, routing), None
        weights, biases = parameters
        dt = linear_per_modality(dt_low, dt_proj.with_shared(weights), [], routing)
        if not biases:
            return dt, None
        return dt, biases[0] if routing is None else torch.stack(biases)
    if not is_plain_linear(dt_proj):
        return apply_to_all(dt_proj, dt_low, routing), None
    return linear_of_all(dt_low, dt_proj.weight, None, routing), dt_proj.bias


def project(projection: nn.Module, x: Tensor, routing: Routing | None) -> Tensor:
    if isinstance(projection, ModalityLinear):
        return cast(Tensor, projection(x, routing))
    return apply_to_all(projection, x, routing)


def _plain_parameters(projection: nn.Module) -> tuple[list[Tensor], list[Tensor]] | None:
    """Weights, without a shared expert's, and biases of a projection that nobody watches or has replaced."""
    if isinstance(projection, ModalityLinear):
        return None if is_watched(projection) else projection.plain_parameters()
    parameters = plain_parameters(projection)
    if parameters is None:
        return None
    weight, bias = parameters
    return [weight], [] if bias is None else [bias]


def _with_shared(projection: nn.Module, weights: list[Tensor]) -> list[Tensor]:
    return projection.with_shared(weights) if isinstance(projection, ModalityLinear) else weights
