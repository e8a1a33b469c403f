# SPDX-License-Identifier: Apache-2.0
"""Adapters to copy: other libraries' models with this library's layer in the place of attention learn a batch."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

FOLDER = Path(__file__).resolve().parents[3] / "examples/python/integrations"
STEPS = 12


def adapter(name, needed):
    pytest.importorskip(needed)
    spec = importlib.util.spec_from_file_location(f"integrations_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses(model, loss):
    """Of a few steps. Every parameter of the mixers has a gradient in the first."""
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if step == 0:
            mixers = {name: p.grad for name, p in model.named_parameters() if ".mamba." in name}
            assert mixers and all(gradient is not None and gradient.any() for gradient in mixers.values())
        optimizer.step()
        values.append(value.item())
    return values


IMAGE_IDS = torch.arange(4, 21)


@pytest.fixture
def chameleon():
    ours = adapter("transformers_chameleon", "transformers")
    transformers = pytest.importorskip("transformers")
    codes = {f"IMGIMGA{chr(65 + i)}Z": 5 + i for i in range(16)}
    pictures = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 8, "base_channels": 32, "resolution": 8}
    config = transformers.ChameleonConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocabulary_map={"<image>": 4, **codes},
        vq_config=pictures | {"channel_multiplier": [1], "num_res_blocks": 1},
    )
    return ours, ours.use_mixture_of_mamba(transformers.ChameleonForConditionalGeneration(config))


def stream():
    """Text, six image codes, text; the second row begins with padding."""
    tokens = torch.randint(22, 64, (2, 14))
    tokens[:, 4:10] = torch.randint(5, 21, (2, 6))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return tokens, mask


def test_chameleon_of_transformers_learns(chameleon):
    ours, model = chameleon
    tokens, mask = stream()
    routing = ours.routing_of(tokens, mask, IMAGE_IDS)
    assert routing.host_offsets.tolist() == [0, 13, 25]
    targets = tokens.masked_fill(mask == 0, -100)[:, 1:].flatten()

    def loss():
        hidden = model.model(tokens, attention_mask=mask, use_cache=False, modality=routing).last_hidden_state
        return F.cross_entropy(model.lm_head(hidden)[:, :-1].flatten(0, 1), targets)

    values = losses(model, loss)
    assert values[-1] < 0.8 * values[0]


def test_chameleon_of_transformers_uses_what_it_is_told(chameleon):
    ours, model = chameleon
    tokens, mask = stream()
    model.eval()

    def logits(tokens, mask):
        routing = ours.routing_of(tokens, mask, IMAGE_IDS)
        return model(tokens, attention_mask=mask, use_cache=False, modality=routing).logits.detach()

    whole = logits(tokens, mask)
    torch.testing.assert_close(whole[1, 3:], logits(tokens[1:, 3:], None)[0], atol=1e-5, rtol=1e-4)
    changed = tokens.clone()
    changed[:, 12] = 22 + (changed[:, 12] - 21) % 42
    assert torch.equal(logits(changed, mask)[:, :12], whole[:, :12])  # causal
    text_only = whole.new_full((), torch.finfo(whole.dtype).min)
    assert (whole[..., 5:21] == text_only).all()  # transformers' rule, named in the adapter
    labels = tokens.masked_fill(torch.isin(tokens, IMAGE_IDS), -100)
    routing = ours.routing_of(tokens, None, IMAGE_IDS)
    model.gradient_checkpointing_enable()
    model.train()
    model(tokens, labels=labels, use_cache=False, modality=routing).loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if ".mamba." in name)


def interleaved():
    text = [torch.randint(0, 32, (length,)) for length in (6, 3, 9, 2)]
    pictures, sounds = torch.randn(4, 8), torch.randn(2, 2, 6)
    return [[text[0], (0, pictures), text[1], (1, sounds[0])], [text[2], (1, sounds[1]), text[3]]]


@pytest.fixture
def transfusion():
    ours = adapter("transfusion", "transfusion_pytorch")
    transformer = {"dim": 32, "depth": 2, "dim_head": 8, "heads": 2}
    model = pytest.importorskip("transfusion_pytorch").Transfusion(
        num_text_tokens=32, dim_latent=(8, 6), modality_default_shape=((4,), (2,)), transformer=transformer
    )
    ours.use_mixture_of_mamba(model.transformer, num_types=2)
    return model


@pytest.mark.filterwarnings("ignore")
def test_transfusion_learns(transfusion):
    batch = interleaved()

    def loss():
        torch.manual_seed(1)  # the same noise and times in every step
        return transfusion(batch)

    values = losses(transfusion, loss)
    assert values[-1] < 0.9 * values[0]
    routing = transfusion.transformer.layers[1][1].fn.modality
    text, pictures, sounds = routing.host_offsets.diff().tolist()
    assert (pictures, sounds) == (4, 4) and text + 8 == routing.num_tokens


@pytest.mark.filterwarnings("ignore")
def test_transfusion_of_one_kind_and_its_average(transfusion):
    """Text alone and latents alone come without positions; an average of the weights is a deepcopy."""
    transfusion(torch.randint(0, 32, (2, 8))).backward()
    assert transfusion.transformer.layers[0][1].fn.modality == 0
    transfusion(torch.randn(2, 4, 8), modality_type=0).backward()
    assert transfusion.transformer.layers[0][1].fn.modality == 1
    twin, batch = copy.deepcopy(transfusion), interleaved()
    values = []
    for model in (transfusion, twin):
        torch.manual_seed(2)
        values.append(model(batch).item())
    assert values[0] == values[1]
    assert transfusion.transformer.layers[0][1].fn is not twin.transformer.layers[0][1].fn
