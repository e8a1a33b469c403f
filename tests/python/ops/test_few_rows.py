# SPDX-License-Identifier: Apache-2.0
"""Few rows in 16 bits on a GPU: kernels of their own, whose launches begin while the ones before them end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mixture_of_mamba as mom

pytestmark = pytest.mark.cuda

MODALITIES = 3
DTYPES = [torch.bfloat16, torch.float16]


def layer_of(dtype: torch.dtype) -> mom.MixtureOfMamba:
    layer = mom.MixtureOfMamba(512, MODALITIES, d_state=16).to("cuda", dtype)
    layer.A_log.data = layer.A_log.data.float()
    return layer.eval()


def routing_of(ids: torch.Tensor) -> mom.Routing:
    return mom.Routing.from_ids(ids, MODALITIES, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sequence_is_decoded_alike_whatever_runs_beside_it(dtype):
    batch, steps = 40, 3
    layer, ids = layer_of(dtype), torch.randint(0, MODALITIES, (batch, steps))
    tokens = torch.randn(batch, steps, 512, device="cuda", dtype=dtype)
    state = layer.allocate_state(batch)
    together = [layer.step(tokens[:, [t]], state, routing_of(ids[:, [t]])) for t in range(steps)]
    for sequence in (0, 7, batch - 1):
        alone, own = layer.allocate_state(1), slice(sequence, sequence + 1)
        for t in range(steps):
            y = layer.step(tokens[own, [t]], alone, routing_of(ids[own, [t]]))
            assert torch.equal(y, together[t][own])
        assert torch.equal(alone.conv[0], state.conv[sequence])
        assert torch.equal(alone.ssm[0], state.ssm[sequence])


def in_int64(routing: mom.Routing) -> mom.Routing:
    return dataclasses.replace(routing, offsets=routing.offsets.long())


@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("as_given", [lambda routing: routing, in_int64], ids=["int32", "int64"])
@pytest.mark.parametrize("batch", [1, 20, 200])
def test_what_was_written_right_before_a_step_is_seen(batch, as_given, ssm_dtype):
    """Weights and states are read before the kernel ahead has ended; nothing may be read before it was written."""
    layers = [layer_of(torch.bfloat16) for _ in range(2)]
    work = layer_of(torch.bfloat16)
    routing = as_given(routing_of(torch.arange(batch)[:, None] % MODALITIES))
    inputs, starts, expected = [], [], []
    for layer in layers:
        inputs.append(torch.randn(batch, 1, 512, device="cuda", dtype=torch.bfloat16))
        start, state = (layer.allocate_state(batch, ssm_dtype=ssm_dtype) for _ in range(2))
        for of_start, of_state in zip((start.conv, start.ssm), (state.conv, state.ssm), strict=True):
            of_state.copy_(of_start.normal_())
        starts.append(start)
        expected.append((layer.step(inputs[-1], state, routing), state.conv, state.ssm))
        torch.cuda.synchronize()
    state, x = work.allocate_state(batch, ssm_dtype=ssm_dtype), torch.empty_like(inputs[0])
    parameters = [list(layer.parameters()) for layer in layers]
    results = []
    with torch.no_grad():
        for i in range(100):
            torch._foreach_copy_(list(work.parameters()), parameters[i % 2])
            state.conv.copy_(starts[i % 2].conv)
            state.ssm.copy_(starts[i % 2].ssm)
            x.copy_(inputs[i % 2])
            y = work.step(x, state, routing)
            results.append((y, state.conv.clone(), state.ssm.clone()))
    for i, result in enumerate(results):
        assert all(map(torch.equal, result, expected[i % 2])), i


@pytest.mark.parametrize("rows", [32, 120], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_graph_is_replayed_with_other_boundaries(dtype, rows):
    sizes = (96, 64)
    weight = [torch.randn(*reversed(sizes), device="cuda", dtype=dtype) for _ in range(MODALITIES)]
    bias = [torch.randn(sizes[1], device="cuda", dtype=dtype) for _ in range(MODALITIES)]
    x = torch.randn(rows, sizes[0], device="cuda", dtype=dtype)
    offsets = torch.zeros(MODALITIES + 1, device="cuda", dtype=torch.int32)
    mom.grouped_linear(x, weight, bias, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mom.grouped_linear(x, weight, bias, offsets)
    for mix in ([0, 10, 20, rows], [0, 0, 0, rows], [0, 5, 5, 9], [0, 0, 0, 0]):
        offsets.copy_(torch.tensor(mix))
        graph.replay()
        on_host = torch.tensor(mix, dtype=torch.int32)
        assert torch.equal(y, mom.grouped_linear(x, weight, bias, offsets, on_host)), mix
