# SPDX-License-Identifier: Apache-2.0
"""transformers' Mamba-1 models on this library: equal to transformers' own code in logits, gradients and tokens."""

from __future__ import annotations

import contextlib
import importlib
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_mamba.integrations import transformers as switch

transformers = pytest.importorskip("transformers")

VOCABULARY = 60
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
STATE_SPACE = {"num_hidden_layers": 2, "state_size": 5, "conv_kernel": 4, "expand": 2, "time_step_rank": 3}
HYBRID = {
    "num_hidden_layers": 6,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_dt_rank": 3,
    "attn_implementation": "eager",
}
CONFIGS = {
    "mamba": ("Mamba", STATE_SPACE | {"use_bias": True}),
    "falcon_mamba": ("FalconMamba", STATE_SPACE),
    "jamba": ("Jamba", HYBRID | {"num_experts": 1, "num_experts_per_tok": 1}),
    "zamba": ("Zamba", HYBRID | {"n_mamba_heads": 2, "use_mem_rope": False}),
}
MODELS = list(CONFIGS)


@pytest.fixture(autouse=True)
def off_afterwards():
    yield
    switch.disable()


def make(name, **changes):
    prefix, sizes = CONFIGS[name]
    config = getattr(transformers, f"{prefix}Config")(**(COMMON | sizes | changes))
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays at zero or one, where a missing factor would hide
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(length=17):
    """Tokens with padding on the left of one row, and the mask that says so."""
    tokens = torch.randint(2, VOCABULARY, (2, length))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    return tokens.masked_fill(mask == 0, 0), mask


class OperatorNames(TorchDispatchMode):
    """The names of this library's operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "mixture_of_mamba":
            self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


def forbid_fallbacks(name, monkeypatch):
    """transformers' own functions fail from here on, so that enable() must have replaced them in every call."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")

    def fail(*args, **kwargs):
        raise AssertionError("a fallback was called")

    for function in (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba_selective_scan",
        "mamba_selective_state_update",
    ):
        monkeypatch.setattr(module, function, fail)


