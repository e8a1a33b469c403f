# SPDX-License-Identifier: Apache-2.0
"""What test_layer_distributed.py does on CPUs, on two GPUs: a rank without a modality, under DDP and fully_shard."""

from __future__ import annotations

import copy
import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_support import make_layer
from test_layer_distributed import batches, mean_gradients
from two_ranks import RANKS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs"),
]


def start(rank, worker, store):
    torch.manual_seed(11)
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"file://{store}", datetime.timedelta(seconds=60), RANKS, rank)
    try:
        worker(rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def assert_mean_gradients(layer, local, rank, gradient_of):
    for x, ids in batches():
        x = x.float().cuda()
        layer.zero_grad()
        layer(x[rank], ids[rank]).square().sum().backward()
        torch.cuda.synchronize()
        expected = mean_gradients(local, x, ids)
        for name, parameter in local.named_parameters():
            got = gradient_of(name)
            torch.testing.assert_close(got, expected[name], atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
            assert parameter.grad is not None


def with_ddp(rank):
    layer = make_layer().float().cuda()
    local, model = copy.deepcopy(layer), torch.nn.parallel.DistributedDataParallel(layer, device_ids=[rank])
    parameters = dict(layer.named_parameters())
    assert_mean_gradients(model, local, rank, lambda name: parameters[name].grad)


def with_fsdp(rank):
    from torch.distributed.fsdp import fully_shard

    layer = make_layer().float().cuda()
    local = copy.deepcopy(layer)
    fully_shard(layer, mesh=dist.init_device_mesh("cuda", (RANKS,)))
    parameters = dict(layer.named_parameters())
    assert_mean_gradients(layer, local, rank, lambda name: parameters[name].grad.full_tensor())


@pytest.mark.parametrize("worker", [with_ddp, with_fsdp])
def test_a_rank_without_a_modality(worker, tmp_path):
    mp.spawn(start, args=(worker, str(tmp_path / "store")), nprocs=RANKS)
