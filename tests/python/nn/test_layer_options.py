# SPDX-License-Identifier: Apache-2.0
"""Norms of B, C and dt, and limits on delta: against the layer written out, and with everything else a layer can do."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import warnings

import pytest
import torch
from layer_support import is_one_operator, make_layer, random_ids, reference_layer
from torch import nn
from torch.nn import functional as F

import mixture_of_mamba as mom
from mixture_of_mamba import checkpoints
from mixture_of_mamba.nn import PROJECTIONS, MambaState
from mixture_of_mamba.nn.dt_limit import limited_dt
from mixture_of_mamba.nn.mixing import NORMS

SUBSETS = [subset for n in range(5) for subset in itertools.combinations(PROJECTIONS, n)]
BOTH = {"bcdt_norm": True, "dt_limit": (0.01, 0.05)}
OPTIONS = {
    "norms": {"bcdt_norm": True},
    "limits": {"dt_limit": (0.01, 0.05)},
    "lower limit": {"dt_limit": (0.02, math.inf)},
    "upper limit": {"dt_limit": (0.0, 0.03)},
    "both": BOTH,
    "both, shared projections": {**BOTH, "decouple": ()},
    "both, only dt_proj": {**BOTH, "decouple": ("dt_proj",)},
    "both, dt_proj shared": {**BOTH, "decouple": ("in_proj", "x_proj", "out_proj")},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def fresh_dynamo():
    """torch counts the graphs of all layers together, and stops at eight."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(**options):
    """Norm weights are random; a norm of one value would be its sign, so dt has three before dt_proj."""
    layer = make_layer(**{"dt_rank": 3, "bias": True, **options})
    with torch.no_grad():
        for name in NORMS:
            if (norm := getattr(layer, name)) is not None:
                norm.weight.add_(torch.randn_like(norm.weight) * 0.3)
    return layer


def gradients(layer, x, y, grad, **unused):
    leaves = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad, **unused), strict=True))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def assert_as_written_out(layer, ids):
    x, grad = torch.randn(*ids.shape, 16).double().requires_grad_(), torch.randn(*ids.shape, 16).double()
    y, expected = layer(x, ids), reference_layer(layer, x, ids)
    torch.testing.assert_close(y, expected)
    # Zeros where a modality has no tokens: ours are there by themselves, those of the loop over tokens are not.
    assert_same(gradients(layer, x, y, grad), gradients(layer, x, expected, grad, materialize_grads=True))


@pytest.mark.parametrize(
    "decouple", SUBSETS, ids=lambda names: "+".join(n.removesuffix("_proj") for n in names) or "none"
)
def test_every_subset_of_decoupled_projections(decouple):
    assert_as_written_out(make(decouple=decouple, **BOTH), random_ids(2, 13, 3))


@each_option
def test_every_option(options):
    ids = random_ids(3, 9, 3)
    ids[1] = -1
    ids[ids == 1] = 2  # a modality without tokens
    assert_as_written_out(make(**options), ids)


@each_option
def test_watched_projections(options):
    layer = make(**options)
    for name in ("x_proj", "dt_proj"):
        projection = getattr(layer, name)
        child = projection[1] if isinstance(projection, nn.ModuleList) else projection
        child.register_forward_hook(lambda *_: None)
    assert_as_written_out(layer, random_ids(2, 9, 3))


def test_finite_differences():
    layer = mom.MixtureOfMamba(3, 2, d_state=2, expand=1, dt_rank=2, **BOTH).double()
    ids = torch.tensor([[1, -1, 0, 1]])
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, ids))

    x = torch.randn(1, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *values))


@each_option
def test_padding_is_zero_and_invisible(options):
    layer = make(**options)
    ids, x = random_ids(3, 12, 3), torch.randn(3, 12, 16).double()
    garbage = x.masked_fill((ids < 0).unsqueeze(-1), math.nan).requires_grad_()
    y = layer(garbage, ids)
    assert not y[ids < 0].any()
    assert torch.equal(y, layer(x, ids))
    y.sum().backward()
    assert not garbage.grad[ids < 0].any()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@each_option
