# SPDX-License-Identifier: Apache-2.0
"""A whole training step of several layers in one CUDA graph, replayed with other tokens and another mix."""

from __future__ import annotations

import pytest
import torch
from layer_support import random_ids
from torch import Tensor, nn

import mixture_of_mamba as mom

pytestmark = pytest.mark.cuda

WIDTH, LAYERS, MODALITIES = 64, 3, 3


class Stack(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS))
        self.mixers = nn.ModuleList(mom.MixtureOfMamba(WIDTH, MODALITIES, **options) for _ in range(LAYERS))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Ids on the GPU are not read on the host; from ids on the host, a projection is a loop of products."""
        routing = mom.Routing.from_ids(ids, MODALITIES, device=x.device)
        x = routing.sort(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), routing, sorted=True)
        return routing.unsort(x)


@pytest.fixture
def mixes() -> list[Tensor]:
    """Any; one modality alone; with padding; all padding."""
    padded = random_ids(2, 150, MODALITIES)
    padded[0, 100:] = -1
    shape = padded.shape
    return [random_ids(2, 150, MODALITIES), torch.full(shape, 1), padded, torch.full(shape, -1)]


def step(model: Stack, x: Tensor, ids: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = (model(x, ids) - target).square().mean()
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


def assert_close(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_training_step_is_captured_once_for_all_mixes(mixes):
    torch.manual_seed(0)
    model = Stack().cuda()
    x, target = (torch.randn(2, 150, WIDTH, device="cuda") for _ in range(2))
    static_x, static_target = x.clone(), target.clone()
    static_ids = mixes[0].cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model, static_x, static_ids, static_target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(model, static_x, static_ids, static_target)
    for ids in mixes:
        x = torch.randn_like(x)
        static_x.copy_(x)
        static_ids.copy_(ids)
        graph.replay()
        assert_close(captured, step(model, x, ids.cuda(), target))
        assert_close(captured, step(model, x, ids, target))


def test_a_training_step_waits_for_nothing(mixes):
    model = Stack().cuda()
    x, target = (torch.randn(2, 150, WIDTH, device="cuda") for _ in range(2))
    step(model, x, mixes[0].cuda(), target)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = mom.Routing.from_ids(mixes[2].pin_memory(), MODALITIES, device="cuda")
        y = x
        for norm, mixer in zip(model.norms, model.mixers, strict=True):
            y = y + mixer(norm(y), routing, sorted=True)
        torch.autograd.grad((y - target).square().mean(), list(model.parameters()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
