# SPDX-License-Identifier: Apache-2.0
"""What training scripts do with a layer: make it late, copy, save, freeze, adapt, checkpoint, decode."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from layer_support import make_layer, random_ids
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS

LAYERS = {"per modality": {}, "shared": {"decouple": ()}, "mixed": {"decouple": ("in_proj", "dt_proj")}}
WAYS = ["one operator", "step by step"]


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def options(request):
    return request.param


def watch(layer, way):
    """A hook on a projection makes the layer call its children one by one."""
    if way == "step by step":
        layer.out_proj.register_forward_hook(lambda *_: None)
    return layer


def marks(layer):
    return {
        name: (getattr(p, "_no_weight_decay", False), getattr(p, "_no_reinit", False))
        for name, p in layer.named_parameters()
    }


def assert_marked(layer):
    for name, found in marks(layer).items():
        bias = name.startswith("dt_proj.") and name.endswith("bias")
        assert found == (bias or name in ("A_log", "D"), bias), name


def assert_initialised(layer):
    assert_marked(layer)
    assert torch.equal(layer.A_log, torch.arange(1.0, 17.0).log().expand(layer.d_inner, 16))
    assert torch.equal(layer.D, torch.ones(layer.d_inner))
    for name, bias in layer.dt_proj.named_parameters():
        if name.endswith("bias"):
            dt = nn.functional.softplus(bias)
            assert dt.min() > 0.99 * layer.dt_min and dt.max() < 1.01 * layer.dt_max
    x = torch.randn(1, 5, layer.d_model)
    assert layer(x, torch.tensor([[0, 1, -1, 1, 0]])).isfinite().all()


# Made late


def test_reset_on_meta_then_materialised(options, poisoned):
    layer = mom.MixtureOfMamba(16, 2, device="meta", **options)
    layer.reset_parameters()
    assert all(p.is_meta for p in layer.parameters())
    assert_marked(layer)
    layer.to_empty(device="cpu")
    assert_marked(layer)
    layer.reset_parameters()
    assert_initialised(layer)


def test_materialised_is_what_any_reset_gives(options):
    layers = [
        mom.MixtureOfMamba(16, 2, device="meta", **options).to_empty(device="cpu"),
        mom.MixtureOfMamba(16, 2, **options),
    ]
    for layer in layers:
        torch.manual_seed(3)
        layer.reset_parameters()
    late, early = (layer.state_dict() for layer in layers)
    assert all(torch.equal(late[name], value) for name, value in early.items())


@pytest.mark.parametrize("make", [mom.MixtureOfMamba, mom.Mamba])
def test_skip_init(make):
    arguments = (16,) if make is mom.Mamba else (16, 2)
    layer = nn.utils.skip_init(make, *arguments, device="cpu")
    assert_marked(layer)
    layer.load_state_dict(make(*arguments).state_dict())
    assert_initialised(layer)


# Copied and saved


def test_marks_survive_copies(options):
    layer = mom.MixtureOfMamba(16, 2, **options)
    assert_marked(copy.deepcopy(layer))
    assert_marked(copy.deepcopy(copy.deepcopy(nn.Sequential(layer)))[0])
    assert_marked(torch.optim.swa_utils.AveragedModel(layer).module)
    assert_marked(pickle.loads(pickle.dumps(layer)))
    assert_marked(copy.deepcopy(layer).double().float())


def test_marks_survive_assignment(options):
    """A layer on the meta device that takes over the tensors of a checkpoint."""
    weights = mom.MixtureOfMamba(16, 2, **options).state_dict()
    late = mom.MixtureOfMamba(16, 2, device="meta", **options)
    nn.Sequential(late).load_state_dict({f"0.{name}": value for name, value in weights.items()}, assign=True)
    assert_initialised(late)


def test_marks_group_an_optimizer(options):
    """Decay with a learning rate and no gradient shrinks exactly what is not marked, also in a copy."""
    layer = copy.deepcopy(mom.MixtureOfMamba(16, 2, **options))
    before = copy.deepcopy(layer)
    groups = {True: [], False: []}
    for parameter in layer.parameters():
        groups[getattr(parameter, "_no_weight_decay", False)].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[False], "weight_decay": 0.1}, {"params": groups[True], "weight_decay": 0.0}], lr=0.5
    )
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, new), old in zip(layer.named_parameters(), before.parameters(), strict=True):
        kept = name in ("A_log", "D") or (name.startswith("dt_proj.") and name.endswith("bias"))
        torch.testing.assert_close(new, old * (1.0 if kept else 0.95))


def test_state_dicts_load_without_pickled_code(options):
    layer, other = make_layer(**options), make_layer(**options)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16).double()
    assert torch.equal(other(x, ids), layer(x, ids))


@pytest.mark.parametrize("dense", [False, True])
def test_whole_modules_are_pickled(dense):
    layer = mom.Mamba(16, memory="lean", layer_idx=3) if dense else mom.MixtureOfMamba(16, 3, memory="lean")
    file = io.BytesIO()
    torch.save(layer.eval(), file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert_marked(twin)
    assert (type(twin), twin.memory, twin.layer_idx, twin.training) == (type(layer), "lean", layer.layer_idx, False)
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16)
    assert torch.equal(twin(x, ids), layer(x, ids))
    state = layer(x, ids, return_state=True)[1]
    again = pickle.loads(pickle.dumps(state.detach()))
    assert torch.equal(again.ssm, state.ssm) and torch.equal(again.conv, state.conv)


# Trained


@pytest.mark.parametrize("way", WAYS)
def test_an_absent_modality_has_zero_gradients(way, options):
    layer = watch(make_layer(bias=True, **options), way)
    x, ids = torch.randn(2, 9, 16).double(), 2 * random_ids(2, 9, 2, padding=False)
    ids[0, 3] = -1
    layer(x, ids).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (re.search(r"_proj\.1\.", name) is None), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("memory", ["default", "lean"])
def test_activation_checkpointing_is_bitwise_equal(memory, way, options):
    layer = watch(mom.MixtureOfMamba(16, 3, memory=memory, **options), way)
    ids, x = random_ids(2, 40, 3), torch.randn(2, 40, 16, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(2, 40, 16)
    y = checkpoint(layer, x, ids, use_reentrant=False)
    expected = torch.autograd.grad(layer(x, ids), leaves, grad)
    for got, wanted in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("way", WAYS)
def test_selective_activation_checkpointing_is_bitwise_equal(way, options):
    """The operators of sac_save_list are kept, the rest is computed again."""
    layer = watch(mom.MixtureOfMamba(16, 3, **options), way)
    ids, x = random_ids(2, 40, 3), torch.randn(2, 40, 16, requires_grad=True)
    leaves, grad = [x, *layer.parameters()], torch.randn(2, 40, 16)
    contexts = functools.partial(create_selective_checkpoint_contexts, mom.sac_save_list())
    y = checkpoint(layer, x, ids, use_reentrant=False, context_fn=contexts)
    expected = torch.autograd.grad(layer(x, ids), leaves, grad)
    for got, wanted in zip(torch.autograd.grad(y, leaves, grad), expected, strict=True):
        assert torch.equal(got, wanted)


def test_a_frozen_modality(options):
    layer = make_layer(**options)
    ids, x = random_ids(2, 12, 3), torch.randn(2, 12, 16).double()
    layer(x, ids).square().sum().backward()
    expected = {name: p.grad for name, p in layer.named_parameters()}
    layer.zero_grad()
    frozen = {name for name in expected if re.search(r"_proj\.1\.", name)}
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    layer(x, ids).square().sum().backward()
    for name, parameter in layer.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        else:
            assert parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, expected[name])


def test_learning_rates_per_modality():
    layer = make_layer()
    rates = {"0": 0.0, "1": 1e-2, "2": 1e-3}
    groups = {}
    for name, parameter in layer.named_parameters():
        modality = re.search(r"_proj\.(\d+)\.", name)
        groups.setdefault(modality and modality[1], []).append((name, parameter))
    assert {key: len(group) for key, group in groups.items()} == {None: 4, "0": 5, "1": 5, "2": 5}
    optimizer = torch.optim.SGD([{"params": group, "lr": rates.get(key, 0.1)} for key, group in groups.items()])
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, 12, 16).double(), random_ids(2, 12, 3)).square().sum().backward()
    optimizer.step()
    for key, group in groups.items():
        for name, parameter in group:
            torch.testing.assert_close(parameter, before[name] - rates.get(key, 0.1) * parameter.grad)
            assert parameter.grad.any()


class LoRA(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features, dtype=base.weight.dtype))
        self.B = nn.Parameter(torch.randn(base.out_features, rank, dtype=base.weight.dtype))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("decouple", [PROJECTIONS, ()], ids=["per modality", "shared"])
def test_adapters_written_by_hand(name, decouple):
    layer = make_layer(decouple=decouple)
    merged, adapters = copy.deepcopy(layer), []
    for child in [f"{name}.{m}" for m in range(3)] if decouple else [name]:
        adapters.append(LoRA(layer.get_submodule(child)))
        layer.set_submodule(child, adapters[-1])
        with torch.no_grad():
            merged.get_submodule(child).weight.add_(adapters[-1].B @ adapters[-1].A)
    ids, x = random_ids(2, 12, 3), torch.randn(2, 12, 16).double()
    y = layer(x, ids)
    torch.testing.assert_close(y, merged(x, ids))
    y.square().sum().backward()
    for adapter in adapters:
        assert adapter.A.grad.any() and adapter.B.grad.any()
        assert adapter.base.weight.grad is None
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, ids), y)
    assert all(p._no_weight_decay for n, p in twin.dt_proj.named_parameters() if n.endswith("bias"))


# Decoded with a cache of all layers


def cache():
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)


@pytest.mark.parametrize("tokens", [1, 2])
def test_decoding_with_inference_params(tokens, options, device):
    layers = [make_layer(layer_idx=i, **options).float().to(device) for i in (4, 7)]
    ids, x = random_ids(2, 12, 3).to(device), torch.randn(2, 12, 16, device=device)
    with torch.no_grad():
        expected = layers[1](layers[0](x, ids), ids)
    params, parts = cache(), []
    for begin, end in ((0, 8), *((t, t + tokens) for t in range(8, 12, tokens))):
        h = x[:, begin:end]
        for layer in layers:
            h = layer(h, ids[:, begin:end], inference_params=params)
        parts.append(h.detach())
        params.seqlen_offset = end
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-4)
    assert set(params.key_value_memory_dict) == {4, 7}
    for layer in layers:
        state = params.key_value_memory_dict[layer.layer_idx]
        assert isinstance(state, mom.MambaState) and not state.ssm.requires_grad
        _, last = layer(x, ids, return_state=True)
        torch.testing.assert_close(state.ssm, last.ssm, atol=1e-5, rtol=1e-4)
        x = layer(x, ids)


def test_decoding_the_dense_block_and_by_masks():
    dense, params, x = mom.Mamba(16, layer_idx=0), cache(), torch.randn(2, 5, 16)
    first = dense(x[:, :4], inference_params=params)
    params.seqlen_offset = 4
    last = dense(x[:, 4:], inference_params=params)
    torch.testing.assert_close(torch.cat([first, last], 1), dense(x), atol=1e-5, rtol=1e-4)
    layer, params = mom.MixtureOfMamba(16, 2, layer_idx=0), cache()
    masks = torch.tensor([[[1, 1, 0, 0, 1]] * 2, [[0, 0, 1, 1, 0]] * 2]).bool()
    first = layer(x[:, :4], modality_masks=masks[..., :4], inference_params=params)
    params.seqlen_offset = 4
    last = layer(x[:, 4:], 0, inference_params=params)
    torch.testing.assert_close(torch.cat([first, last], 1), layer(x, modality_masks=masks), atol=1e-5, rtol=1e-4)


def test_a_second_prefill_begins_anew():
    """In the tensors of the first where they fit, for a captured graph; in others where the batch is another."""
    layer, params, calls = mom.MixtureOfMamba(16, 2, layer_idx=1), cache(), []
    layer.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 6, 16)
    layer(x[:2], 0, inference_params=params)
    assert len(calls) == 1
    kept = params.key_value_memory_dict[1]
    y = layer(x[1:], 1, inference_params=params)
    assert params.key_value_memory_dict[1] is kept
    expected, state = layer(x[1:], 1, return_state=True)
    assert torch.equal(y, expected) and torch.equal(kept.ssm, state.ssm) and torch.equal(kept.conv, state.conv)
    layer(x, 1, inference_params=params)
    assert params.key_value_memory_dict[1].ssm.shape[0] == 3 and kept.ssm.shape[0] == 2


def test_errors_of_inference_params():
    x, layer = torch.randn(1, 2, 8), mom.MixtureOfMamba(8, 2, layer_idx=5)
    with pytest.raises(ValueError, match=r"inference_params must come to a layer made with layer_idx.* got None"):
        mom.MixtureOfMamba(8, 2)(x, 0, inference_params=cache())
    started = cache()
    started.seqlen_offset = 3
    with pytest.raises(ValueError, match=r"must hold the MambaState of layer 5 when seqlen_offset is 3, got NoneType"):
        layer(x, 0, inference_params=started)
    bounds = torch.tensor([0, 2], dtype=torch.int32)
    others = {"return_state": True, "sorted": True, "state": layer.allocate_state(1), "cu_seqlens": bounds}
    for name, value in others.items():
        with pytest.raises(ValueError, match=r"inference_params must come without sorted, cu_seqlens, state and"):
            layer(x, 0, inference_params=cache(), **{name: value})
