# SPDX-License-Identifier: Apache-2.0
"""The layer as one operator, and step by step where somebody watches a projection or has replaced it: same numbers."""

from __future__ import annotations

import pytest
import torch
from layer_support import Calls, make_layer, random_ids
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS, MambaState

LAYERS = {
    "all": {},
    "all, with biases": {"bias": True},
    "none": {"decouple": ()},
    "in_proj and dt_proj": {"decouple": ("in_proj", "dt_proj"), "bias": True},
    "with shared experts": {"shared_expert": PROJECTIONS},
    "other sizes": {"d_conv": 2, "d_state": 5, "dt_rank": 3, "conv_bias": False},
}


def is_one_operator(layer: nn.Module, ids: torch.Tensor) -> bool:
    """Which way a forward of ``layer`` goes."""
    with Calls() as calls, torch.no_grad():
        layer(torch.randn(*ids.shape, layer.d_model, dtype=layer.D.dtype), ids)
    counts = calls.counts
    assert (counts["mamba_block"], counts["selective_scan"], counts["causal_conv1d"]) in ((1, 0, 0), (0, 1, 1))
    return counts["mamba_block"] == 1


def watch(layer: nn.Module, name: str):
    projection = getattr(layer, name)
    child = projection[1] if isinstance(projection, nn.ModuleList) else projection
    return child.register_forward_hook(lambda *_: None)


