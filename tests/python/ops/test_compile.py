# SPDX-License-Identifier: Apache-2.0
"""torch.compile in one graph for every length and mix, and torch.export."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import (
    Arguments,
    Results,
    assert_matches,
    block_arguments,
    conv_arguments,
    linear_arguments,
    randn,
    run,
    scan_arguments,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import mixture_of_mamba as mom

CHANNELS, STATES, MODALITIES = 10, 7, 2
# The compiler takes sizes that are equal at first to be equal always, so the first are all different.
SIZES = [(9, 13), (3, 33), (5, 16), (2, 40), (7, 5)]
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scan(batch, length, **options) -> Arguments:
    return scan_arguments(batch, length, CHANNELS, STATES, modalities=MODALITIES, **options)


def scan_with_a_narrow_state(batch, length, **options) -> Arguments:
    arguments = scan(batch, length, dtype=torch.bfloat16, **options)
    return {**arguments, "initial_state": arguments["initial_state"].bfloat16()}


def conv(batch, length, **options) -> Arguments:
    return conv_arguments(batch, length, CHANNELS, modalities=MODALITIES, **options)


def linear(batch, length, **options) -> Arguments:
    return linear_arguments(batch, length, CHANNELS, 4, modalities=MODALITIES, **options)


def mamba(batch, length, **options) -> Arguments:
    return block_arguments(batch, length, CHANNELS, 14, STATES, 3, modalities=MODALITIES, **options)


CASES = {
    "scan": (mom.selective_scan, scan, {}),
    "scan, packed": (mom.selective_scan, scan, {"packed": True}),
    "scan, bare": (mom.selective_scan, scan, {"D": False, "z": False, "dt_bias": None, "initial_state": False}),
    "scan, half precision": (mom.selective_scan, scan, {"dtype": torch.bfloat16}),
    "conv": (mom.causal_conv1d, conv, {}),
    "conv, packed": (mom.causal_conv1d, conv, {"packed": True}),
    "block": (mom.mamba_block, mamba, {}),
    "block, packed, lean": (mom.mamba_block, mamba, {"packed": True, "lean": True}),
    "block, dense, bare": (
        mom.mamba_block,
        mamba,
        {"several": (), "in_bias": False, "conv_bias": False, "initial_state": False, "order": "time"},
    ),
    "block, half precision": (mom.mamba_block, mamba, {"dtype": torch.bfloat16}),
    "linear, host offsets": (mom.grouped_linear, linear, {}),
    "linear, device offsets": (mom.grouped_linear, linear, {"host": False}),
}


def named(compiled, function):
    def call(**arguments):
        return compiled(**arguments)

    call.__name__ = function.__name__
    return call


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_graph_for_every_length_and_mix(device, case, training):
    function, make, options = case
    counter = CompileCounterWithBackend("aot_eager")
    compiled = named(torch.compile(function, backend=counter, fullgraph=True, dynamic=True), function)
    for batch, length in SIZES:
        arguments = make(batch, length, device=device, **options)
        expected = run(function, arguments, backward=training)
        assert_matches(run(compiled, arguments, backward=training), expected, arithmetic=CLOSE, roundings=2)
    assert counter.frame_count == 1


def layer(
    x: Tensor, ids: Tensor, in_weight: list[Tensor], conv_weight: Tensor, A: Tensor, out_weight: list[Tensor]
) -> Tensor:
    """Every operator once, in the order of a layer."""
    rows, order, offsets = mom.modality_routing(ids, MODALITIES)
    host_offsets = offsets.to(torch.int64) if ids.device.type == "cpu" else None
    x = mom.permute_rows(x, order, rows)
    u, z = mom.grouped_linear(x, in_weight, None, offsets, host_offsets).chunk(2, dim=-1)
    u, _ = mom.causal_conv1d(u, conv_weight, rows=rows, offsets=offsets)
    B, C = u[..., :STATES], u[..., STATES : 2 * STATES]
    y, _ = mom.selective_scan(u, u * 0.1, A, B, C, z=z, rows=rows, offsets=offsets)
    return mom.permute_rows(mom.grouped_linear(y, out_weight, None, offsets, host_offsets), rows, order)


def layer_arguments(batch: int, length: int, device: torch.device) -> tuple:
    def parameters(*sizes: int) -> list[Tensor]:
        return [randn(*sizes, device=device, scale=0.4).requires_grad_() for _ in range(MODALITIES)]

    return (
        randn(batch, length, CHANNELS, device=device),
        torch.randint(-1, MODALITIES, (batch, length)).to(device),
        parameters(4 * CHANNELS, CHANNELS),
        randn(2 * CHANNELS, 4, device=device).requires_grad_(),
        (-randn(2 * CHANNELS, STATES, device=device).exp()).requires_grad_(),
        parameters(CHANNELS, 2 * CHANNELS),
    )


def gradients(function, arguments: tuple) -> Results:
    x, _, in_weight, conv_weight, A, out_weight = arguments
    x = arguments[0].detach().requires_grad_()
    y = function(x, *arguments[1:])
    leaves = [x, *in_weight, conv_weight, A, *out_weight]
    values = torch.autograd.grad(y.square().sum(), leaves)
    return {"y": y.detach(), **{str(i): value for i, value in enumerate(values)}}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layer_is_one_graph(device, backend):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    first = layer_arguments(*SIZES[0], device)
    for batch, length in SIZES[:3]:
        arguments = (*layer_arguments(batch, length, device)[:2], *first[2:])
        assert_matches(gradients(compiled, arguments), gradients(layer, arguments), arithmetic=1e-4)
    assert counter.frame_count == 1


def test_lengths_marked_dynamic_stay_dynamic(device):
    """mark_dynamic raises when a fake tensor rule specialises the size."""
    compiled = torch.compile(mom.selective_scan, backend="aot_eager", fullgraph=True)
    for batch, length in SIZES[:2]:
        arguments = scan(batch, length, device=device)
        for name in ("u", "dt", "B", "C", "z"):
            torch._dynamo.mark_dynamic(arguments[name], 0)
            torch._dynamo.mark_dynamic(arguments[name], 1)
        assert_matches(
            run(named(compiled, mom.selective_scan), arguments, backward=False),
            run(mom.selective_scan, arguments, backward=False),
            arithmetic=CLOSE,
        )


def test_frozen_block_in_one_graph(device):
    """Gradients that are not asked for are empty in the graph as they are outside."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mom.mamba_block, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in SIZES[:3]:
        arguments = mamba(batch, length, device=device)
        leaves = [arguments["x"], arguments["in_weight"][1], *arguments["dt_bias"], arguments["A_log"]]
        for leaf in leaves:
            leaf.requires_grad_()
        got, expected = (
            torch.autograd.grad(function(**arguments)[0].square().sum(), leaves)
            for function in (compiled, mom.mamba_block)
        )
        for value, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(value, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("make", [scan, scan_with_a_narrow_state, conv])
def test_steps_compile_and_update_the_state(device, make):
    function = mom.causal_conv1d_step if make is conv else mom.selective_scan_step
    names = {"cu_seqlens", "initial_state", "reverse"}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for batch, length in [(9, 13), (4, 5), (3, 2)]:
        arguments = make(batch, length, device=device)
        state, other_state = arguments["initial_state"].clone(), arguments["initial_state"].clone()
        given = {name: value for name, value in arguments.items() if name not in names}
        with torch.no_grad():
            out, other_out = compiled(state=state, **given), function(state=other_state, **given)
        assert torch.equal(out, other_out)
        assert torch.equal(state, other_state)
        assert not torch.equal(state, arguments["initial_state"])
    assert counter.frame_count == 1


class Layer(nn.Module):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        _, _, in_weight, conv_weight, A, out_weight = layer_arguments(1, 1, device)
        self.in_weight = nn.ParameterList([w.detach() for w in in_weight])
        self.out_weight = nn.ParameterList([w.detach() for w in out_weight])
        self.conv_weight = nn.Parameter(conv_weight.detach())
        self.A = nn.Parameter(A.detach())

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return layer(x, ids, list(self.in_weight), self.conv_weight, self.A, list(self.out_weight))


class PlainBlock(nn.Module):
    """The block as one operator, with its arguments as parameters."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.names = []
        for name, value in mamba(1, 1, device=device, initial_state=False).items():
            values = value if isinstance(value, list) else [value]
            if name != "x" and torch.is_tensor(values[0]) and values[0].is_floating_point():
                self.names.append(name)
                setattr(self, name, nn.ParameterList(values) if isinstance(value, list) else nn.Parameter(value))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        rows, order, offsets = mom.modality_routing(ids, MODALITIES)
        given = {name: getattr(self, name) for name in self.names}
        given = {name: list(v) if isinstance(v, nn.ParameterList) else v for name, v in given.items()}
        host_offsets = offsets.to("cpu", torch.int64)
        sorted_x = mom.permute_rows(x, order, rows)
        y, *_ = mom.mamba_block(sorted_x, rows=rows, offsets=offsets, host_offsets=host_offsets, **given)
        return mom.permute_rows(y, rows, order)


@pytest.mark.parametrize("training", [True, False])
def test_export_of_a_plain_block(device, training):
    module = PlainBlock(device)
    x, ids = layer_arguments(2, 9, device)[:2]
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    with torch.set_grad_enabled(training):
        program = torch.export.export(module, (x, ids), dynamic_shapes=(sizes, sizes))
    assert "mixture_of_mamba.mamba_block.default" in {str(node.target) for node in program.graph.nodes}
    for batch, length in [(2, 9), (1, 33), (5, 2)]:
        x, ids = layer_arguments(batch, length, device)[:2]
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x, ids), module(x, ids))


@pytest.mark.parametrize("training", [True, False])
def test_export_with_dynamic_sizes(device, training):
    module = Layer(device)
    x, ids = layer_arguments(2, 9, device)[:2]
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    with torch.set_grad_enabled(training):
        program = torch.export.export(module, (x, ids), dynamic_shapes=(sizes, sizes))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"mixture_of_mamba.selective_scan.default", "mixture_of_mamba.grouped_linear.default"} <= targets
    for batch, length in [(2, 9), (1, 33), (5, 2)]:
        x, ids = layer_arguments(batch, length, device)[:2]
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x, ids), module(x, ids))


def test_exported_program_survives_a_file(device, tmp_path):
    module = Layer(device)
    x, ids = layer_arguments(2, 9, device)[:2]
    program = torch.export.export(module, (x, ids))
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2")
    torch.testing.assert_close(loaded.module()(x, ids), module(x, ids))
