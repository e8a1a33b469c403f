# SPDX-License-Identifier: Apache-2.0
"""What mamba_block keeps for backward at each level, that lean changes no bit, and gradients only where asked."""

from __future__ import annotations

import pytest
import torch
from support import Arguments, assert_bitwise_equal, block_arguments, cotangent, operator_arguments, run
from torch.utils._python_dispatch import TorchDispatchMode

import mixture_of_mamba as mom

OPS = torch.ops.mixture_of_mamba
LARGE = {"batch": 3, "length": 150, "width": 24, "inner": 48, "states": 16, "rank": 3, "modalities": 3}
CASES = {
    "base": {},
    "packed": {"packed": True},
    "bare": {"in_bias": False, "conv_bias": False, "dt_bias": False, "out_bias": False, "initial_state": False},
    "dense": {"several": (), "order": "time"},
    "large": LARGE,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("poisoned")
def test_lean_changes_no_bit(device, dtype, case):
    arguments = block_arguments(dtype=dtype, device=device, **case)
    usual = run(mom.mamba_block, arguments)
    assert_bitwise_equal(run(mom.mamba_block, {**arguments, "lean": True}), usual)
    inference = run(mom.mamba_block, arguments, backward=False)
    assert_bitwise_equal(inference, {name: usual[name] for name in inference})


@pytest.mark.parametrize("length", [1, 2, 4])
def test_lean_changes_no_bit_of_a_few_tokens(device, length):
    """In training they are not what kernels for decoding compute."""
    arguments = block_arguments(length=length, inner=64, states=16, padding=False, device=device)
    usual = run(mom.mamba_block, arguments)
    assert_bitwise_equal(run(mom.mamba_block, {**arguments, "lean": True}), usual)


def kept_bytes(arguments: Arguments) -> tuple[int, list[tuple[int, ...]]]:
    """Of the tensors that are saved, those that are no arguments: bytes, and shapes."""
    given = {value.data_ptr() for value in flat(arguments) if value.numel()}
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mom.mamba_block(**arguments)
    kept = [x for x in saved if x.numel() and x.data_ptr() not in given]
    return sum(x.numel() * x.element_size() for x in kept), [tuple(x.shape) for x in kept]


def flat(arguments: Arguments) -> list[torch.Tensor]:
    values = []
    for value in arguments.values():
        values += value if isinstance(value, list) else [value]
    return [value for value in values if torch.is_tensor(value)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(device, dtype):
    """The formulas of docs/kernels/mamba_block.md, in bytes."""
    arguments = block_arguments(**LARGE, dtype=dtype, device=device)
    arguments["x"].requires_grad_()
    tokens, inner, states, rank, sequences = 450, 48, 16, 3, 3
    slots = tokens // 16 + sequences
    lean = [(tokens, 2 * inner), (tokens, rank + 2 * states)]
    lean_bytes = tokens * (2 * inner + rank + 2 * states) * dtype.itemsize
    more = [(tokens, inner), (slots, inner, states)]
    more_bytes = tokens * inner * dtype.itemsize + slots * inner * states * 4
    assert kept_bytes({**arguments, "lean": True}) == (lean_bytes, lean)
    assert kept_bytes(arguments) == (lean_bytes + more_bytes, lean + more)


class Sizes(TorchDispatchMode):
    """Elements of what each call of the operator returns for backward."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if function is OPS.mamba_block.default:
            self.kept.append(sum(output.numel() for output in outputs[3:]))
        return outputs


def test_inference_keeps_nothing(device):
    arguments = block_arguments(device=device)
    training = {**arguments, "out_bias": [bias.clone().requires_grad_() for bias in arguments["out_bias"]]}
    with Sizes() as sizes:
        mom.mamba_block(**arguments)
        with torch.no_grad():
            mom.mamba_block(**training)
        with torch.inference_mode():
            mom.mamba_block(**training)
        mom.mamba_block(**training)
    assert sizes.kept[:3] == [0, 0, 0] and sizes.kept[3] > 0


GROUPS = [
    ("x",),
    ("in_weight",),
    ("in_bias",),
    ("conv_weight", "conv_bias"),
    ("x_weight",),
    ("dt_weight",),
    ("dt_bias",),
    ("A_log", "D"),
    ("out_weight",),
    ("out_bias",),
    ("conv_state", "ssm_state"),
    ("x", "conv_weight", "conv_bias", "dt_bias", "A_log", "D"),  # all projections are frozen
]


@pytest.mark.parametrize("lean", [False, True], ids=["default", "lean"])
@pytest.mark.parametrize("wanted", GROUPS, ids="+".join)
def test_gradients_only_where_asked(device, wanted, lean):
    arguments = block_arguments(device=device, lean=lean)
    everything = run(mom.mamba_block, arguments)
    leaves = {}
    for name in wanted:
        value = arguments[name]
        for i, each in enumerate(value) if isinstance(value, list) else [(None, value)]:
            leaves[name if i is None else f"{name}[{i}]"] = each.requires_grad_()
    outputs = mom.mamba_block(**arguments)
    used = [output for output in outputs if output.requires_grad]
    torch.autograd.backward(used, [cotangent(output) for output in used])
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, everything[f"grad_{name}"]), name
    assert sum(value.grad is not None for value in flat(arguments)) == len(leaves)


def test_one_frozen_modality(device):
    """The others get what they get beside an unfrozen one."""
    arguments = block_arguments(modalities=3, device=device)
    everything = run(mom.mamba_block, arguments)
    for name in ("in_weight", "x_weight", "dt_weight", "out_weight"):
        for m in (0, 2):
            arguments[name][m].requires_grad_()
    outputs = mom.mamba_block(**arguments)
    torch.autograd.backward(outputs, [cotangent(output) for output in outputs])
    for name in ("in_weight", "x_weight", "dt_weight", "out_weight"):
        assert arguments[name][1].grad is None
        assert all(torch.equal(arguments[name][m].grad, everything[f"grad_{name}[{m}]"]) for m in (0, 2))


@pytest.mark.parametrize("bit", range(5), ids=["x", "in", "x_proj", "dt_proj", "out"])
def test_needs_are_what_the_operator_computes(device, bit):
    """What is not asked for costs nothing: an empty tensor or list, and the others do not change."""
    arguments = block_arguments(device=device)
    y, *_, xz, x_dbl, u, checkpoints = OPS.mamba_block.default(*operator_arguments("mamba_block", arguments, keep=True))
    kept = {"xz": xz, "x_dbl": x_dbl, "u": u, "checkpoints": checkpoints, "grad_y": cotangent(y)}

    def gradients(needs):
        return OPS.mamba_block_backward.default(
            *operator_arguments("mamba_block_backward", arguments, **kept, needs=needs)
        )

    places = (0, 1, 5, 6, 10)  # of the five gradients among the outputs
    for place, (got, full) in enumerate(zip(gradients(31 & ~(1 << bit)), gradients(31), strict=True)):
        if place == places[bit]:
            assert (got.numel() if torch.is_tensor(got) else len(got)) == 0
            continue
        pairs = zip(got, full, strict=True) if isinstance(full, list) else [(got, full)]
        assert all(torch.equal(a, b) for a, b in pairs)


def test_backward_twice_through_one_graph(device):
    """retain_graph: what was kept is only read."""
    arguments = block_arguments(device=device)
    leaves = [value.requires_grad_() for value in flat(arguments) if value.is_floating_point()]
    outputs = mom.mamba_block(**arguments)
    seeds = [cotangent(output) for output in outputs]
    first = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, seeds)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_weight_changed_before_backward_is_noticed(device):
    arguments = block_arguments(device=device)
    arguments["x"].requires_grad_()
    y, *_ = mom.mamba_block(**arguments)
    arguments["out_weight"][0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_views_are_not_copied(device):
    """Halves of xz and slices of x_dbl are read and written where they lie, and so is an x of strided rows.

    Without biases: torch's GEMM on a CPU copies one into the rows first, and dt_bias's gradients are rows of a matrix.
    """
    bare = {"in_bias": False, "dt_bias": False, "out_bias": False}
    arguments = block_arguments(strides="half", device=device, **bare)
    leaves = [value.requires_grad_() for value in flat(arguments) if value.is_floating_point()]
    seeds = [cotangent(output) for output in mom.mamba_block(**arguments)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(mom.mamba_block(**arguments), leaves, seeds)
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy"} & {event.key for event in profile.key_averages()}
