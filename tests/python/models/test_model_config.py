# SPDX-License-Identifier: Apache-2.0
"""Configurations: checked, to and from plain values, and the sizes of those with a name."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from model_support import OPTIONS, config

from mixture_of_mamba.models import SIZES, Chameleon, Decoder, DecoderConfig, TokenRange, Vocabulary, named_config

# Millions of parameters of the dense model with untied embedding and head of 65,536 or 32,000 tokens.
MILLIONS = {
    "chameleon-37m": 37.06,
    "chameleon-94m": 94.23,
    "chameleon-443m": 454.2,
    "chameleon-880m": 917.3,
    "chameleon-1.5b": 1537.6,
    "transfusion-163m": 169.8,
    "transfusion-760m": 814.3,
    "transfusion-1.4b": 1400.3,
}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def derived(d_model, layers, vocabulary):
    """From the paper's equations, apart from the code: in, x, dt, out, what is shared, a norm for each block."""
    inner, rank = 2 * d_model, math.ceil(d_model / 16)
    block = 2 * inner * d_model + inner * (rank + 32) + rank * inner + inner + inner * d_model
    block += inner * 4 + inner + inner * 16 + inner + d_model
    return 2 * layers * block + d_model + 2 * vocabulary * d_model


@pytest.mark.parametrize("name", SIZES)
def test_named_sizes(name):
    vocabulary = 65_536 if name.startswith("chameleon") else 32_000
    settings = named_config(name, num_modalities=1, decouple=())
    model = Chameleon(settings, Vocabulary((TokenRange("text", vocabulary),)), device="meta")
    assert count(model) == derived(*SIZES[name], vocabulary)
    assert count(model) / 1e6 == pytest.approx(MILLIONS[name], rel=1e-3)
    number, unit = re.fullmatch(r"\w+-([\d.]+)([mb])", name).groups()
    assert count(model) == pytest.approx(float(number) * {"m": 1e6, "b": 1e9}[unit], rel=0.08)


@pytest.mark.parametrize(("modalities", "block"), [(1, 6_666_240), (2, 13_287_424), (3, 19_908_608)])
def test_a_mixture_has_more(modalities, block):
    decoder = Decoder(named_config("chameleon-443m", num_modalities=modalities, layers=1), device="meta")
    assert count(decoder) == 2 * (block + 1024) + 1024


def test_an_attention_layer_is_a_transformer_layer():
    settings = config(1536, 1, 1, attention_every=1, attention_heads=12)
    assert count(Decoder(settings, device="meta")) == 12 * 1536**2 + 3 * 1536


@pytest.mark.parametrize(
    "settings",
    [
        config(decouple=("x_proj",), attention_every=2, attention_heads=2, memory="lean", bidirectional=True),
        config(**OPTIONS),
        config(dt_limit=(0, math.inf)),
    ],
)
def test_plain_values_and_back(settings):
    values = json.loads(json.dumps(settings.to_dict()))
    assert DecoderConfig.from_dict(values) == settings
    assert hash(DecoderConfig.from_dict(values)) == hash(settings)


def test_options_reach_every_mixer():
    for layer in Decoder(config(**OPTIONS)).layers:
        for mixer in layer.mixers:
            assert mixer.A_log.shape == (3, 16, 16)
            assert mixer.D.shape == (3, 16)
            assert mixer.in_proj.shared.weight.shape == (32, 8)
            assert mixer.b_layernorm.weight.shape == mixer.c_layernorm.weight.shape == (16,)
            assert mixer.dt_limit == (0.005, 0.05)


def test_attention_is_shared_where_no_projection_is_per_modality():
    def projection(*decouple):
        return Decoder(config(decouple=decouple, attention_every=2, attention_heads=2)).layers[1].attention.qkv_proj

    assert isinstance(projection("A_log", "D"), torch.nn.Linear)
    assert len(projection("D", "x_proj")) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 0}, "d_model must be an integer of at least 1, got 0"),
        ({"layers": 2.0}, "layers must be an integer of at least 1, got 2.0"),
        ({"mixers_per_layer": True}, "mixers_per_layer must be an integer of at least 1, got True"),
        ({"attention_every": -1}, "attention_every must be an integer of at least 0, got -1"),
        ({"decouple": ("conv1d",)}, r"decouple must name projections among .*, got \['conv1d'\]"),
        ({"decouple": "in_proj"}, "decouple must be a list of names among .*, got 'in_proj'"),
        ({"decouple": ("D",), "shared_expert": ("D",)}, r"shared_expert must name projections among .*, got \['D'\]"),
        ({"decouple": ("D",), "shared_expert": ("in_proj",)}, r"shared_expert must name .*, got \['in_proj'\]"),
        ({"dt_limit": (0.3, 0.1)}, r"dt_limit must have 0 <= low < high, got \(0.3, 0.1\)"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
        ({"memory": "small"}, 'memory must be "default" or "lean", got \'small\''),
        ({"checkpointing": "all"}, 'checkpointing must be "none", "full" or "selective", got \'all\''),
        ({"attention_every": 2, "attention_heads": 3}, "attention_heads must divide d_model = 8 when .*, got 3"),
        ({"attention_heads": 2}, "attention_heads must come with attention_every, got 2 alone"),
    ],
)
def test_wrong_values(values, message):
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_wrong_names():
    with pytest.raises(ValueError, match=r"name must be one of chameleon-37m, .*, got 'chameleon-7b'"):
        named_config("chameleon-7b")
    with pytest.raises(ValueError, match=r"got unknown \['width'\], missing \['d_model'\]"):
        DecoderConfig.from_dict({"width": 3, "layers": 2})


def test_a_name_with_changes():
    settings = named_config("transfusion-163m", memory="lean")
    assert (settings.d_model, settings.layers, settings.memory) == (768, 16, "lean")
    assert settings.mixers_per_layer == 2
    assert torch.device("meta") == Decoder(settings, device="meta").final_norm.weight.device