def losses_and_gradients(model, tokens, mask):
    model.train()
    model.zero_grad()
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    out = model(tokens, attention_mask=mask, labels=labels, use_cache=False)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_training(name, masked, monkeypatch):
    model = make(name)
    tokens, mask = batch()
    mask = mask if masked else None
    expected, wanted = losses_and_gradients(model, tokens, mask)
    forbid_fallbacks(name, monkeypatch)
    with switch.enabled():
        logits, gradients = losses_and_gradients(model, tokens, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == wanted.keys()
    for parameter, gradient in gradients.items():
        scale = max(wanted[parameter].abs().max().item(), 1e-3)
        torch.testing.assert_close(
            gradient / scale,
            wanted[parameter] / scale,
            rtol=1e-5,
            atol=1e-5,
            msg=lambda m, parameter=parameter: f"{parameter}: {m}",
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_logits_of_every_step(name, masked, monkeypatch):
    model = make(name).eval()
    tokens, mask = batch(7)
    options = {
        "attention_mask": mask if masked else torch.ones_like(mask),
        "max_new_tokens": 12,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    expected = model.generate(tokens, **options)
    forbid_fallbacks(name, monkeypatch)
    with switch.enabled(), OperatorNames() as operators:
        out = model.generate(tokens, **options)
    assert {"causal_conv1d", "selective_scan", "selective_scan_step"} <= operators.names
    assert torch.equal(out.sequences, expected.sequences)
    assert out.sequences.shape == (2, 7 + 12)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(expected.logits), rtol=1e-5, atol=1e-5)


def test_the_padding_mask_matters_in_training():
    """With the mask, real tokens do not see what a padded position holds; without it, they do."""
    model = make("mamba")
    tokens, mask = batch()
    with switch.enabled():
        masked, _ = losses_and_gradients(model, tokens, mask)
        other, _ = losses_and_gradients(model, torch.where(mask == 0, 9, tokens), mask)
        unmasked, _ = losses_and_gradients(model, torch.where(mask == 0, 9, tokens), None)
    torch.testing.assert_close(masked[1, 5:], other[1, 5:], rtol=1e-5, atol=1e-5)
    assert (masked[1, 5:] - unmasked[1, 5:]).abs().max() > 1e-3


def test_hooks_of_projections_are_called_in_training():
    """As adapters need: nothing reads the weights past their modules."""
    model, called = make("mamba"), set()
    mixer = model.backbone.layers[0].mixer
    for name in ("in_proj", "x_proj", "out_proj"):
        getattr(mixer, name).register_forward_hook(lambda *args, name=name: called.add(name))
    with switch.enabled():
        losses_and_gradients(model, *batch())
    assert called == {"in_proj", "x_proj", "out_proj"}


def test_adapters_of_peft_train_as_with_transformers():
    peft = pytest.importorskip("peft")
    targets = ["in_proj", "x_proj"]  # peft refuses out_proj in these models; transformers reads dt_proj's weight itself
    model = peft.get_peft_model(make("mamba"), peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    tokens, mask = batch()
    expected, wanted = losses_and_gradients(model, tokens, mask)
    with switch.enabled():
        logits, gradients = losses_and_gradients(model, tokens, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert len(gradients) == 2 * len(targets) * STATE_SPACE["num_hidden_layers"]
    for name, gradient in gradients.items():
        assert "lora" in name and gradient.abs().max() > 0
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * wanted[name].abs().max().item())


def test_a_mixer_of_real_size_takes_no_seconds():
    """1 x 512 tokens of width 512, there and back: 0.07 s on two quiet cores, 14 s with transformers' own loop."""
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixer, x = MambaMixer(transformers.MambaConfig(hidden_size=512), layer_idx=0), torch.randn(1, 512, 512)
    seconds = []
    with switch.enabled():
        for _ in range(4):
            start = time.perf_counter()
            mixer(x).sum().backward()
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_another_activation_and_width():
    model = make("mamba", hidden_act="gelu", conv_kernel=6)
    tokens, mask = batch()
    expected, _ = losses_and_gradients(model, tokens, mask)
    with switch.enabled(), OperatorNames() as operators:
        logits, _ = losses_and_gradients(model, tokens, mask)
    assert "selective_scan" in operators.names and "causal_conv1d" not in operators.names
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("no_grad", [False, True])
def test_a_step_that_needs_gradients_has_them(no_grad):
    model = make("mamba").eval()
    tokens, _ = batch(5)
    with switch.enabled():
        with torch.no_grad():
            cache = model(tokens, use_cache=True).cache
        with torch.no_grad() if no_grad else contextlib.nullcontext():
            logits = model(tokens[:, -1:], cache=cache, use_cache=True).logits
    assert logits.requires_grad is not no_grad


def test_bfloat16():
    """Against float32: transformers' own code rounds its states to bfloat16, so it is no measure."""
    model = make("mamba")
    tokens, mask = batch()
    expected, _ = losses_and_gradients(model, tokens, mask)
    model = model.to(torch.bfloat16)
    with switch.enabled():
        logits, gradients = losses_and_gradients(model, tokens, mask)
    torch.testing.assert_close(logits.float(), expected, rtol=5e-2, atol=5e-2)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_compiled_forward_is_one_graph():
    mixer = make("mamba").backbone.layers[0].mixer.eval()
    x = torch.randn(2, 9, 24)
    with switch.enabled(), torch.no_grad():
        expected = mixer(x)
        torch.testing.assert_close(torch.compile(mixer, fullgraph=True, backend="eager")(x), expected)


def test_serves_all_four_and_restores():
    modules = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in MODELS]
    before = [dict(vars(module)) for module in modules]
    assert switch.enable() == tuple(MODELS)
    switch.disable()
    assert [{k: v for k, v in vars(m).items() if k in was} for m, was in zip(modules, before, strict=True)] == before