def test_packed_documents_with_states(options):
    layer = make(**options)
    lengths = [5, 0, 1, 9]
    ids, x = random_ids(1, sum(lengths), 3), torch.randn(1, sum(lengths), 16).double()
    empty = layer.allocate_state(len(lengths), dtype=torch.float64)
    state = MambaState(torch.randn_like(empty.conv), torch.randn_like(empty.ssm))
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed, after = layer(x, ids, cu_seqlens=bounds, state=state, return_state=True)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        before = MambaState(state.conv[i : i + 1], state.ssm[i : i + 1])
        y, own = layer(x[:, begin:end], ids[:, begin:end], state=before, return_state=True)
        torch.testing.assert_close(packed[:, begin:end], y)
        torch.testing.assert_close(after.conv[i : i + 1], own.conv)
        torch.testing.assert_close(after.ssm[i : i + 1], own.ssm)


@each_option
def test_steps_and_chunks_are_the_forward_pass(options):
    layer = make(**options)
    ids, x = random_ids(2, 11, 3), torch.randn(2, 11, 16).double()
    expected, last = layer(x, ids, return_state=True)
    begin, state = layer(x[:, :4], ids[:, :4], return_state=True)
    chunk, after = layer(x[:, 4:], ids[:, 4:], state=state, return_state=True)
    torch.testing.assert_close(torch.cat([begin, chunk], 1), expected)
    torch.testing.assert_close(after.ssm, last.ssm)
    state = state.detach()
    steps = [layer.step(x[:, t : t + 1], state, ids[:, t : t + 1]) for t in range(4, 11)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 4:].detach())
    torch.testing.assert_close(state.ssm, last.ssm.detach())


@each_option
def test_memory_levels_and_runs_are_bitwise_equal(options):
    default = make(**options).float()
    lean = copy.deepcopy(default)
    lean.memory = "lean"
    ids, x = random_ids(2, 300, 3), torch.randn(2, 300, 16, requires_grad=True)
    runs = [gradients(layer, x, layer(x, ids), torch.ones(2, 300, 16)) for layer in (default, default, lean)]
    assert all(torch.equal(runs[0][name], run[name]) for run in runs for name in run)


@each_option
def test_boundaries_that_only_the_device_knows(options, device):
    layer = make(**options).float().to(device)
    ids, x = random_ids(2, 15, 3), torch.randn(2, 15, 16, device=device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    unread = dataclasses.replace(routing, host_offsets=None, has_padding=True)
    torch.testing.assert_close(layer(x, unread), layer(x, routing))
    y = layer(routing.sort(x), routing, sorted=True)
    torch.testing.assert_close(routing.unsort(y), layer(x, routing))


@each_option
@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_lengths(options):
    layer = make(**options).float()
    graphs = 0

    def counting(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counting)
    for length in (11, 9, 33, 64):
        ids, x = random_ids(2, length, 3), torch.randn(2, length, 16)
        ids[0, 0] = -1
        routing = mom.Routing.from_ids(ids, 3)
        torch.testing.assert_close(compiled(x, routing), layer(x, routing))
    assert graphs == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_trains_alike(device):
    layer = make(**BOTH).float().to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    ids = random_ids(2, 12, 3)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    x, grad = torch.randn(2, 12, 16, device=device, requires_grad=True), torch.randn(2, 12, 16, device=device)
    expected = gradients(layer, x, layer(x, routing), grad)
    for name, value in gradients(layer, x, compiled(x, routing), grad).items():
        torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=2e-4)


