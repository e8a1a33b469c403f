# SPDX-License-Identifier: Apache-2.0
"""The layer against itself written out, and the identities that make it a drop-in replacement."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from layer_support import make_layer, random_ids, reference_layer
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba.nn.mixture_of_mamba import PROJECTIONS

SUBSETS = [subset for n in range(5) for subset in itertools.combinations(PROJECTIONS, n)]


def gradients(layer, x, y, grad):
    leaves = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad, materialize_grads=True), strict=True))


@pytest.mark.parametrize(
    "decouple", SUBSETS, ids=lambda names: "+".join(n.removesuffix("_proj") for n in names) or "none"
)
def test_every_subset_of_decoupled_projections(decouple):
    layer = make_layer(decouple=decouple, bias=True)
    ids = random_ids(2, 13, 3)
    x, grad = torch.randn(2, 13, 16).double().requires_grad_(), torch.randn(2, 13, 16).double()
    y, expected = layer(x, ids), reference_layer(layer, x, ids)
    torch.testing.assert_close(y, expected)
    expected_gradients = gradients(layer, x, expected, grad)
    for name, gradient in gradients(layer, x, y, grad).items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", [{"d_conv": 2}, {"d_conv": 5}, {"d_state": 5}, {"expand": 3}, {"dt_rank": 3}])
def test_sizes(options):
    layer = make_layer(**options)
    ids, x = random_ids(1, 9, 3), torch.randn(1, 9, 16).double()
    torch.testing.assert_close(layer(x, ids), reference_layer(layer, x, ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_against_float64(dtype, device):
    layer = make_layer(d_model=32).to(dtype)
    layer.A_log.data, layer.D.data = layer.A_log.data.float(), layer.D.data.float()
    twin = copy.deepcopy(layer).double()
    ids, x = random_ids(2, 40, 3), torch.randn(2, 40, 32).to(dtype)
    leaf = x.to(device).clone().requires_grad_()
    leaf64 = x.double().clone().requires_grad_()
    y = layer.to(device)(leaf, mom.Routing.from_ids(ids, 3, device=device))
    expected = twin(leaf64, ids)
    assert y.dtype == dtype
    y.float().sum().backward()
    expected.sum().backward()
    tolerance = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    for value, truth in ((y, expected), (leaf.grad, leaf64.grad)):
        assert (value.cpu().double() - truth).norm() <= tolerance * truth.norm()
    for (name, parameter), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        error = (parameter.grad.cpu().double() - other.grad).norm()
        assert error <= tolerance * other.grad.norm(), (name, error, other.grad.norm())


def test_one_modality_is_the_dense_block():
    """The same weights, the same bits: with padding or without."""
    mamba = mom.Mamba(24)
    mixture = mom.MixtureOfMamba(24, 1)
    state = {}
    for name, value in mamba.state_dict().items():
        head, _, tail = name.rpartition(".")
        state[f"{head}.0.{tail}" if head in PROJECTIONS else name] = value
    mixture.load_state_dict(state)
    x = torch.randn(2, 11, 24)
    assert torch.equal(mixture(x), mamba(x))
    ids = torch.randint(-1, 1, (2, 11))
    assert torch.equal(mixture(x, ids), mamba(x, ids))


def test_parameter_names_are_those_of_mamba_ssm():
    names = {name: tuple(value.shape) for name, value in mom.Mamba(32).state_dict().items()}
    assert names == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }


def test_equal_weights_are_the_dense_block_for_any_ids():
    layer = make_layer()
    for projection in PROJECTIONS:
        for child in getattr(layer, projection)[1:]:
            child.load_state_dict(getattr(layer, projection)[0].state_dict())
    x = torch.randn(2, 10, 16).double()
    one, other = random_ids(2, 10, 3, padding=False), random_ids(2, 10, 3, padding=False)
    torch.testing.assert_close(layer(x, one), layer(x, other))


def test_names_of_modalities_do_not_matter():
    layer = make_layer()
    renamed = copy.deepcopy(layer)
    relabel = torch.tensor([2, 0, 1, -1])  # the last one is padding, id -1
    for projection in PROJECTIONS:
        for m in range(3):
            getattr(renamed, projection)[int(relabel[m])].load_state_dict(getattr(layer, projection)[m].state_dict())
    ids, x = random_ids(2, 12, 3), torch.randn(2, 12, 16).double()
    torch.testing.assert_close(renamed(x, relabel[ids]), layer(x, ids))


def test_padding_is_zero_and_invisible():
    layer = make_layer()
    ids, x = random_ids(3, 20, 3), torch.randn(3, 20, 16).double()
    ids[1] = -1
    y = layer(x, ids)
    assert not y[ids < 0].any()
    garbage = x.masked_fill((ids < 0).unsqueeze(-1), float("nan"))
    assert torch.equal(layer(garbage, ids), y)
    garbage.requires_grad_()
    layer(garbage, ids).sum().backward()
    assert not garbage.grad[ids < 0].any()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_packed_documents_are_separate_sequences():
    layer = make_layer()
    lengths = [5, 0, 1, 9]
    ids, x = random_ids(1, sum(lengths), 3), torch.randn(1, sum(lengths), 16).double()
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    packed, state = layer(x, ids, cu_seqlens=bounds, return_state=True)
    assert state.ssm.shape[0] == len(lengths)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        y, own = layer(x[:, begin:end], ids[:, begin:end], return_state=True)
        torch.testing.assert_close(packed[:, begin:end], y)
        torch.testing.assert_close(state.ssm[i : i + 1], own.ssm)
        torch.testing.assert_close(state.conv[i : i + 1], own.conv)


@pytest.mark.parametrize("cuts", [[7], [1, 2, 30], [0, 16], list(range(1, 33))])
def test_chunks_with_state_are_the_whole(cuts):
    layer = make_layer()
    ids, x = random_ids(2, 33, 3), torch.randn(2, 33, 16).double().requires_grad_()
    whole, last = layer(x, ids, return_state=True)
    state, parts = None, []
    for begin, end in itertools.pairwise([0, *cuts, 33]):
        part, state = layer(x[:, begin:end], ids[:, begin:end], state=state, return_state=True)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state.ssm, last.ssm)
    torch.testing.assert_close(state.conv, last.conv)
    grad = torch.randn_like(whole)
    (through,) = torch.autograd.grad(torch.cat(parts, 1), x, grad)
    (direct,) = torch.autograd.grad(whole, x, grad)
    torch.testing.assert_close(through, direct)


@pytest.mark.parametrize("tokens", [1, 3])
def test_steps_are_the_forward(tokens, device):
    layer = make_layer().float().to(device)
    ids, x = random_ids(2, 12, 3).to(device), torch.randn(2, 12, 16, device=device)
    with torch.no_grad():
        expected, last = layer(x, ids, return_state=True)
    state = layer.allocate_state(2)
    steps = [layer.step(x[:, t : t + tokens], state, ids[:, t : t + tokens]) for t in range(0, 12, tokens)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.ssm, last.ssm, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.conv, last.conv)


def test_prefill_then_step():
    layer = make_layer()
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16).double()
    with torch.no_grad():
        whole = layer(x, ids)
        y, state = layer(x[:, :8], ids[:, :8], return_state=True)
    torch.testing.assert_close(torch.cat([y, layer.step(x[:, 8:], state, ids[:, 8:])], 1), whole)


def test_sorted_in_sorted_out():
    """A model that permutes once, at the embedding, gets the same numbers as one that permutes in every layer."""
    layers = [make_layer(), make_layer()]
    ids, x = random_ids(2, 14, 3), torch.randn(2, 14, 16).double()
    routing = mom.Routing.from_ids(ids, 3)
    in_time = layers[1](layers[0](x, routing), routing)
    h = routing.sort(x)
    for layer in layers:
        h = layer(h, routing, sorted=True)
    assert torch.equal(routing.unsort(h), in_time)


def test_device_only_routing(device):
    layer = make_layer().float().to(device)
    ids, x = random_ids(2, 17, 3), torch.randn(2, 17, 16, device=device)
    with_host = mom.Routing.from_ids(ids, 3, device=device)
    without = mom.Routing(with_host.rows, with_host.order, with_host.offsets, None, True, with_host.shape)
    torch.testing.assert_close(layer(x, without), layer(x, with_host), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty_batches(shape):
    layer = make_layer()
    x = torch.randn(*shape, 16).double().requires_grad_()
    y, state = layer(x, torch.zeros(shape, dtype=torch.int64), return_state=True)
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
    assert state.ssm.shape == (shape[0], 32, 16)
    assert all(not p.grad.any() for p in layer.parameters())


def test_truncated_backpropagation_and_rewind():
    layer = make_layer()
    ids, x = random_ids(1, 8, 3, padding=False), torch.randn(1, 8, 16).double()
    _, state = layer(x[:, :4], ids[:, :4], return_state=True)
    assert state.ssm.requires_grad
    assert not state.detach().ssm.requires_grad
    saved = state.detach().clone()
    used = saved.clone()
    first = layer.step(x[:, 4:5], used, ids[:, 4:5])
    assert not torch.equal(used.ssm, saved.ssm)
    assert torch.equal(layer.step(x[:, 4:5], saved.clone(), ids[:, 4:5]), first)


def test_initialisation():
    layer = mom.MixtureOfMamba(64, 2, dt_min=0.002, dt_max=0.05)
    assert torch.allclose(-torch.exp(layer.A_log), -torch.arange(1.0, 17.0).expand(128, -1))
    assert torch.equal(layer.D, torch.ones(128))
    for child in layer.dt_proj:
        dt = nn.functional.softplus(child.bias)
        assert 0.0019 < dt.min() < 0.004
        assert 0.03 < dt.max() < 0.0501
        assert child.weight.abs().max() <= layer.dt_rank**-0.5
    assert not torch.equal(layer.dt_proj[0].bias, layer.dt_proj[1].bias)
    constant = mom.Mamba(64, dt_init="constant", dt_scale=2.0)
    assert torch.equal(constant.dt_proj.weight, torch.full((128, 4), 1.0))
    marked = {name for name, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_proj.0.bias", "dt_proj.1.bias"}


def test_meta_device_then_materialised():
    with torch.device("meta"):
        layer = mom.MixtureOfMamba(16, 2)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(1, 4, 16), torch.tensor([[0, 1, 1, 0]])).isfinite().all()


def test_copies_and_checkpoints():
    layer = make_layer()
    ids, x = random_ids(1, 6, 3), torch.randn(1, 6, 16).double()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make_layer()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x, ids), layer(x, ids))
    assert torch.equal(copy.deepcopy(layer)(x, ids), layer(x, ids))
