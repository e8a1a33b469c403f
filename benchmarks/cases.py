# SPDX-License-Identifier: Apache-2.0
"""What is measured: inputs, a correctness gate, and contenders, the first of which is this library's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import mixture_of_mamba as mom
from benchmarks import peers
from benchmarks.shapes import Case, Shape, placed, relative_error

__all__ = ["CASES"]


def _scan_inputs(shape: Shape) -> tuple[dict[str, Tensor], mom.Routing]:
    batch, length, channels, states = shape.batch, shape.length, shape.d_inner, shape.d_state
    xz = shape.randn(batch, length, 2 * channels)
    x_dbl = shape.randn(batch, length, shape.d_model // 16 + 2 * states)
    inputs = {
        "u": shape.randn(batch, length, channels),
        "dt": shape.randn(batch, length, channels, scale=0.5),
        "A": -torch.arange(1, states + 1, device=shape.device).float().expand(channels, -1).contiguous(),
        "B": x_dbl[..., -2 * states : -states],
        "C": x_dbl[..., -states:],
        "D": torch.ones(channels, device=shape.device),
        "z": xz[..., channels:],
        "dt_bias": torch.rand(shape.modalities, channels, device=shape.device) * 2 - 5,
    }
    return inputs, shape.routing()


def _with_grad(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in inputs.items()}


def torch_loop(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """A careful scan in torch: everything but the recurrence outside the loop, one step per token."""
    delta = F.softplus(dt + bias)
    decay = torch.exp(delta.unsqueeze(-1) * A)
    drive = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    state = torch.zeros_like(decay[:, 0])
    outs = []
    for decay_t, drive_t, C_t in zip(decay.unbind(1), drive.unbind(1), C.unbind(1), strict=True):
        state = decay_t * state + drive_t
        outs.append((state @ C_t.unsqueeze(-1)).squeeze(-1))
    return (torch.stack(outs, dim=1) + D * u) * F.silu(z)


def _scan_gate(inputs: dict[str, Tensor], routing: mom.Routing, shape: Shape) -> float:
    """Against float64 on the CPU, on a slice of channels, of the first sequence."""
    keep = min(8, shape.d_inner)
    out, _ = mom.selective_scan(**inputs, rows=routing.rows, offsets=routing.offsets)
    time_out = routing.unsort(out)[:1, :, :keep]
    ids = torch.bucketize(routing.rows.long(), routing.offsets[1:].long(), right=True).view(shape.batch, shape.length)
    first = {n: routing.unsort(inputs[n])[:1].cpu().double() for n in ("u", "dt", "B", "C", "z")}
    bias = inputs["dt_bias"].cpu().double()[ids[0].cpu()].unsqueeze(0)[..., :keep]
    reference = torch_loop(
        first["u"][..., :keep],
        first["dt"][..., :keep],
        inputs["A"].cpu().double()[:keep],
        first["B"],
        first["C"],
        inputs["D"].cpu().double()[:keep],
        first["z"][..., :keep],
        bias,
    )
    return relative_error(time_out.cpu(), reference)


def scan(shape: Shape, with_peers: bool) -> dict[str, Case]:
    """The selective scan alone, forward and forward + backward."""
    inputs, routing = _scan_inputs(shape)
    leaves = _with_grad(inputs)
    order = {"rows": routing.rows, "offsets": routing.offsets}
    grad = shape.randn(shape.batch, shape.length, shape.d_inner)

    def train() -> object:
        out, _ = mom.selective_scan(**leaves, **order)
        return torch.autograd.grad(out, list(leaves.values()), grad)

    forward: dict[str, Callable[[], object]] = {"ours": lambda: mom.selective_scan(**inputs, **order)}
    both: dict[str, Callable[[], object]] = {"ours": train}
    if shape.device == "cpu":
        names = ("u", "dt", "A", "B", "C", "D", "z")
        plain = [inputs[n] for n in names] + [inputs["dt_bias"][0]]
        loop_leaves = [t.detach().requires_grad_() for t in plain]
        forward["torch loop"] = lambda: torch_loop(*plain)
        both["torch loop"] = lambda: torch.autograd.grad(torch_loop(*loop_leaves), loop_leaves, grad)
    if with_peers:
        peers.add_scan(forward, both, inputs, grad)
    width = shape.randn(1).element_size()
    elements = shape.tokens * shape.d_inner
    tolerance = 1e-5 if shape.dtype == torch.float32 else 6e-3

    def gate() -> float:
        return _scan_gate(inputs, routing, shape)

    checkpoints = elements / 16 * shape.d_state * 4
    return {
        "scan forward": Case(_no_grad(forward), gate, tolerance, 4 * width * elements),
        "scan forward + backward": Case(both, gate, tolerance, 11 * width * elements + 2 * checkpoints),
    }


def _no_grad(contenders: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    return {name: torch.no_grad()(function) for name, function in contenders.items()}


def conv(shape: Shape, with_peers: bool) -> dict[str, Case]:
    """The causal convolution alone, on the x half of xz, through rows[]."""
    routing = shape.routing()
    xz = shape.randn(shape.batch, shape.length, 2 * shape.d_inner)
    x = xz[..., : shape.d_inner].detach().requires_grad_()
    weight = shape.randn(shape.d_inner, shape.d_conv, scale=0.5, dtype=torch.float32).requires_grad_()
    bias = torch.zeros(shape.d_inner, device=shape.device, requires_grad=True)
    order = {"rows": routing.rows, "offsets": routing.offsets}
    grad = shape.randn(shape.batch, shape.length, shape.d_inner)

    def forward() -> object:
        return mom.causal_conv1d(x, weight, bias, **order)

    def train() -> object:
        return torch.autograd.grad(mom.causal_conv1d(x, weight, bias, **order)[0], (x, weight, bias), grad)

    def gate() -> float:
        y = routing.unsort(mom.causal_conv1d(x, weight, bias, **order)[0].detach())
        time_x = routing.unsort(x.detach()).float().transpose(1, 2)
        padded = F.pad(time_x, (shape.d_conv - 1, 0))
        reference = F.silu(F.conv1d(padded, weight.detach().unsqueeze(1), groups=shape.d_inner)).transpose(1, 2)
        return relative_error(y, reference)

    contenders: dict[str, Callable[[], object]] = {"ours": forward}
    both: dict[str, Callable[[], object]] = {"ours": train}
    if with_peers:
        peers.add_conv(contenders, both, x, weight, bias, grad)
    width = x.element_size()
    elements = shape.tokens * shape.d_inner
    tolerance = 1e-5 if shape.dtype == torch.float32 else 6e-3
    return {
        "conv forward": Case(_no_grad(contenders), gate, tolerance, 2 * width * elements),
        "conv forward + backward": Case(both, gate, tolerance, 5 * width * elements),
    }


def _dense_projections(shape: Shape) -> Callable[[], object]:
    """The block's own four GEMMs, dense: the part that no Mamba block can avoid."""
    d, e, n, r = shape.d_model, shape.d_inner, shape.d_state, max(1, shape.d_model // 16)
    sizes = [(d, 2 * e), (e, r + 2 * n), (r, e), (e, d)]
    inputs = [shape.randn(shape.tokens, k).requires_grad_() for k, _ in sizes]
    weights = [shape.randn(m, k, scale=k**-0.5).requires_grad_() for k, m in sizes]
    grads = [shape.randn(shape.tokens, m) for _, m in sizes]

    def run() -> None:
        for x, weight, grad in zip(inputs, weights, grads, strict=True):
            torch.autograd.grad(F.linear(x, weight), (x, weight), grad)

    return run


def _block_gate(layer: mom.MixtureOfMamba, x: Tensor, routing: mom.Routing) -> float:
    """Against the same layer in float64 on the CPU, on the first 64 tokens of the first sequence."""
    length = min(64, x.shape[1])
    rows = routing.rows.view(routing.shape)[:1, :length]
    ids = torch.bucketize(rows.long(), routing.offsets[1:].long(), right=True).cpu()
    twin = mom.MixtureOfMamba(layer.d_model, layer.num_modalities, layer.decouple).double()
    twin.load_state_dict({name: value.cpu().double() for name, value in layer.state_dict().items()})
    with torch.no_grad():
        y = layer(x[:1, :length].contiguous(), mom.Routing.from_ids(ids, layer.num_modalities, device=x.device))
        reference = twin(x[:1, :length].cpu().double(), ids)
    return relative_error(y.cpu(), reference)


def block(shape: Shape, with_peers: bool) -> dict[str, Case]:
    """A whole Mixture-of-Mamba block, residual stream already sorted, against its dense projections."""
    x = shape.randn(shape.batch, shape.length, shape.d_model).requires_grad_()
    grad = shape.randn(shape.batch, shape.length, shape.d_model)
    routing = shape.routing()
    layer = mom.MixtureOfMamba(shape.d_model, shape.modalities, d_state=shape.d_state, d_conv=shape.d_conv)
    placed(layer, shape.device, shape.dtype)
    lean = copy.deepcopy(layer)
    lean.memory = "lean"
    dense = mom.Mamba(shape.d_model, d_state=shape.d_state, d_conv=shape.d_conv)
    placed(dense, shape.device, shape.dtype)

    def train(mixer: mom.MixtureOfMamba, modality: mom.Routing | None) -> Callable[[], object]:
        leaves = [x, *mixer.parameters()]
        return lambda: torch.autograd.grad(mixer(x, modality, sorted=True), leaves, grad)

    def forward(mixer: mom.MixtureOfMamba, modality: mom.Routing | None) -> Callable[[], object]:
        return torch.no_grad()(lambda: mixer(x, modality, sorted=True))

    name = f"ours, M={shape.modalities}"
    both = {name: train(layer, routing), f"{name}, lean": train(lean, routing), "ours, dense": train(dense, None)}
    contenders = {name: forward(layer, routing), "ours, dense": forward(dense, None)}
    both["four dense projections"] = _dense_projections(shape)
    if with_peers:
        peers.add_block(contenders, both, shape, x, grad, routing)
    d, e, n, r = shape.d_model, shape.d_inner, shape.d_state, max(1, shape.d_model // 16)
    flops = 2 * shape.tokens * (d * 2 * e + e * (r + 2 * n) + r * e + e * d)
    tolerance = 1e-5 if shape.dtype == torch.float32 else 2e-2

    def gate() -> float:
        return _block_gate(layer, x, routing)

    return {
        "block forward": Case(contenders, gate, tolerance, flops=flops),
        "block forward + backward": Case(both, gate, tolerance, flops=3 * flops),
    }


def step(shape: Shape, with_peers: bool) -> dict[str, Case]:
    """Decoding: one token of every sequence of the batch, states updated in place.

    The scan's state is float32 and, beside 16-bit activations, also in their dtype, in which ``mamba_ssm`` keeps it.
    """
    layers = {
        f"ours, M={shape.modalities}": mom.MixtureOfMamba(
            shape.d_model, shape.modalities, d_state=shape.d_state, d_conv=shape.d_conv
        ),
        "ours, dense": mom.Mamba(shape.d_model, d_state=shape.d_state, d_conv=shape.d_conv),
    }
    x = shape.randn(shape.batch, 1, shape.d_model)
    ids = torch.arange(shape.batch).unsqueeze(1) % shape.modalities
    routing = mom.Routing.from_ids(ids, shape.modalities, device=shape.device)
    ssm_dtypes = dict.fromkeys((torch.float32, shape.dtype))  # one or two
    for layer in layers.values():
        placed(layer, shape.device, shape.dtype)

    def bytes_with(layer: mom.MixtureOfMamba, ssm_dtype: torch.dtype) -> int:
        """Of the states, and of the weights of the modalities that have tokens."""
        states = shape.d_state * ssm_dtype.itemsize + (shape.d_conv - 1) * x.element_size()
        weights = sum(p.numel() * p.element_size() for p in layer.parameters())
        present = min(shape.batch, layer.num_modalities) / layer.num_modalities
        return 2 * shape.batch * shape.d_inner * states + round(weights * present)

    contenders: dict[str, Callable[[], object]] = {}
    bytes_of: dict[str, int] = {}
    for ssm_dtype in ssm_dtypes:
        suffix = "" if ssm_dtype == torch.float32 else f", {str(ssm_dtype).removeprefix('torch.')} state"
        for name, layer in layers.items():
            state = layer.allocate_state(shape.batch, ssm_dtype=ssm_dtype)
            modality = routing if layer.num_modalities > 1 else None
            contenders[name + suffix] = functools.partial(layer.step, x, state, modality)
            bytes_of[name + suffix] = bytes_with(layer, ssm_dtype)
    if with_peers:
        peers.add_step(contenders, shape, x)

    def gate() -> float:
        """Eight steps against one call over the eight tokens."""
        layer, tokens = next(iter(layers.values())), shape.randn(shape.batch, 8, shape.d_model)
        with torch.no_grad():
            whole = layer(tokens, mom.Routing.from_ids(ids.expand(-1, 8), shape.modalities, device=shape.device))

        def error(ssm_dtype: torch.dtype) -> float:
            state = layer.allocate_state(shape.batch, ssm_dtype=ssm_dtype)
            steps = [layer.step(tokens[:, t : t + 1], state, routing) for t in range(8)]
            return relative_error(torch.cat(steps, dim=1), whole)

        return max(map(error, ssm_dtypes))

    tolerance = 1e-5 if shape.dtype == torch.float32 else 1e-2
    return {
        "step": Case(
            contenders, gate, tolerance, bytes_moved=bytes_with(layers["ours, dense"], shape.dtype), bytes_of=bytes_of
        )
    }


CASES: dict[str, Callable[[Shape, bool], dict[str, Case]]] = {
    "scan": scan,
    "conv": conv,
    "block": block,
    "step": step,
}
