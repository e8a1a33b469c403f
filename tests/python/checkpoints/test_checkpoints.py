# SPDX-License-Identifier: Apache-2.0
"""State dicts of other libraries go in and out unchanged, and what does not fit is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba import checkpoints
from mixture_of_mamba.nn import PROJECTIONS

ROOT = Path(__file__).resolve().parents[3]
GUIDE = ROOT / "docs/checkpoints.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
DENSE_NAMES = {
    *("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias"),
    *("in_proj.weight", "x_proj.weight", "out_proj.weight"),
}
SUBSETS = [PROJECTIONS, ("in_proj",), ("dt_proj", "x_proj"), ("in_proj", "out_proj"), ()]


def make(decouple=PROJECTIONS, **options):
    """A layer with random values in every parameter, and none of them the initial ones."""
    layer = mom.MixtureOfMamba(16, 2, decouple, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if "dt_proj" not in layer.decouple:
            layer.dt_proj.bias.zero_()
    return layer


def published_names(decouple):
    """The names of the published layer, written down from its constructor."""
    names = {"A_log", "D", "conv1d.weight", "conv1d.bias"}
    for projection in PROJECTIONS:
        leaves = ["weight", "bias"] if projection == "dt_proj" else ["weight"]
        stems = [f"local_experts_{projection}.{m}" for m in range(2)] if projection in decouple else [projection]
        names |= {f"{stem}.{leaf}" for stem in stems for leaf in leaves}
    return names


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def marks(layer):
    return {name: vars(parameter) for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("decouple", SUBSETS, ids="+".join)
@pytest.mark.parametrize("bias", [False, True])
def test_published_round_trip(decouple, bias):
    layer = make(decouple, bias=bias)
    theirs = checkpoints.convert(layer.state_dict(), target="published")
    if not bias:
        assert set(theirs) == published_names(decouple)
    assert_same_tensors(checkpoints.convert(theirs, source="published"), layer.state_dict())
    other = make(decouple, bias=bias)
    checkpoints.load(other, theirs, "published")
    assert_same_tensors(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("format", ["mamba_ssm", "transformers"])
@pytest.mark.parametrize("make_dense", [lambda: mom.Mamba(16), lambda: make(())], ids=["Mamba", "mixture"])
def test_dense_round_trip(format, make_dense):
    layer, other = make_dense(), make_dense()
    theirs = checkpoints.convert(layer.state_dict(), target=format)
    assert set(theirs) == DENSE_NAMES
    checkpoints.load(other, theirs, format)
    assert_same_tensors(other.state_dict(), layer.state_dict())


@pytest.mark.parametrize("source", checkpoints.FORMATS)
@pytest.mark.parametrize("target", checkpoints.FORMATS)
def test_a_dense_layer_passes_between_all_formats(source, target):
    given = checkpoints.convert(make(()).state_dict(), target=source)
    assert_same_tensors(checkpoints.convert(given, source, target), given)


def test_tensors_are_passed_on_by_convert_and_copied_by_load():
    layer, other = make(), make()
    converted = checkpoints.convert(layer.state_dict(), target="published")
    assert converted["local_experts_in_proj.1.weight"].data_ptr() == layer.in_proj[1].weight.data_ptr()
    checkpoints.load(other, converted, "published")
    assert other.in_proj[1].weight.data_ptr() != layer.in_proj[1].weight.data_ptr()


def test_one_layer_of_a_model():
    layer, other = make(), make()
    model = {
        f"layers.3.mixer.{name}": t for name, t in checkpoints.convert(layer.state_dict(), "mixture_of_mamba").items()
    }
    model |= {"layers.3.norm.weight": torch.ones(16), "layers.31.mixer.D": torch.ones(32)}
    checkpoints.load(other, model, prefix="layers.3.mixer.")
    assert_same_tensors(other.state_dict(), layer.state_dict())
    theirs = checkpoints.convert(model, target="published", prefix="layers.3.mixer.")
    assert set(theirs) == published_names(PROJECTIONS)


def test_the_published_layer_does_not_add_the_bias_of_a_shared_dt_proj():
    layer = make(("in_proj",))
    theirs = checkpoints.convert(layer.state_dict(), target="published")
    theirs["dt_proj.bias"] = torch.randn(32)
    assert not checkpoints.convert(theirs, source="published")["dt_proj.bias"].any()
    assert torch.equal(checkpoints.convert(theirs, "published", "published")["dt_proj.bias"], theirs["dt_proj.bias"])
    checkpoints.load(layer, theirs, "published")
    assert not layer.dt_proj.bias.any()
    layer.dt_proj.bias.data[3] = 1.0
    with pytest.raises(ValueError, match=r"dt_proj.bias must be zeros.*does not add.* got other values"):
        checkpoints.convert(layer.state_dict(), target="published")


def test_the_report_names_everything_at_once_and_nothing_changes():
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    theirs = {f"mixer.{k}": v for k, v in checkpoints.convert(make().state_dict(), target="published").items()}
    del theirs["mixer.D"], theirs["mixer.local_experts_x_proj.1.weight"]
    theirs["mixer.conv1d.weight"] = torch.zeros(32, 1, 5)
    theirs["mixer.A_log"] = torch.zeros(32, 16, device="meta")
    theirs["mixer.router.weight"] = theirs["mixer.local_experts_x_proj.2.weight"] = torch.zeros(1)
    with pytest.raises(checkpoints.CheckpointError) as caught:
        checkpoints.load(layer, theirs, "published", prefix="mixer.")
    error = caught.value
    assert set(error.missing) == {"mixer.D", "mixer.local_experts_x_proj.1.weight"}
    assert set(error.unexpected) == {"mixer.router.weight", "mixer.local_experts_x_proj.2.weight"}
    assert error.mismatched == {
        "mixer.conv1d.weight": "must have shape [32, 1, 4], got [32, 1, 5]",
        "mixer.A_log": "must have values, got a tensor on the meta device",
    }
    for name in (*error.missing, *error.unexpected, *error.mismatched):
        assert name in str(error)
    assert 'format "published"' in str(error) and "num_modalities=2" in str(error)
    assert_same_tensors(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checkpoints.convert({}, "hf"), r"format must be one of \('mixture_of_mamba', .*got 'hf'"),
        (lambda: checkpoints.load(make(), {}, "hf"), r"format must be one of .*got 'hf'"),
        (
            lambda: checkpoints.convert(make(("x_proj",)).state_dict(), target="mamba_ssm"),
            r'"mamba_ssm" has one weight per projection(?s:.)*unexpected: x_proj.0.weight, x_proj.1.weight',
        ),
        (lambda: checkpoints.convert({"layers.0.D": torch.ones(1)}), r"(?s)unexpected: layers.0.D.*with prefix"),
        (
            lambda: checkpoints.load(make(), mom.Mamba(16).state_dict(), "mamba_ssm"),
            r"(?s)missing: in_proj.0.weight.*unexpected: in_proj.weight.*upcycle",
        ),
        (
            lambda: checkpoints.upcycle(make(), 2),
            r"dense must have no projection per modality, got decouple=\('in_proj",
        ),
        (lambda: checkpoints.upcycle(mom.Mamba(16), -1), r"num_modalities must be at least 1, got -1"),
        (lambda: checkpoints.upcycle(mom.Mamba(16), 2, ("conv",)), r"decouple must name projections .*'conv'"),
        (lambda: checkpoints.add_modality(make(), like=2), r"like must be a modality of the layer, 0 .. 1, got 2"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("meta", [False, True])
def test_a_layer_keeps_its_dtypes_and_marks(meta):
    theirs = {name: tensor.bfloat16() for name, tensor in make().state_dict().items()}
    layer = mom.MixtureOfMamba(16, 2, dtype=torch.float16, device="meta" if meta else None)
    layer.out_proj.requires_grad_(False)
    before, parameters = marks(layer), dict(layer.named_parameters())
    dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
    checkpoints.load(layer, theirs)
    assert before["A_log"] and before["dt_proj.1.bias"]
    assert marks(layer) == before
    for name, parameter in layer.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.device.type == "cpu"
        assert (parameter is parameters[name]) != meta
        assert parameter.dtype == dtypes[name]
        assert parameter.requires_grad != name.startswith("out_proj")
        assert torch.equal(parameter, theirs[name].to(parameter.dtype))
    assert layer.A_log.dtype == torch.float32


def test_names_alone_can_be_converted_and_loaded_on_meta():
    theirs = checkpoints.convert(
        mom.MixtureOfMamba(16, 2, ("in_proj",), device="meta").state_dict(), target="published"
    )
    layer = mom.MixtureOfMamba(16, 2, ("in_proj",), device="meta")
    checkpoints.load(layer, theirs, "published")
    assert all(parameter.is_meta for parameter in layer.parameters())


@pytest.mark.cuda
def test_from_cpu_to_gpu_and_back():
    layer, other = make().cuda(), make()
    theirs = checkpoints.convert(make().state_dict(), target="published")
    checkpoints.load(layer, theirs, "published")
    assert all(parameter.is_cuda for parameter in layer.parameters())
    checkpoints.load(other, checkpoints.convert(layer.state_dict(), target="published"), "published")
    assert_same_tensors(checkpoints.convert(other.state_dict(), target="published"), theirs)
    assert all(parameter.is_cuda for parameter in checkpoints.add_modality(layer).parameters())


def test_transformers_mixer():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = transformers.MambaConfig(
        hidden_size=24, state_size=8, num_hidden_layers=1, conv_kernel=3, expand=2, time_step_rank=5, use_bias=True
    )
    mixer = MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    layer = mom.Mamba(24, d_state=8, d_conv=3, dt_rank=5, bias=True)
    model = {f"backbone.layers.0.mixer.{name}": tensor for name, tensor in mixer.state_dict().items()}
    checkpoints.load(layer, model, "transformers", prefix="backbone.layers.0.mixer.")
    x = torch.randn(2, 19, 24)
    torch.testing.assert_close(layer(x), mixer(x), rtol=1e-5, atol=1e-5)
    mixer.load_state_dict(checkpoints.convert(layer.state_dict(), target="transformers"))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_language_model(tied):
    """With what the guide shows: logits and gradients to 1e-5 in float32, there and back."""
    transformers = pytest.importorskip("transformers")
    guide = next(code for code in SNIPPETS if "def from_transformers" in code)
    exec(compile(guide, GUIDE.name, "exec"), recipe := {})
    config = transformers.MambaConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, state_size=6, tie_word_embeddings=tied, use_cache=False
    )
    theirs = transformers.MambaForCausalLM(config).train()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = recipe["like_transformers"](config)
    recipe["from_transformers"](ours, theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    tokens, weights = torch.randint(0, 40, (2, 13)), torch.randn(2, 13, 40)
    logits = [ours(tokens), theirs(tokens).logits]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for one in logits:
        (one * weights).sum().backward()
    around, mixers = recipe["names"](ours)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.mixers\.0\.(.*)", name)
        expected = gradients[around[name] if found is None else mixers[int(found[1])] + found[2]]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())

    back = transformers.MambaForCausalLM(config)
    back.load_state_dict(recipe["to_transformers"](ours))
    torch.testing.assert_close(back(tokens).logits, logits[0], rtol=1e-5, atol=1e-5)


def test_the_guide_runs():
    for snippet in SNIPPETS:
        exec(compile(snippet, GUIDE.name, "exec"), {})
