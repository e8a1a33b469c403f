# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show: no host synchronisation, refusals of devices, sizes beyond 2^31, CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import (
    assert_bitwise_equal,
    block_arguments,
    conv_arguments,
    cotangent,
    linear_arguments,
    randn,
    run,
    scan_arguments,
)

import mixture_of_mamba as mom

pytestmark = pytest.mark.cuda

CASES = {
    "scan": (mom.selective_scan, scan_arguments, {}),
    "scan, packed": (mom.selective_scan, scan_arguments, {"packed": True}),
    "scan, half precision": (mom.selective_scan, scan_arguments, {"dtype": torch.bfloat16}),
    "conv": (mom.causal_conv1d, conv_arguments, {}),
    "conv, packed": (mom.causal_conv1d, conv_arguments, {"packed": True}),
    "block, host offsets": (mom.mamba_block, block_arguments, {}),
    "block, host offsets, packed, lean": (mom.mamba_block, block_arguments, {"packed": True, "lean": True}),
    "block, host offsets, half precision": (mom.mamba_block, block_arguments, {"dtype": torch.bfloat16}),
    "block, device offsets": (mom.mamba_block, block_arguments, {"host": False}),
    "block, device offsets, packed, lean": (
        mom.mamba_block,
        block_arguments,
        {"host": False, "packed": True, "lean": True},
    ),
    "block, device offsets, half": (
        mom.mamba_block,
        block_arguments,
        {"host": False, "dtype": torch.bfloat16, "width": 16, "inner": 32, "rank": 8},
    ),
    "block, no offsets": (mom.mamba_block, block_arguments, {"order": "time"}),
    "linear, host offsets": (mom.grouped_linear, linear_arguments, {}),
    "linear, device offsets": (mom.grouped_linear, linear_arguments, {"host": False}),
    "linear, device offsets, half": (
        mom.grouped_linear,
        linear_arguments,
        {"host": False, "dtype": torch.bfloat16, "in_features": 32, "out_features": 16},
    ),
}