@each_option
def test_autocast(options, device):
    layer = make(**options).float().to(device)
    layer.A_log.data, layer.D.data = layer.A_log.data.float(), layer.D.data.float()
    ids, x = random_ids(2, 30, 3), torch.randn(2, 30, 16, device=device)
    routing = mom.Routing.from_ids(ids, 3, device=device)
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16):
        warnings.simplefilter("error")
        y, state = layer(x, routing, return_state=True)
    assert y.dtype == state.conv.dtype == torch.bfloat16
    assert state.ssm.dtype == torch.float32
    expected = layer(x, routing)
    assert (y.float() - expected).norm() <= 3e-2 * expected.norm()
    y.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_against_float64(dtype, device):
    layer = make(d_model=32, **BOTH).to(dtype)
    layer.A_log.data, layer.D.data = layer.A_log.data.float(), layer.D.data.float()
    twin = copy.deepcopy(layer).double()
    ids, x = random_ids(2, 40, 3), torch.randn(2, 40, 32).to(dtype)
    y = layer.to(device)(x.to(device), mom.Routing.from_ids(ids, 3, device=device))
    expected = twin(x.double(), ids)
    assert y.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert (y.cpu().double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("limit", [(1e-6, 1e-3), (0.01, 0.1), (0.0, 5.0), (2.0, 30.0), (1e-12, math.inf)])
def test_limits_bind_delta_closely(limit, dtype):
    """Clamped before softplus in float32, delta is what clamping it afterwards gives in float64."""
    dt = torch.linspace(-40, 40, 1601).to(dtype).view(1, -1, 1).requires_grad_()
    delta = F.softplus(limited_dt(dt, torch.tensor([-0.25]), limit, None).double())
    exact = F.softplus(dt.double() - 0.25).clamp(*limit)
    torch.testing.assert_close(delta, exact, rtol=4e-6, atol=0)
    got, expected = (torch.autograd.grad(value.sum(), dt)[0] for value in (delta, exact))
    torch.testing.assert_close(got, expected)


def test_a_limit_that_bounds_nothing_costs_nothing():
    """mamba_ssm.Mamba2's default, (0, inf), leaves the block one operator."""
    x = torch.randn(1, 5, 8)
    for layer in (mom.Mamba(8), mom.Mamba(8, dt_limit=(0.0, math.inf))):
        assert layer.dt_limit is None
        assert is_one_operator(layer, x, None)
    assert not is_one_operator(mom.Mamba(8, bcdt_norm=True), x, None)
    assert not is_one_operator(mom.Mamba(8, dt_limit=(0, 0.1)), x, None)


def test_names_are_those_of_jamba():
    layer = mom.Mamba(32, dt_limit=(0, 0.1), bcdt_norm=True)
    names = {name: tuple(value.shape) for name, value in layer.state_dict().items() if "norm" in name}
    assert names == {"dt_layernorm.weight": (2,), "b_layernorm.weight": (16,), "c_layernorm.weight": (16,)}
    assert all(
        torch.equal(getattr(layer, name).weight, torch.ones(size))
        for name, (size,) in zip(NORMS, names.values(), strict=True)
    )
    assert "dt_limit=(0.0, 0.1)" in repr(layer)
    assert not any("norm" in name for name in mom.Mamba(32).state_dict())


def test_one_modality_is_the_dense_block():
    layer, mamba = mom.MixtureOfMamba(16, 1, ("in_proj",), **BOTH), mom.Mamba(16, **BOTH)
    layer.load_state_dict({n.replace("in_proj.", "in_proj.0."): v for n, v in mamba.state_dict().items()})
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(layer(x), mamba(x))


def test_norms_are_modules():
    """Hooks on a norm run, another module may take its place, and each may be removed alone."""
    layer, seen = make(**BOTH), []
    layer.b_layernorm.register_forward_hook(lambda *_: seen.append("B"))
    layer.c_layernorm = nn.Identity()
    layer.dt_layernorm = None
    ids, x = random_ids(2, 6, 3), torch.randn(2, 6, 16).double()
    y = layer(x, ids)
    assert seen == ["B"]
    layer.c_layernorm = None
    torch.testing.assert_close(y, reference_layer(layer, x, ids))


def test_options_come_along_when_modalities_are_added():
    dense = mom.Mamba(16, dt_rank=3, **BOTH)
    nn.init.normal_(dense.b_layernorm.weight)
    x, ids = torch.randn(2, 9, 16), random_ids(2, 9, 2)
    layer = checkpoints.upcycle(dense, 2)
    assert layer.dt_limit == dense.dt_limit
    torch.testing.assert_close(layer(x, ids), dense(x, ids))
    other = mom.MixtureOfMamba(16, 3, dt_rank=3, **BOTH)
    checkpoints.load(other, checkpoints.add_modality(layer).state_dict())
    torch.testing.assert_close(other(x, ids), dense(x, ids))


@pytest.mark.parametrize("layer", [lambda **o: mom.MixtureOfMamba(8, 2, **o), lambda **o: mom.Mamba(8, **o)])
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ((0.1, 0.01), r"dt_limit must have 0 <= low < high, got \(0.1, 0.01\)"),
        ((-0.1, 0.1), r"dt_limit must have 0 <= low < high, got \(-0.1, 0.1\)"),
        ((0.1, 0.1), r"dt_limit must have 0 <= low < high"),
        ((math.nan, 0.1), r"dt_limit must have 0 <= low < high, got \(nan, 0.1\)"),
        ((0.1, math.nan), r"dt_limit must have 0 <= low < high"),
        ((0.1,), r"dt_limit must be two numbers \(low, high\), got \(0.1,\)"),
        (0.1, r"dt_limit must be two numbers \(low, high\), got 0.1"),
        ("01", r"dt_limit must be two numbers \(low, high\), got '01'"),
    ],
)
def test_wrong_limits(layer, limit, message):
    with pytest.raises(ValueError, match=message):
        layer(dt_limit=limit)
