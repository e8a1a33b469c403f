# SPDX-License-Identifier: Apache-2.0
"""A model on two processes, one of which has no picture: as docs/models.md says that losses are called there."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from model_support import config, disturb
from two_ranks import RANKS, run_on_two_ranks

from mixture_of_mamba.models import Transfusion, TransfusionConfig

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
BOI, EOI, NULL = 1, 2, 3


class Losses(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *arguments, **options):
        return self.model.loss(*arguments, **options).total()


def make():
    torch.manual_seed(5)
    decoder = config(layers=2, num_modalities=2, bidirectional=True, modulated=True, shared_expert=("in_proj",))
    return disturb(Transfusion(TransfusionConfig(decoder, 12, 3, BOI, EOI, NULL)).double())


def batch(rank):
    """(arguments, options) of the loss: a picture in each row, or none at all."""
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(4, 12, (2, 9), generator=generator)
    pictures = 2 if rank == 0 else 0
    latents = torch.randn(2, pictures, 4, 4, 3, generator=generator, dtype=torch.float64)
    options = {"times": torch.full((pictures,), 0.4).double(), "noise": latents[1], "dropped": torch.zeros(2).bool()}
    return (tokens, latents[0], [(0, 2), (1, 4)][:pictures]), options


def mean_gradients(model):
    for rank in range(RANKS):
        arguments, options = batch(rank)
        (model.loss(*arguments, **options).total() / RANKS).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def train(rank):
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    expected = mean_gradients(make())
    model = make()
    arguments, options = batch(rank)
    replicated = torch.nn.parallel.DistributedDataParallel(Losses(model))
    replicated(*arguments, **options).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")

    model = make()
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for part in (*model.decoder.layers, model):
        fully_shard(part, mesh=mesh)
    register_fsdp_forward_method(model, "loss")
    model.loss(*arguments, **options).total().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), expected[name], msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_a_rank_without_a_picture(tmp_path):
    run_on_two_ranks(train, tmp_path)