@pytest.fixture
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def leaves_of(arguments):
    flat = []
    for value in arguments.values():
        flat += value if isinstance(value, list) else [value]
    return [t.requires_grad_() for t in flat if torch.is_tensor(t) and t.is_floating_point()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_op_waits_for_the_device(case):
    function, make, options = case
    arguments = make(device="cuda", **options)
    leaves = leaves_of(arguments)
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [cotangent(output) for output in outputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, leaves, seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("synchronisation_is_an_error")
def test_routing_waits_for_nothing():
    ids = torch.zeros(4, 100, dtype=torch.int64, device="cuda")
    rows, order, _ = mom.modality_routing(ids, 3)
    mom.permute_rows(torch.zeros(4, 100, 8, device="cuda"), order, rows)


@pytest.mark.parametrize("case", [name for name in CASES if "host" not in name])
def test_cuda_graph_replays_with_another_mix(case):
    """Captured forward and backward, replayed with other tokens, modalities and packing."""
    function, make, options = CASES[case]
    options = {**options, "device": "cuda"}
    first, second = make(**options), make(**options)
    expected = run(function, second)

    def step():
        return run(function, first)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        seeds_made = step()
    torch.cuda.current_stream().wait_stream(stream)
    del seeds_made

    leaves = {k: v for k, v in first.items() if torch.is_tensor(v) and v.is_floating_point()}
    lists = {k: v for k, v in first.items() if isinstance(v, list)}
    flat = [*leaves.values(), *(t for tensors in lists.values() for t in tensors)]
    for tensor in flat:
        tensor.requires_grad_()
    with torch.no_grad():  # a history would tie the leaves' gradients to the stream outside of the capture
        outputs = function(**first)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [cotangent(output) for output in outputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(**first)
        captured = captured if isinstance(captured, tuple) else (captured,)
        gradients = torch.autograd.grad(captured, flat, seeds)
    with torch.no_grad():
        for name, value in first.items():
            pairs = zip(value, second[name], strict=True) if isinstance(value, list) else [(value, second[name])]
            for target, source in pairs:
                if torch.is_tensor(target):
                    target.copy_(source)
    graph.replay()
    names = [name for name in expected if not name.startswith("grad_")]
    assert_bitwise_equal(dict(zip(names, (x.detach() for x in captured), strict=True)), {n: expected[n] for n in names})
    gradient_names = [*leaves, *(f"{k}[{i}]" for k, tensors in lists.items() for i in range(len(tensors)))]
    for name, gradient in zip(gradient_names, gradients, strict=True):
        assert torch.equal(gradient, expected[f"grad_{name}"]), name


def test_float64_is_refused():
    for function, make in ((mom.selective_scan, scan_arguments), (mom.causal_conv1d, conv_arguments)):
        arguments = make(dtype=torch.float64, device="cuda")
        message = rf"{function.__name__}: .*float64 is supported on the CPU only.*got a tensor on cuda:0"
        with pytest.raises(RuntimeError, match=message):
            function(**arguments)
    with pytest.raises(RuntimeError, match=r"grouped_linear: .*float64 is supported on the CPU only"):
        mom.grouped_linear(**linear_arguments(dtype=torch.float64, device="cuda"))
    with pytest.raises(RuntimeError, match=r"mamba_block: float64 is supported on the CPU only"):
        mom.mamba_block(**block_arguments(dtype=torch.float64, device="cuda"))


ELSEWHERE = {
    "selective_scan": (
        mom.selective_scan,
        lambda: scan_arguments(packed=True, device="cuda"),
        "u",
        ("dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"),
    ),
    "causal_conv1d": (
        mom.causal_conv1d,
        lambda: conv_arguments(packed=True, device="cuda"),
        "x",
        ("weight", "bias", "initial_state"),
    ),
    "mamba_block": (
        mom.mamba_block,
        lambda: block_arguments(packed=True, device="cuda"),
        "x",
        ("conv_weight", "conv_bias", "A_log", "D", "conv_state", "ssm_state"),
    ),
}


@pytest.mark.parametrize("case", ELSEWHERE.values(), ids=ELSEWHERE)
def test_other_devices_are_refused(case):
    function, make, anchor, names = case
    for name in names:
        arguments = make()
        arguments[name] = arguments[name].cpu()
        message = rf"{function.__name__}: {name} must be on the device of {anchor} \(cuda:0\), got cpu"
        with pytest.raises(RuntimeError, match=message):
            function(**arguments)
    for name in ("rows", "offsets", "cu_seqlens"):
        arguments = make()
        arguments[name] = arguments[name].cpu()
        message = rf"{function.__name__}: {name} must be on the device of the activations \(cuda:0\), got cpu"
        with pytest.raises(RuntimeError, match=message):
            function(**arguments)


def test_the_block_wants_matrices_on_the_device_and_host_offsets_on_the_host():
    arguments = block_arguments(device="cuda")
    for name in ("in_weight", "in_bias", "x_weight", "dt_weight", "dt_bias", "out_weight", "out_bias"):
        changed = {**arguments, name: [arguments[name][0], arguments[name][1].cpu()]}
        with pytest.raises(RuntimeError, match=rf"{name}\[1\] must be on the device of x \(cuda:0\), got cpu"):
            mom.mamba_block(**changed)
    shared = {**arguments, "host_offsets": None, "x_weight": arguments["x_weight"][:1]}
    message = r"x_weight must hold num_modalities = 2 tensors where host_offsets are not given, got 1"
    with pytest.raises(RuntimeError, match=message):
        mom.mamba_block(**shared)
    with pytest.raises(RuntimeError, match=r"host_offsets must be on the CPU, got cuda:0"):
        mom.mamba_block(**{**arguments, "host_offsets": arguments["offsets"]})


def test_other_devices_are_refused_by_projections_and_permutations():
    arguments = linear_arguments(device="cuda")
    for name, index in (("weight", 1), ("bias", 0)):
        changed = {**arguments, name: [t.cpu() if i == index else t for i, t in enumerate(arguments[name])]}
        with pytest.raises(RuntimeError, match=rf"{name}\[{index}\] must be on the device of x \(cuda:0\), got cpu"):
            mom.grouped_linear(**changed)
    with pytest.raises(RuntimeError, match=r"offsets must be on the device of x \(cuda:0\), got cpu"):
        mom.grouped_linear(**{**arguments, "offsets": arguments["offsets"].cpu()})
    with pytest.raises(RuntimeError, match=r"host_offsets must be on the CPU, got cuda:0"):
        mom.grouped_linear(**{**arguments, "host_offsets": arguments["offsets"]})
    x, index = randn(2, 3, 4, device="cuda"), torch.arange(6, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"index must be on the device of x \(cuda:0\), got cpu"):
        mom.permute_rows(x, index, index.cuda())
    with pytest.raises(RuntimeError, match=r"inverse must be on the device of x \(cuda:0\), got cpu"):
        mom.permute_rows(x, index.cuda(), index)


@pytest.mark.parametrize("function", [mom.selective_scan, mom.causal_conv1d], ids=lambda f: f.__name__)
def test_hostile_values_stay_inside_the_tensors(function):
    """Values on the device are never read on the host; whatever they are, the call comes back."""
    make = scan_arguments if function is mom.selective_scan else conv_arguments
    arguments = make(packed=True, device="cuda")
    arguments["rows"] = arguments["rows"] * 1000 - 500
    arguments["cu_seqlens"] = torch.tensor([7, -9, 10**9, 3, 0, -(10**9)], dtype=torch.int32, device="cuda")
    run(function, arguments)
    torch.cuda.synchronize()


def needs_memory(gibibytes: float) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gibibytes * 2**30:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, has {free / 2**30:.1f}")


def repeated(small: torch.Tensor, batch: int) -> torch.Tensor:
    return small.repeat(batch, 1, 1)


@pytest.mark.parametrize("function", [mom.selective_scan, mom.causal_conv1d], ids=lambda f: f.__name__)
def test_more_than_two_to_the_31_elements(function):
    """The last of many equal sequences gives what one alone gives, forward and backward."""
    needs_memory(48)
    batch, length, channels = 9, 2**16, 4096
    make = scan_arguments if function is mom.selective_scan else conv_arguments
    options = {"dtype": torch.bfloat16, "device": "cuda", "order": "time", "initial_state": False}
    one = make(1, length, channels, 4, **options)
    many = {
        name: repeated(value, batch) if name in ("u", "dt", "B", "C", "z", "x") else value
        for name, value in one.items()
    }
    activation = "u" if function is mom.selective_scan else "x"
    results = []
    for arguments in (one, many):
        leaf = arguments[activation].requires_grad_()
        assert (arguments is one) or leaf.numel() > 2**31
        out, _ = function(**arguments)
        out.backward(torch.ones((), dtype=out.dtype, device="cuda").expand_as(out))
        results.append((out[-1].detach().clone(), leaf.grad[-1].clone()))
        del out, leaf
        arguments[activation].grad = None
    for alone, last in zip(*results, strict=True):
        torch.testing.assert_close(last, alone, rtol=2e-2, atol=2e-2)
