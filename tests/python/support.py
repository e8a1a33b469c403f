# SPDX-License-Identifier: Apache-2.0
"""Inputs for the operators, runs with all gradients, and comparison with the float64 truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import mixture_of_mamba as mom
from mixture_of_mamba import reference

__all__ = [
    "FLOATS",
    "PROJECTIONS",
    "Arguments",
    "Results",
    "assert_bitwise_equal",
    "assert_matches",
    "block_arguments",
    "conv_arguments",
    "cotangent",
    "ids_with",
    "linear_arguments",
    "lower",
    "operator_arguments",
    "randn",
    "run",
    "scan_arguments",
    "strided",
    "token_order",
    "truth",
]

Arguments = dict[str, Any]
Results = dict[str, Tensor]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PROJECTIONS = ("in", "x", "dt", "out")
STRIDES = ("contiguous", "half", "transposed", "expanded", "skipping")
ORDERS = ("time", "rows", "rows_offsets", "offsets")

# What arithmetic loses inside an operator before a result is rounded to its own dtype: relative to the largest value
# of a tensor, and to its norm. With 16-bit activations the GPU's scan and SiLU use approximate units throughout.
ARITHMETIC_ERROR = {("cpu", "wide"): 4e-6, ("cpu", "16 bit"): 4e-6, ("cuda", "wide"): 4e-5, ("cuda", "16 bit"): 4e-3}
DOUBLE_ERROR = 1e-12
OUTPUTS = {
    "selective_scan": ("out", "final_state"),
    "causal_conv1d": ("y", "final_state"),
    "grouped_linear": ("y",),
    "mamba_block": ("y", "new_conv_state", "new_ssm_state"),
    "permute_rows": ("out",),
}


def randn(*sizes: int, dtype: torch.dtype = torch.float32, device: Any = "cpu", scale: float = 1.0) -> Tensor:
    """Drawn on the CPU in float64, so that every device and dtype sees the same numbers."""
    return (torch.randn(*sizes, dtype=torch.float64) * scale).to(dtype).to(device)


def strided(x: Tensor, strides: str) -> Tensor:
    """The values of ``x [batch, length, channels]`` behind other strides."""
    batch, length, channels = x.shape
    if strides == "half":  # one half of a projection's output, as x and z are
        return torch.cat((torch.zeros_like(x), x), dim=-1)[..., channels:]
    if strides == "transposed":  # channel-first
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "expanded":  # one sequence seen `batch` times, stride 0
        return x[:1].expand(batch, length, channels)
    if strides == "skipping":  # every other token; sequences are an odd number of rows apart
        wide = torch.zeros(batch, 2 * length + 1, channels, dtype=x.dtype, device=x.device)
        wide[:, 1::2][:, :length] = x
        return wide[:, 1::2][:, :length]
    return x


def ids_with(batch: int, length: int, modalities: int, padding: bool = False) -> Tensor:
    """Random modality ids; the last modality stays empty when there are more than two."""
    used = modalities - 1 if modalities > 2 else modalities
    return torch.randint(-1 if padding else 0, used, (batch, length))


def token_order(
    order: str, batch: int, length: int, modalities: int, padding: bool, packed: bool, device: Any = "cpu"
) -> Arguments:
    """``rows``, ``offsets`` and ``cu_seqlens``. Packing cuts the batch anywhere, with an empty sequence."""
    tokens = batch * length
    rows, _, offsets = mom.modality_routing(ids_with(batch, length, modalities, padding), modalities)
    cu_seqlens = None
    if packed:
        cuts = torch.randint(0, tokens + 1, (3,)).sort().values
        cu_seqlens = torch.tensor([0, *cuts.tolist(), cuts[-1].item(), tokens], dtype=torch.int32).to(device)
    return {
        "rows": rows.to(device) if "rows" in order else None,
        "offsets": offsets.to(device) if "offsets" in order else None,
        "cu_seqlens": cu_seqlens,
    }


def _sequences(batch: int, order: Arguments) -> int:
    return batch if order["cu_seqlens"] is None else len(order["cu_seqlens"]) - 1


def scan_arguments(
    batch: int = 2,
    length: int = 37,
    channels: int = 12,
    states: int = 4,
    *,
    modalities: int = 2,
    order: str = "rows_offsets",
    padding: bool = True,
    packed: bool = False,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    dt_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    D: bool = True,
    z: bool = True,
    dt_bias: str | None = "modality",
    initial_state: bool = True,
    softplus: bool = True,
    reverse: bool = False,
    device: Any = "cpu",
) -> Arguments:
    """Arguments of ``selective_scan``; B and C are views into one tensor, as slices of a projection are."""
    where = token_order(order, batch, length, modalities, padding, packed, device)
    wide = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    per_modality = dt_bias == "modality" and where["offsets"] is not None

    def activation(scale: float = 1.0, shift: float = 0.0, kind: torch.dtype = dtype) -> Tensor:
        return strided(randn(batch, length, channels, dtype=kind, device=device, scale=scale) + shift, strides)

    def parameter(*sizes: int) -> Tensor:
        return randn(*sizes, dtype=wide, device=device)

    projected = randn(batch, length, 3 + 2 * states, dtype=dtype, device=device)
    _, B, C = projected.split([3, states, states], dim=-1)
    dt = activation(0.7, -1.0, dt_dtype or dtype)
    bias = parameter(modalities, channels) if per_modality else parameter(channels)
    bias = bias * 0.5 if softplus else bias.abs()  # without softplus a negative step would make the state grow
    return {
        "u": activation(),
        "dt": dt if softplus else dt.abs(),
        "A": -torch.exp(parameter(channels, states) * 0.7),
        "B": B,
        "C": C,
        "D": parameter(channels) if D else None,
        "z": activation() if z else None,
        "dt_bias": None if dt_bias is None else bias,
        **where,
        "initial_state": parameter(_sequences(batch, where), channels, states) if initial_state else None,
        "softplus": softplus,
        "reverse": reverse,
    }


def conv_arguments(
    batch: int = 2,
    length: int = 37,
    channels: int = 12,
    width: int = 4,
    *,
    modalities: int = 2,
    order: str = "rows_offsets",
    padding: bool = True,
    packed: bool = False,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    parameter_dtype: torch.dtype | None = None,
    bias: bool = True,
    initial_state: bool = True,
    silu: bool = True,
    device: Any = "cpu",
) -> Arguments:
    where = token_order(order, batch, length, modalities, padding, packed, device)
    wide = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    state_shape = (_sequences(batch, where), width - 1, channels)
    return {
        "x": strided(randn(batch, length, channels, dtype=dtype, device=device), strides),
        "weight": randn(channels, width, dtype=wide, device=device, scale=0.5),
        "bias": randn(channels, dtype=wide, device=device) if bias else None,
        **where,
        "initial_state": randn(*state_shape, dtype=dtype, device=device) if initial_state else None,
        "silu": silu,
    }


def linear_arguments(
    batch: int = 2,
    length: int = 37,
    in_features: int = 12,
    out_features: int = 7,
    *,
    modalities: int = 2,
    padding: bool = True,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    host: bool = True,
    device: Any = "cpu",
) -> Arguments:
    offsets = mom.modality_routing(ids_with(batch, length, modalities, padding), modalities)[2]

    def matrices(*sizes: int) -> list[Tensor]:
        return [randn(*sizes, dtype=dtype, device=device, scale=0.3) for _ in range(modalities)]

    return {
        "x": strided(randn(batch, length, in_features, dtype=dtype, device=device), strides),
        "weight": matrices(out_features, in_features),
        "bias": matrices(out_features) if bias else None,
        "offsets": offsets.to(device),
        "host_offsets": offsets.long() if host else None,
    }


def block_arguments(
    batch: int = 2,
    length: int = 37,
    width: int = 10,
    inner: int = 12,
    states: int = 4,
    rank: int = 3,
    taps: int = 4,
    *,
    modalities: int = 2,
    several: Sequence[str] = PROJECTIONS,
    order: str = "rows_offsets",
    padding: bool = True,
    packed: bool = False,
    strides: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    in_bias: bool = True,
    conv_bias: bool = True,
    dt_bias: bool = True,
    out_bias: bool = True,
    initial_state: bool = True,
    host: bool = True,
    lean: bool = False,
    device: Any = "cpu",
) -> Arguments:
    """Arguments of ``mamba_block``; the projections among ``several`` have a matrix per modality, others one for all.

    Matrices are scaled so that activations stay near 1, as a trained block's do.
    """
    where = token_order(order, batch, length, modalities, padding, packed, device)
    wide = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)

    def of(projection: str, *sizes: int, scale: float = 1.0, shift: float = 0.0) -> list[Tensor]:
        count = modalities if projection in several and where["offsets"] is not None else 1
        kind = wide if shift else weight_dtype or dtype
        return [randn(*sizes, dtype=kind, device=device, scale=scale) + shift for _ in range(count)]

    def matrices(projection: str, out_features: int, in_features: int) -> list[Tensor]:
        return of(projection, out_features, in_features, scale=max(in_features, 1) ** -0.5)

    conv_shape = (_sequences(batch, where), taps - 1, inner)
    ssm_shape = (_sequences(batch, where), inner, states)
    return {
        "x": strided(randn(batch, length, width, dtype=dtype, device=device), strides),
        "in_weight": matrices("in", 2 * inner, width),
        "in_bias": of("in", 2 * inner, scale=0.5) if in_bias else [],
        "conv_weight": randn(inner, taps, dtype=wide, device=device, scale=0.5),
        "conv_bias": randn(inner, dtype=wide, device=device, scale=0.5) if conv_bias else None,
        "x_weight": matrices("x", rank + 2 * states, inner),
        "dt_weight": matrices("dt", inner, rank),
        "dt_bias": of("dt", inner, scale=0.5, shift=-1.0) if dt_bias else [],
        "A_log": randn(inner, states, dtype=wide, device=device, scale=0.7),
        "D": randn(inner, dtype=wide, device=device),
        "out_weight": matrices("out", width, inner),
        "out_bias": of("out", width, scale=0.5) if out_bias else [],
        **where,
        "host_offsets": where["offsets"].cpu().long() if host and where["offsets"] is not None else None,
        "conv_state": randn(*conv_shape, dtype=dtype, device=device) if initial_state else None,
        "ssm_state": randn(*ssm_shape, dtype=wide, device=device) if initial_state else None,
        "lean": lean,
    }


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cotangent(output: Tensor) -> Tensor:
    """Some gradient of an output: fixed numbers that every dtype holds exactly."""
    eighths = torch.arange(output.numel()) * 37 % 17 - 8
    return (eighths / 8).reshape(output.shape).to(output.device, output.dtype)


def run(function: Callable[..., Any], arguments: Arguments, *, backward: bool = True) -> Results:
    """Outputs by name and, as ``grad_<argument>``, the gradients of all floating arguments."""
    leaves: Results = {}

    def leaf(name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [leaf(f"{name}[{i}]", element) for i, element in enumerate(value)]
        if not is_differentiable(value):
            return value
        leaves[name] = value.detach().requires_grad_(backward)
        return leaves[name]

    outputs = function(**{name: leaf(name, value) for name, value in arguments.items()})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(OUTPUTS[function.__name__], outputs, strict=True))
    if backward:
        used = [output for output in outputs if output.requires_grad]
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if used:
            seeds = [cotangent(output) for output in used]
            gradients = torch.autograd.grad(used, list(leaves.values()), seeds, allow_unused=True)
        for (name, value), gradient in zip(leaves.items(), gradients, strict=True):
            results[f"grad_{name}"] = torch.zeros_like(value) if gradient is None else gradient
    return {name: value.detach() for name, value in results.items()}


def lower(value: Any, dtype: torch.dtype, device: Any = "cpu") -> Any:
    """``value`` with every floating tensor in ``dtype``, on ``device`` (but host_offsets, whose place is the host)."""
    if isinstance(value, dict):
        return {k: lower(element, dtype, "cpu" if k == "host_offsets" else device) for k, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [lower(element, dtype, device) for element in value]
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, dtype) if value.is_floating_point() else value.to(device)


def truth(name: str, arguments: Arguments, *, backward: bool = True) -> Results:
    """What the definition of operator ``name`` gives in float64 on the CPU, for the same (rounded) inputs."""
    return run(getattr(reference, name), lower(arguments, torch.float64), backward=backward)


def assert_matches(actual: Results, expected: Results, *, arithmetic: float | None = None, roundings: int = 1) -> None:
    """Every element, and every tensor's norm, within what its dtype and the arithmetic lose; all contiguous.

    The error of arithmetic is relative to a tensor's largest value, or to 1, the size of the inputs, where sums cancel.
    ``roundings`` counts how often a result is rounded to its own dtype (a GEMM and its bias: twice).
    """
    assert actual.keys() == expected.keys()
    low = any(value.element_size() == 2 for value in actual.values())
    for name, value in actual.items():
        wanted = expected[name].to("cpu", torch.float64)
        assert value.shape == wanted.shape, f"{name}: shape {list(value.shape)}, expected {list(wanted.shape)}"
        assert value.is_contiguous(), f"{name}: not contiguous, strides {value.stride()}"
        if value.numel() == 0:
            continue
        info = torch.finfo(value.dtype)
        inside = DOUBLE_ERROR
        if value.dtype != torch.float64:
            usual = ARITHMETIC_ERROR[value.device.type, "16 bit" if low else "wide"]
            inside = usual if arithmetic is None else max(arithmetic, usual)
        scale = wanted.abs().max().clamp(min=1)
        rounded = wanted.abs() if roundings == 1 else wanted.abs() + (roundings - 1) * scale
        bound = 0.51 * info.eps * rounded + inside * scale
        error = (value.to("cpu", torch.float64) - wanted).abs()
        worst = torch.nan_to_num(error / bound, nan=float("inf")).flatten().argmax()
        position = [int(i) for i in torch.unravel_index(worst, value.shape)]
        assert bool((error <= bound).all()), (
            f"{name}{position}: got {value.flatten()[worst].item():.9g}, "
            f"expected {wanted.flatten()[worst].item():.9g}, "
            f"error {error.flatten()[worst].item():.3g} over the bound {bound.flatten()[worst].item():.3g} "
            f"({int((~(error <= bound)).sum())} of {value.numel()} elements are)"
        )
        norm = wanted.norm().clamp(min=wanted.numel() ** 0.5)
        lost = float(error.norm() / norm)
        allowed = roundings * 0.5 * info.eps + inside
        assert lost <= allowed, f"{name}: relative error of the norm {lost:.3g}, allowed {allowed:.3g}"


def assert_bitwise_equal(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), f"{name} differs"


def operator_arguments(name: str, arguments: Arguments, **more: Any) -> tuple[Any, ...]:
    """Positional arguments of ``torch.ops.mixture_of_mamba.<name>.default``, from its schema."""
    given = {**arguments, **more}
    if name.startswith("grouped_linear") and given.get("bias") is None:
        given["bias"] = []
    schema = getattr(torch.ops.mixture_of_mamba, name).default._schema
    return tuple(given.get(argument.name) for argument in schema.arguments)
