# SPDX-License-Identifier: Apache-2.0
"""What libraries put in a projection's place: adapters of peft, parametrisations, quantised linears. Same numbers."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from layer_support import is_one_operator, make_layer, random_ids
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS

LAYERS = {
    "per modality": {},
    "shared": {"decouple": ()},
    "with shared experts": {"shared_expert": PROJECTIONS},
    "mixed, with limits": {"decouple": ("in_proj", "dt_proj", "D"), "dt_limit": (0.001, 0.1)},
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
each_kind = pytest.mark.parametrize(
    "options", [{"decouple": ()}, {"shared_expert": PROJECTIONS}], ids=["shared", "all"]
)
each_projection = pytest.mark.parametrize("name", PROJECTIONS)


def linears(layer, name=""):
    return {n: m for n, m in layer.named_modules() if type(m) is nn.Linear and n.startswith(name)}


def problem(padding=True):
    return torch.randn(2, 12, 16), random_ids(2, 12, 3, padding=padding)


# Adapters of peft


def adapted(layer, targets=None):
    """With adapters that already do something: peft's begin at zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=targets or list(linears(layer)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(layer, config)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.normal_(std=0.2)
    return model, adapters


@each_layer
def test_adapters_of_peft_reach_every_projection(options):
    """The model with adapters, and what peft merges them into, which the fast way computes."""
    layer = make_layer(**options).float()
    number, (x, ids) = len(linears(layer)), problem()
    model, adapters = adapted(layer)
    assert len(adapters) == 2 * number
    y = model(x, ids)
    y.square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapters.values())
    merged = copy.deepcopy(model).merge_and_unload()
    assert linears(merged).keys() == linears(make_layer(**options)).keys()
    assert is_one_operator(merged, x, None) == ("dt_limit" not in options)
    torch.testing.assert_close(y, merged(x, ids), atol=2e-5, rtol=1e-4)


@each_projection
def test_adapters_of_peft_on_one_modality(name):
    layer, (x, ids) = make_layer().float(), problem(padding=False)
    before = layer(x, ids)
    model, adapters = adapted(layer, rf"{name}\.1")
    assert len(adapters) == 2
    without = torch.where(ids == 1, 0, ids)
    torch.testing.assert_close(model(x, without), make_twin(model)(x, without), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(x, ids), before)
    model(x, ids).square().sum().backward()
    assert all(parameter.grad.any() for parameter in adapters.values())


def make_twin(model):
    """The layer below the adapters."""
    return copy.deepcopy(model).unload()


def test_adapters_of_peft_see_no_tokens_of_an_absent_modality():
    layer, (x, ids) = make_layer().float(), problem()
    model, adapters = adapted(layer)
    model(x, ids.clamp(max=1)).square().sum().backward()
    for name, parameter in adapters.items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("_proj.2." not in name), name


def test_adapters_of_peft_are_saved_and_stepped(tmp_path):
    peft = pytest.importorskip("peft")
    layer, (x, ids) = make_layer().float(), problem()
    base = copy.deepcopy(layer)
    model, _ = adapted(layer)
    state = layer.allocate_state(2)
    steps = [layer.step(x[:, t : t + 1], state, ids[:, t : t + 1]) for t in range(12)]
    torch.testing.assert_close(torch.cat(steps, 1), model(x, ids).detach(), atol=2e-5, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(loaded(x, ids), model(x, ids))


# Parametrisations


@each_kind
@each_projection
@pytest.mark.parametrize("kind", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights(options, name, kind):
    """Against plain linears that hold the weights of the moment; gradients reach what the weights are made of."""
    layer, (x, ids) = make_layer(**options).eval(), problem()
    x, plain = x.double(), copy.deepcopy(layer)
    for child_name, child in linears(layer, name).items():
        kind(child)
        plain.get_submodule(child_name).weight.data.copy_(child.weight)
    assert not is_one_operator(layer, x, None)
    torch.testing.assert_close(layer(x, ids), plain(x, ids))
    layer(x, ids).square().sum().backward()
    originals = [p for n, p in layer.named_parameters() if "parametrizations" in n]
    assert originals and all(parameter.grad.any() for parameter in originals)
    for module in list(layer.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    assert is_one_operator(layer, x, None)
    torch.testing.assert_close(layer(x, ids), plain(x, ids))


@each_kind
@pytest.mark.parametrize(
    "kind",
    [
        nn.utils.weight_norm,
        parametrizations.weight_norm,
        lambda m: prune.random_unstructured(m, "weight", 0.5),
        lambda m: prune.random_unstructured(m, "bias", 0.5),
    ],
    ids=["weight_norm", "parametrised", "pruned weight", "pruned bias"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_convolution_whose_weight_hooks_make(options, kind):
    """The module is not called, but what is made before each call is made."""
    layer, (x, ids) = make_layer(**options), problem()
    x, plain = x.double(), copy.deepcopy(layer)
    kind(layer.conv1d)
    layer.conv1d.register_forward_pre_hook(lambda module, arguments: arguments[0])  # of somebody else: not called
    for _ in range(2):
        plain.conv1d.weight.data.copy_(layer.conv1d.weight)
        plain.conv1d.bias.data.copy_(layer.conv1d.bias)
        y = layer(x, ids)
        torch.testing.assert_close(y, plain(x, ids))
        y.square().sum().backward()
        made_of = [p for n, p in layer.conv1d.named_parameters() if n not in ("weight", "bias")]
        assert made_of and all(parameter.grad.any() for parameter in made_of)
        with torch.no_grad():
            for parameter in made_of:
                parameter -= 0.1 * parameter.grad
            layer(x, ids)  # makes the weight of what has changed


# Quantised linears


def quantised(linear):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return torch.ao.nn.quantized.dynamic.Linear.from_float(linear)


needs_engine = pytest.mark.skipif(
    torch.backends.quantized.engine in (None, "none"), reason="torch without a quantised engine"
)


@needs_engine
@each_kind
@each_projection
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linears_of_torch(options, name):
    """int8 weights and activations: the layer in float32 up to their error, forward and token by token."""
    layer, (x, ids) = make_layer(**options).float(), problem()
    with torch.no_grad():
        expected = layer(x, ids)
        for child_name, child in linears(layer, name).items():
            layer.set_submodule(child_name, quantised(child))
        assert not is_one_operator(layer, x, None)
        y = layer(x, ids)
        assert 0 < (y - expected).norm() <= 0.05 * expected.norm()
        assert not y[ids < 0].any()
        absent = layer(x, torch.zeros_like(ids))
        assert absent.isfinite().all()
        # One row at a time a row's scale is its own, so the numbers differ within the same error.
        state = layer.allocate_state(2)
        steps = [layer.step(x[:, t : t + 1], state, ids[:, t : t + 1]) for t in range(12)]
        assert (torch.cat(steps, 1) - expected).norm() <= 0.05 * expected.norm()


@needs_engine
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_whole_layer_quantised_by_torch():
    layer, (x, ids) = mom.MixtureOfMamba(64, 3, shared_expert=("in_proj",)), problem()
    x = torch.randn(2, 12, 64)
    other = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear})
    assert not linears(other) and linears(layer)
    with torch.no_grad():
        expected = layer(x, ids)
        assert (other(x, ids) - expected).norm() <= 0.06 * expected.norm()