def results(layer: nn.Module, problem: dict) -> dict[str, torch.Tensor]:
    """Output, states, and the gradients of all parameters, the input and the state before."""
    x = problem["x"].clone().requires_grad_()
    state = MambaState(*(value.clone().requires_grad_() for value in problem["state"]))
    y, new = layer(x, problem["routing"], cu_seqlens=problem["cu_seqlens"], state=state, return_state=True)
    leaves = {"x": x, "conv": state.conv, "ssm": state.ssm, **dict(layer.named_parameters())}
    outputs = [y, new.conv, new.ssm]
    seeds = [torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    named = {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "conv": new.conv.detach(), "ssm": new.ssm.detach(), **named}


def make_problem(layer: nn.Module, device="cpu", packed: bool = False) -> dict:
    ids = random_ids(3, 21, 3)
    ids[0, 3], ids[2] = -1, ids[2].clamp(min=0)
    cu_seqlens = torch.tensor([0, 20, 20, 63], dtype=torch.int32, device=device) if packed else None
    like = layer.in_proj[0].weight if isinstance(layer.in_proj, nn.ModuleList) else layer.in_proj.weight
    state = layer.allocate_state(3, device=device, dtype=like.dtype)
    return {
        "x": torch.randn(3, 21, layer.d_model).to(like),
        "routing": mom.Routing.from_ids(ids, 3, device=device),
        "cu_seqlens": cu_seqlens,
        "state": [torch.randn(value.shape).to(value) for value in (state.conv, state.ssm)],
    }


@pytest.mark.parametrize("memory", ["default", "lean"])
@pytest.mark.parametrize("watched", PROJECTIONS)
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_both_ways_give_the_same(options, watched, memory):
    layer = make_layer(memory=memory, **options)
    problem = make_problem(layer, packed=watched == "x_proj")
    assert is_one_operator(layer, random_ids(1, 5, 3))
    expected = results(layer, problem)
    handle = watch(layer, watched)
    assert not is_one_operator(layer, random_ids(1, 5, 3))
    for name, value in results(layer, problem).items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")
    handle.remove()
    again = results(layer, problem)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_ways_on_devices(device, dtype):
    """dt_proj is not the watched one: called as a module it would add its bias in the activations' dtype."""
    layer = make_layer(d_model=32, bias=True).to(device=device, dtype=dtype)
    layer.A_log.data, layer.D.data = layer.A_log.data.float(), layer.D.data.float()
    problem = make_problem(layer, device)
    expected = results(layer, problem)
    watch(layer, "out_proj")
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, value in results(layer, problem).items():
        wanted = expected[name].double()
        assert (value.double() - wanted).norm() <= tolerance * wanted.norm().clamp(min=1), name


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_memory_levels_are_bitwise_equal(device, options):
    levels = []
    for memory in ("default", "lean"):
        torch.manual_seed(1)
        layer = make_layer(memory=memory, **options).float().to(device)
        levels.append(results(layer, make_problem(layer, device)))
    assert all(torch.equal(levels[1][name], value) for name, value in levels[0].items())


@pytest.mark.parametrize("make", [lambda **m: mom.MixtureOfMamba(16, 3, **m), lambda **m: mom.Mamba(16, **m)])
def test_lean_keeps_less(make):
    kept = {}
    for memory in ("default", "lean"):
        layer, sizes = make(memory=memory), []
        assert layer.memory == memory
        x = torch.randn(2, 64, 16, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            layer(x, torch.zeros(2, 64, dtype=torch.int64))
        kept[memory] = sum(sizes)
    scan = 128 * 32 * 4 + (128 // 16 + 2) * 32 * 16 * 4  # the scan's output, and its checkpoints
    assert kept["default"] - kept["lean"] == scan


class Adapter(nn.Module):
    """What LoRA libraries put in a linear's place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x):
        return self.base(x) * self.scale


@pytest.mark.parametrize("name", PROJECTIONS)
def test_replaced_projections_are_called(name):
    """A shared projection as a whole; those per modality are in test_modality_linear.py."""
    layer = make_layer(decouple=())
    problem = make_problem(layer)
    expected = results(layer, problem)
    setattr(layer, name, Adapter(getattr(layer, name)))
    assert not is_one_operator(layer, random_ids(1, 5, 3))
    got = results(layer, problem)
    torch.testing.assert_close(got["y"], expected["y"])
    assert got[f"grad_{name}.scale"].any()
    torch.testing.assert_close(got[f"grad_{name}.base.weight"], expected[f"grad_{name}.weight"])


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_a_projection_of_all_modalities(name, kind):
    """The list of linears is a module too, and somebody may watch it as one."""
    layer = make_layer()
    problem = make_problem(layer)
    expected, seen = results(layer, problem), []
    register = getattr(getattr(layer, name), f"register_{kind}_hook")
    handle = register(lambda *_: seen.append(name))
    assert not is_one_operator(layer, random_ids(1, 5, 3))
    seen.clear()
    got = results(layer, problem)
    assert seen == [name]
    for key, value in got.items():
        torch.testing.assert_close(value, expected[key], msg=lambda m, key=key: f"{key}: {m}")
    handle.remove()
    assert is_one_operator(layer, random_ids(1, 5, 3))


def test_children_of_another_kind():
    """A bias where the operator has none; biases of some modalities only; no bias of dt at all."""
    layer = make_layer()
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16).double()
    with torch.no_grad():
        before = layer(x, ids)
        for child in layer.x_proj:
            child.bias = nn.Parameter(torch.zeros(child.out_features, dtype=torch.float64))
        assert not is_one_operator(layer, ids)
        torch.testing.assert_close(layer(x, ids), before)
        for child in layer.x_proj:
            child.bias = None
        layer.in_proj[1].bias = nn.Parameter(torch.zeros(layer.in_proj[1].out_features, dtype=torch.float64))
        assert not is_one_operator(layer, ids)
        torch.testing.assert_close(layer(x, ids), before)
        layer.in_proj[1].bias = None
        for child in layer.dt_proj:
            child.bias.zero_()
        before = layer(x, ids)
        layer.dt_proj[2].bias = None
        assert not is_one_operator(layer, ids)
        torch.testing.assert_close(layer(x, ids), before)
        for child in layer.dt_proj:
            child.bias = None
        assert is_one_operator(layer, ids)
        torch.testing.assert_close(layer(x, ids), before)
        watch(layer, "x_proj")
        torch.testing.assert_close(layer(x, ids), before)


class Packed(torch.Tensor):
    """A weight of another kind, as quantised and sharded ones are: unpacked by the products that meet it."""

    products = 0

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Packed(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(Packed, lambda packed: packed.inner, args)
        assert function.namespace == "aten", f"{function} met a packed weight"
        if function is torch.ops.aten.detach.default:
            return Packed(function(*plain))
        cls.products += 1
        return function(*plain, **(kwargs or {}))


@pytest.mark.parametrize("decouple", [PROJECTIONS, ()], ids=["per modality", "shared"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_weights_of_another_kind_bring_their_own_product(name, decouple):
    layer = make_layer(decouple=decouple)
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16).double()
    expected = layer(x, ids)
    projection = getattr(layer, name)
    child = projection[0] if decouple else projection
    child.weight = nn.Parameter(Packed(child.weight.detach()), requires_grad=False)
    before = Packed.products
    torch.testing.assert_close(layer(x, ids), expected)
    assert Packed.products > before
    assert not is_one_operator(layer, ids)


@pytest.mark.parametrize("decouple", [PROJECTIONS, PROJECTIONS[:2]], ids=["all", "some"])
def test_boundaries_on_the_device_only(device, decouple):
    """On a GPU the operator does not know which rows of a shared projection are padding. On a CPU they are at hand."""
    layer = make_layer(decouple=decouple).float().to(device)
    ids, x = random_ids(2, 17, 3), torch.randn(2, 17, 16, device=device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    routing = mom.Routing(routing.rows, routing.order, routing.offsets, None, True, routing.shape)
    with Calls() as calls:
        layer(x, routing)
    assert calls.counts["mamba_block"] == (device.type == "cpu" or decouple == PROJECTIONS)


def test_one_modality_and_no_routing():
    layer = mom.Mamba(16)
    assert is_one_operator(layer, torch.zeros(2, 5, dtype=torch.int64))
    with Calls() as calls:
        layer(torch.randn(2, 5, 16))
    assert calls.counts == {"mamba_block": 1}
