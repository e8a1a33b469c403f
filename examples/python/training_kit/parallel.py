# SPDX-License-Identifier: Apache-2.0
"""One process or several (torchrun): what they share, how the model is spread over them, how its state is gathered.

Every process computes the same batch's description and trains on its part of it. Losses are means over the tokens of
the whole batch, so a run on two processes is that of one up to rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

__all__ = ["World"]

FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        device: of this process.
        rank, size: of this process, and how many there are.
        method: "ddp" (each has the whole model) or "fsdp2" (each has a part of every weight).
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    method: str = "ddp"

    @staticmethod
    @contextmanager
    def of(device: torch.device, method: str) -> Iterator[World]:
        """The world that torchrun describes in the environment, or this process alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            yield World(device)
            return
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            yield World(device, dist.get_rank(), size, method)
        finally:
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def shards(self) -> bool:
        return self.method == "fsdp2" and self.size > 1

    def share(self, count: int) -> slice:
        """Which of ``count`` samples, a multiple of the size, are this process's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, values: Tensor) -> Tensor:
        """Over all processes, on each of them; detached."""
        values = values.detach().clone()
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)))

    def agreed(self, constants: dict[str, Tensor]) -> dict[str, Tensor]:
        """The main process's, on each."""
        if self.size > 1:
            for tensor in constants.values():
                dist.broadcast(tensor, 0)
        return constants

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does it before the others: what it builds, they find."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()

    def spread(self, model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
        """The module to call in training. ``blocks`` are gathered one at a time by fsdp2, which changes ``model``."""
        if self.size == 1:
            return model
        if not self.shards:
            return nn.parallel.DistributedDataParallel(model)
        mesh = dist.init_device_mesh(self.device.type, (self.size,))
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh)
        for module in model.modules():
            if hasattr(module, "mark_parameters"):
                module.mark_parameters()  # fully_shard has made parameters of its own
        return model

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """(model, optimiser); whole tensors, to be called by all processes."""
        if not self.shards:
            return model.state_dict(), optimizer.state_dict()
        return self.model_state(model), get_optimizer_state_dict(model, optimizer, options=FULL_ON_CPU)

    def model_state(self, model: nn.Module) -> dict[str, Any]:
        """Whole tensors, to be called by all processes."""
        return get_model_state_dict(model, options=FULL_ON_CPU) if self.shards else model.state_dict()

    def restore(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, state: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        """The inverse of :meth:`state`."""
        if not self.shards:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            return
        set_model_state_dict(model, state[0], options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(model, optimizer, state[1], options=StateDictOptions(full_state_dict=True))

    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Clip the gradient's norm, and return what it was."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
        return norm.full_tensor() if self.shards else norm  # type: ignore[operator]
