# SPDX-License-Identifier: Apache-2.0
"""A shared expert beside the specific ones, and D or A per modality: against the layer written out, in every use."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch._dynamo.testing
from layer_support import is_one_operator, make_layer, random_ids, reference_layer
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba import checkpoints
from mixture_of_mamba.nn import PROJECTIONS, modality_linear

PARTS = (*PROJECTIONS, "D")
SHARED = [names for n in range(1, 5) for names in itertools.combinations(PROJECTIONS, n)]
LAYERS = {
    "shared experts": {"shared_expert": PROJECTIONS, "bias": True},
    "shared in_proj of two": {"decouple": ("in_proj", "out_proj"), "shared_expert": ("in_proj",)},
    "D": {"decouple": PARTS},
    "only D": {"decouple": ("D",)},
    "A": {"decouple": (*PARTS, "A_log")},
    "only A": {"decouple": ("A_log",), "bcdt_norm": True, "dt_rank": 3, "dt_limit": (0.01, 0.05)},
    "both": {"decouple": PARTS, "shared_expert": ("in_proj", "dt_proj"), "bcdt_norm": True, "dt_rank": 3},
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


@pytest.fixture(params=[0, 10**9], ids=["sums of weights", "sums of outputs"])
def either_sum(request, monkeypatch):
    monkeypatch.setattr(modality_linear, "SUM_WEIGHTS_FROM_ROWS", request.param)


def gradients(layer, x, y, grad):
    leaves = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=True), strict=True))


def assert_as_written_out(layer, ids):
    x, grad = torch.randn(*ids.shape, 16).double().requires_grad_(), torch.randn(*ids.shape, 16).double()
    y, expected = layer(x, ids), reference_layer(layer, x, ids)
    torch.testing.assert_close(y, expected)
    wanted = gradients(layer, x, expected, grad)
    for name, value in gradients(layer, x, y, grad).items():
        torch.testing.assert_close(value, wanted[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("shared", SHARED, ids=lambda names: "+".join(n.removesuffix("_proj") for n in names))
def test_every_set_of_shared_experts(shared):
    layer = make_layer(shared_expert=shared, bias=True)
    assert is_one_operator(layer, torch.randn(1, 2, 16).double(), None)
    assert_as_written_out(layer, random_ids(2, 13, 3))


@each_layer
@pytest.mark.usefixtures("either_sum")
def test_watched(options):
    """A hook on a specific expert, on the shared one, or on the list: nothing changes but who is called."""
    layer, ids = make_layer(**options), random_ids(2, 9, 3)
    ids[0, 2] = -1
    assert_as_written_out(layer, ids)
    for name in PROJECTIONS:
        projection, seen = getattr(layer, name), []
        shared = getattr(projection, "shared", None)
        children = [projection, shared, *(projection if isinstance(projection, nn.ModuleList) else [])]
        for child in (child for child in children if child is not None):
            handle = child.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            assert_as_written_out(layer, ids)
            assert seen
            handle.remove()


@each_layer
def test_an_absent_modality_has_zero_gradients(options):
    layer, ids = make_layer(**options), 2 * random_ids(2, 9, 2, padding=False)
    ids[0, 3] = -1
    layer(torch.randn(2, 9, 16).double(), ids).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) != (".1." in name), name
    for name in {"A_log", "D"} & set(layer.decouple):
        assert [bool(grad.any()) for grad in getattr(layer, name).grad] == [True, False, True], name


@each_layer
def test_padding_packing_and_chunks(options):
    layer, ids, x = make_layer(**options), random_ids(2, 12, 3), torch.randn(2, 12, 16).double()
    garbage = x.masked_fill((ids < 0).unsqueeze(-1), float("nan"))
    y, last = layer(garbage, ids, return_state=True)
    assert torch.equal(y, layer(x, ids)) and not y[ids < 0].any()
    bounds = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
    packed = layer(x.view(1, 24, 16), ids.view(1, 24), cu_seqlens=bounds)
    for begin, end in ((0, 5), (5, 24)):
        part = layer(x.view(1, 24, 16)[:, begin:end], ids.view(1, 24)[:, begin:end])
        torch.testing.assert_close(packed[:, begin:end], part)
    first, state = layer(x[:, :7], ids[:, :7], return_state=True)
    state = state.detach()
    steps = [layer.step(x[:, t : t + 1], state, ids[:, t : t + 1]) for t in range(7, 12)]
    torch.testing.assert_close(torch.cat([first, *steps], 1), y)
    torch.testing.assert_close(state.ssm, last.ssm.detach())


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_devices(options, dtype, device):
    layer = make_layer(d_model=32, **options).to(dtype)
    layer.A_log.data, layer.D.data = layer.A_log.data.float(), layer.D.data.float()
    twin, x = copy.deepcopy(layer).double(), torch.randn(2, 40, 32).to(dtype)
    ids = random_ids(2, 40, 3)
    y = layer.to(device)(x.to(device), mom.Routing.from_ids(ids, 3, device=device))
    assert y.dtype == dtype
    expected = twin(x.double(), ids)
    assert (y.cpu().double() - expected).norm() <= {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype] * expected.norm()


@each_layer
def test_saved_copied_and_reset(options):
    layer, ids, x = make_layer(**options), random_ids(2, 9, 3), torch.randn(2, 9, 16).double()
    other = make_layer(**options)
    checkpoints.load(other, layer.state_dict())
    assert torch.equal(other(x, ids), layer(x, ids))
    assert torch.equal(copy.deepcopy(layer)(x, ids), layer(x, ids))
    late = mom.MixtureOfMamba(16, 3, device="meta", **options).to_empty(device="cpu")
    late.reset_parameters()
    assert bool((late.D == 1).all()) and getattr(late.D, "_no_weight_decay", False)
    assert all(not p.any() for name, p in late.named_parameters() if ".shared." in name)
    assert late.state_dict().keys() == layer.state_dict().keys()


def test_names_and_sizes():
    layer = mom.MixtureOfMamba(16, 2, PARTS, shared_expert=("in_proj", "x_proj"))
    names = {name: tuple(p.shape) for name, p in layer.named_parameters() if "shared" in name or name == "D"}
    assert names == {"D": (2, 32), "in_proj.shared.weight": (64, 16), "x_proj.shared.weight": (33, 32)}
    assert len(layer.in_proj) == 2 and layer.in_proj.shared not in list(layer.in_proj)
    assert len(layer.in_proj[:]) == 2 and layer.out_proj.shared is None
    assert "shared_expert=('in_proj', 'x_proj')" in repr(layer)


def test_a_new_shared_expert_changes_nothing_and_learns():
    torch.manual_seed(0)
    layer = mom.MixtureOfMamba(16, 2, shared_expert=PROJECTIONS).double()
    without = mom.MixtureOfMamba(16, 2).double()
    without.load_state_dict({n: p for n, p in layer.state_dict().items() if ".shared." not in n})
    x, ids = torch.randn(2, 9, 16).double(), random_ids(2, 9, 2)
    torch.testing.assert_close(layer(x, ids), without(x, ids))
    layer(x, ids).square().sum().backward()
    for name in PROJECTIONS:
        projection = getattr(layer, name)
        torch.testing.assert_close(projection.shared.weight.grad, projection[0].weight.grad + projection[1].weight.grad)


@pytest.mark.parametrize("decouple", [PROJECTIONS, PARTS, ("in_proj", "D")], ids="+".join)
def test_upcycling_computes_the_same(decouple):
    dense = mom.Mamba(16, dt_rank=3).double()
    nn.init.normal_(dense.D)
    dense.D.requires_grad_(False)
    x, ids = torch.randn(2, 9, 16).double(), random_ids(2, 9, 3)
    layer = checkpoints.upcycle(dense, 2, decouple, shared_expert=("in_proj",))
    for name, parameter in layer.named_parameters():
        assert parameter.dtype == torch.float64 and parameter.requires_grad == (name != "D"), name
    torch.testing.assert_close(layer(x, ids.clamp(max=1)), dense(x, ids))
    nn.init.normal_(layer.in_proj.shared.weight)
    if "D" in decouple:
        nn.init.normal_(layer.D)
    wider = checkpoints.add_modality(layer, like=1)
    torch.testing.assert_close(wider(x, ids), layer(x, ids.clamp(max=1)))
    assert vars(wider.D) == vars(layer.D)


def test_the_published_layer_gets_the_sum():
    layer = make_layer(shared_expert=("in_proj", "dt_proj"))
    theirs = checkpoints.convert(layer.state_dict(), target="published")
    assert not any("shared" in name for name in theirs)
    without, x, ids = make_layer(), torch.randn(2, 9, 16).double(), random_ids(2, 9, 3)
    checkpoints.load(without, theirs, "published")
    torch.testing.assert_close(without(x, ids), layer(x, ids))
    with pytest.raises(checkpoints.CheckpointError, match=r"in_proj.shared.weight"):
        checkpoints.load(without, layer.state_dict())
    with pytest.raises(ValueError, match=r'D must be one for all modalities in the format "published", got \[3, 32\]'):
        checkpoints.convert(make_layer(decouple=("D",)).state_dict(), target="published")


@pytest.mark.parametrize("which", ["0", "shared"])
def test_adapters_on_some_children(which):
    layer = make_layer(shared_expert=PROJECTIONS)
    x, ids = torch.randn(2, 9, 16).double(), random_ids(2, 9, 3)
    expected = layer(x, ids)
    for name in PROJECTIONS:
        child = layer.get_submodule(f"{name}.{which}")
        layer.set_submodule(f"{name}.{which}", nn.Sequential(child, nn.Identity()))
    torch.testing.assert_close(layer(x, ids), expected)
    layer(x, ids).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


@each_layer
def test_autocast(options, device):
    layer = make_layer(**options).float().to(device)
    ids, x = random_ids(2, 30, 3), torch.randn(2, 30, 16, device=device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    expected = layer(x, routing)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x, routing)
        state = layer.allocate_state(2, dtype=torch.bfloat16)
        step = layer.step(x[:, :4], state, ids[:, :4])
    assert y.dtype == step.dtype == torch.bfloat16
    assert (y.float() - expected).norm() <= 3e-2 * expected.norm()
    assert (step.float() - expected[:, :4]).norm() <= 3e-2 * expected[:, :4].norm()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("decouple", [PROJECTIONS, PARTS], ids=["one operator", "with D"])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_graph_for_all_lengths(decouple, reverse):
    torch._dynamo.reset()
    layer = make_layer(decouple=decouple, shared_expert=PROJECTIONS).float()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for length in (150, 129, 200):
        ids, x = random_ids(2, length, 3), torch.randn(2, length, 16)
        routing = mom.Routing.from_ids(ids, 3)
        expected = layer(x, routing, reverse=reverse)
        torch.testing.assert_close(compiled(x, routing, reverse=reverse), expected, atol=1e-5, rtol=1e-4)
    assert graphs.frame_count == 1
    torch._dynamo.reset()
