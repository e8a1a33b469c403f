# SPDX-License-Identifier: Apache-2.0
"""Two processes, one of which has no token of a modality: collectives match, nothing hangs, gradients are the mean."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layer_support import make_layer
from two_ranks import RANKS, run_on_two_ranks

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS, mixing
from mixture_of_mamba.ops import selective_scan

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")
GUIDE = Path(__file__).resolve().parents[3] / "docs/training.md"


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


def train_with_mixed_precision(rank):
    """The recipe of docs/training.md: bfloat16 for three projections, float32 for what the recurrence is made of."""
    mesh, recipe = dist.init_device_mesh("cpu", (RANKS,)), {}
    exec(re.search(r"```python\n([^`]*fully_shard.*?)```", GUIDE.read_text(), re.DOTALL)[1], recipe)
    for options in ({"shared_expert": ("in_proj",)}, {"decouple": ("in_proj", "D")}, {"decouple": ()}):
        layer = make_layer(**options).float()
        local, seen = copy.deepcopy(layer), {}

        def spy(u, dt, A, B, C, D, z, dt_bias, *, _seen=seen, **others):
            _seen.update(u=u, A=A.detach().clone(), bias=dt_bias.detach().clone())
            return selective_scan(u, dt, A, B, C, D, z, dt_bias, **others)

        recipe["shard_layer"](layer, mesh)
        for x, ids in batches():
            x = x.float()
            layer.zero_grad()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(mixing, "selective_scan", spy)
                y = layer(x[rank], ids[rank])
            y.float().square().sum().backward()
            assert y.dtype == seen["u"].dtype == torch.bfloat16
            children = local.dt_proj if "dt_proj" in local.decouple else [local.dt_proj]
            biases = torch.stack([child.bias for child in children]).view(seen["bias"].shape)
            assert torch.equal(seen["A"], -torch.exp(local.A_log)) and torch.equal(seen["bias"], biases)
            expected = mean_gradients(local, x, ids)
            for name, parameter in layer.named_parameters():
                assert parameter.dtype == parameter.grad.dtype == torch.float32
                error = (parameter.grad.full_tensor() - expected[name]).norm()
                assert error <= 0.06 * expected[name].norm(), (name, error)


def save_and_load_checkpoints(rank, folder):
    """Sharded over two ranks, into layers that are sharded, made late, and not sharded at all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    def make(**device):
        options = {"decouple": (*PROJECTIONS, "D"), "shared_expert": ("in_proj",)}
        layer = mom.MixtureOfMamba(16, 3, **options, **device)
        return layer, lambda layer: torch.optim.AdamW(layer.parameters(), lr=0.1)

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    layer, optimizer_of = make()
    whole = {name: value.clone() for name, value in layer.state_dict().items()}
    fully_shard(layer, mesh=mesh)
    optimizer = optimizer_of(layer)
    for x, ids in batches():
        layer(x[rank].float(), ids[rank]).square().sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(layer, optimizer)
    dcp.save({"weights": weights, "moments": moments}, checkpoint_id=folder)
    trained = {name: value.full_tensor() for name, value in layer.state_dict().items()}
    assert trained.keys() == whole.keys() and not torch.equal(trained["D"], whole["D"])

    late, _ = make(device="meta")
    fully_shard(late, mesh=mesh)
    late.to_empty(device="cpu")
    plain, _ = make()
    for other in (late, plain):
        other_optimizer = optimizer_of(other)
        weights, moments = get_state_dict(other, other_optimizer)
        state = {"weights": weights, "moments": moments}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(other, other_optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
        other.mark_parameters()
        assert_marked(other)
        for name, value in other.state_dict().items():
            assert torch.equal(value.full_tensor() if other is late else value, trained[name]), name
        assert len(other_optimizer.state) == len(trained)
    x, ids = next(iter(batches()))
    torch.testing.assert_close(plain(x[rank].float(), ids[rank]), layer(x[rank].float(), ids[rank]))


def assert_marked(layer):
    marked = {name for name, parameter in layer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", *(f"dt_proj.{m}.bias" for m in range(3))}


def use_fully_shard(rank, folder):
    """One start of the processes, which takes longer than all of it."""
    train_with_mixed_precision(rank)
    save_and_load_checkpoints(rank, folder)
    train_with_fsdp(rank)  # the last, since each rank draws numbers of its own there


def test_two_ranks_under_ddp(tmp_path):
    run_on_two_ranks(train_with_ddp, tmp_path)


@pytest.mark.slow
def test_two_ranks_under_fully_shard(tmp_path):
    run_on_two_ranks(functools.partial(use_fully_shard, folder=tmp_path / "checkpoint"), tmp_path)
