# SPDX-License-Identifier: Apache-2.0
"""Two processes, one of which has no token of a modality: collectives match, nothing hangs, gradients are the mean."""

from __future__ import annotations

import copy
import datetime
import gc
import os
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer_support import make_layer

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
RANKS = 2


def run_on_two_ranks(worker, tmp_path):
    mp.spawn(_start, args=(worker, str(tmp_path / "store")), nprocs=RANKS)


def _start(rank, worker, store):
    torch.manual_seed(11)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    timeout = datetime.timedelta(seconds=30)  # a collective that waits for the other rank is an error, not a hang
    dist.init_process_group("gloo", f"file://{store}", timeout, RANKS, rank)
    try:
        worker(rank)
        gc.collect()  # DDP lies in reference cycles and holds the group
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # all has been tested; threads of gloo that are still there would abort an orderly exit


def batches():
    """Rank 1 has no token of modality 1; in the second batch nobody has, and rank 1 has none of modality 0 either."""
    generator = torch.Generator().manual_seed(5)
    for present in (((0, 1, 2), (0, 2)), ((0, 2), (2,))):
        x = torch.randn(RANKS, 2, 9, 16, dtype=torch.float64, generator=generator)
        picks = (torch.randint(len(p), (2, 9), generator=generator) for p in present)
        yield x, torch.stack([torch.tensor(p)[pick] for p, pick in zip(present, picks, strict=True)])


def mean_gradients(layer, x, ids):
    layer.zero_grad()
    for rank in range(RANKS):
        (layer(x[rank], ids[rank]).square().sum() / RANKS).backward()
    return {name: parameter.grad for name, parameter in layer.named_parameters()}


def train_with_ddp(rank):
    for decouple in (PROJECTIONS, ("in_proj", "out_proj")):
        layer = make_layer(decouple=decouple)
        local = copy.deepcopy(layer)
        model = torch.nn.parallel.DistributedDataParallel(layer)
        for x, ids in batches():
            model.zero_grad()
            model(x[rank], ids[rank]).square().sum().backward()
            expected = mean_gradients(local, x, ids)
            for name, parameter in layer.named_parameters():
                torch.testing.assert_close(parameter.grad, expected[name], msg=lambda m, n=name: f"{n}: {m}")
                both = [torch.empty_like(parameter.grad) for _ in range(RANKS)]
                dist.all_gather(both, parameter.grad)
                assert torch.equal(*both), name


def train_with_fsdp(rank):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    layer = make_layer()
    local = copy.deepcopy(layer)
    fully_shard(layer, mesh=mesh)
    for x, ids in batches():
        layer.zero_grad()
        layer(x[rank], ids[rank]).square().sum().backward()
        expected = mean_gradients(local, x, ids)
        for name, parameter in layer.named_parameters():
            gradient = parameter.grad.full_tensor()
            torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")

    layer.mark_parameters()  # fully_shard has made parameters of its own
    assert_marked(layer)
    late = fully_shard(mom.MixtureOfMamba(16, 3, device="meta"), mesh=mesh)
    late.to_empty(device="cpu")
    late.reset_parameters()
    assert_marked(late)
    fresh = mom.MixtureOfMamba(16, 3)
    assert torch.equal(late.A_log.full_tensor(), fresh.A_log)
    assert torch.equal(late.D.full_tensor(), fresh.D)
    dt = torch.nn.functional.softplus(late.dt_proj[1].bias.full_tensor())
    assert dt.min() > 0.99e-3 and dt.max() < 0.101
    assert not torch.equal(*dt.chunk(RANKS))  # each rank has drawn its own part


def assert_marked(layer):
    marked = {name for name, parameter in layer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", *(f"dt_proj.{m}.bias" for m in range(3))}


@pytest.mark.parametrize("worker", [train_with_ddp, pytest.param(train_with_fsdp, marks=pytest.mark.slow)])
def test_two_ranks(worker, tmp_path):
    run_on_two_ranks(worker, tmp_path)
