# SPDX-License-Identifier: Apache-2.0
"""Models under torch.compile: one graph for all lengths and mixes, the same numbers."""

from __future__ import annotations

import pytest
import torch
from model_support import VARIANTS, VOCABULARY, config, disturb, random_ids

from mixture_of_mamba import Routing
from mixture_of_mamba.models import Chameleon, Decoder, Transfusion, TransfusionConfig


@pytest.mark.parametrize(
    "settings",
    [{}, {"attention_every": 2, "attention_heads": 2}, {"checkpointing": "full"}, VARIANTS["A and D"]],
    ids=str,
)
def test_one_graph_for_all_lengths(settings):
    decoder = disturb(Decoder(config(**{"mixers_per_layer": 1, **settings})))
    graphs = 0

    def counting(graph_module, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph_module.forward

    compiled = torch.compile(decoder, fullgraph=True, dynamic=True, backend=counting)
    for length in (11, 9, 30):
        routing = Routing.from_ids(random_ids(2, length), 3)
        x = torch.randn(2, length, 8)
        torch.testing.assert_close(compiled(x, routing), decoder(x, routing))
    assert graphs == 1


def test_a_training_step_of_chameleon():
    model = disturb(Chameleon(config(layers=1, mixers_per_layer=1), VOCABULARY, tied=True))
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, backend="eager")
    tokens = torch.randint(-1, 24, (2, 9))
    expected = torch.autograd.grad(model.loss(tokens).total(), tuple(model.parameters()))
    got = torch.autograd.grad(compiled(tokens).total(), tuple(model.parameters()))
    torch.testing.assert_close(got, expected)


def test_a_training_step_of_transfusion():
    decoder = config(layers=1, mixers_per_layer=1, num_modalities=2, bidirectional=True, modulated=True)
    model = disturb(Transfusion(TransfusionConfig(decoder, 12, 3, 1, 2, 3))).eval()
    compiled = torch.compile(model.loss, fullgraph=True, dynamic=True, backend="eager")
    tokens = torch.randint(4, 12, (2, 9))
    latents, times = torch.randn(2, 4, 4, 3), torch.rand(2)
    options = {"times": times, "noise": torch.randn_like(latents)}
    positions = torch.tensor([[0, 2], [1, 4]])
    results = [
        torch.autograd.grad(loss(tokens, latents, positions, **options).total(), tuple(model.parameters()))
        for loss in (model.loss, compiled)
    ]
    torch.testing.assert_close(*results)
