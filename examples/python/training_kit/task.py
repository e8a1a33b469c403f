# SPDX-License-Identifier: Apache-2.0
"""What is trained, as the loop sees it: a model whose forward gives sums of losses by modality, and batches for it."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from training_kit.flops import count_flops
from training_kit.parallel import World

__all__ = ["Batch", "StepResult", "Task"]


@dataclass(frozen=True)
class Batch:
    """``inputs`` of the model's forward, this process's; ``num_tokens`` of all processes."""

    inputs: tuple[Any, ...]
    num_tokens: int


@dataclass(frozen=True)
class StepResult:
    """What a step gives.

    Attributes:
        backward: what this process calls backward on.
        loss: what is minimised, over all processes; detached.
        losses: by modality, over all processes; detached.
        num_tokens: that they are of.
    """

    backward: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    num_tokens: int


class Task(ABC):
    """Model and data of a run.

    A subclass sets ``args``, ``world``, ``constants`` (tensors that a resumed run takes from its checkpoint) and its
    data, then calls :meth:`prepare`.

    Attributes:
        model: forward gives float32 ``[rows, modalities]``: first losses, then what else the objective needs, last
            counts; all are sums over this process's part of a batch.
        modalities, units: names of the losses, and of what each is measured in.
        baseline_name: what :meth:`find_baselines` finds.
    """

    args: argparse.Namespace
    world: World
    model: nn.Module
    constants: dict[str, Tensor]
    modalities: tuple[str, ...]
    units: ClassVar[dict[str, str]]
    baseline_name: ClassVar[str]

    def prepare(self) -> None:
        """Make the model, and spread it over the processes."""
        self.model = self.build().to(self.world.device)
        parallel = self.world.spread(self.model, self.blocks(self.model))
        # Graphs for fixed shapes only: which graph a step runs must not depend on what ran before it.
        self.forward = torch.compile(parallel, dynamic=False) if self.args.compile else parallel

    @abstractmethod
    def __init__(self, args: argparse.Namespace, data: Any, world: World, constants: dict[str, Tensor]) -> None: ...

    @abstractmethod
    def build(self, mixer: str | None = None) -> nn.Module:
        """A fresh model on torch's default device; of another mixer than the run's, if given."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Its layers."""

    @abstractmethod
    def training_batch(self, step: int) -> Batch: ...

    @abstractmethod
    def objective(self, sums: Tensor, counts: Tensor) -> Tensor:
        """What is minimised, linear in ``sums``: the forward's rows, with counts of the whole batch."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Held-out losses: those of the modalities, and more."""

    @abstractmethod
    def find_baselines(self) -> dict[str, float]:
        """What a model that ignores context would reach at best, by modality."""

    @abstractmethod
    def draw(self, model: nn.Module, folder: Path) -> dict[str, Any]:
        """Samples for held-out scenes as files in ``folder``; what the summary says of them."""

    @cached_property
    def baselines(self) -> dict[str, float]:
        return self.find_baselines()

    def training_step(self, step: int) -> StepResult:
        batch = self.training_batch(step)
        mine = self.losses(batch)
        sums = self.world.sum(mine)
        means = dict(zip(self.modalities, sums[0] / sums[-1], strict=True))
        # Processes average their gradients; the sum of their parts is meant.
        backward = self.objective(mine, sums[-1]) * self.world.size
        return StepResult(backward, self.objective(sums, sums[-1]), means, batch.num_tokens)

    def losses(self, batch: Batch) -> Tensor:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.args.amp):
            return self.forward(*batch.inputs)

    def means(self, batches: Iterable[Batch]) -> list[float]:
        """Losses by modality over batches of which each process has its part."""
        sums = self.world.sum(torch.stack([self.losses(batch).double() for batch in batches]).sum(0))
        return (sums[0] / sums[-1]).tolist()

    def parameters(self) -> tuple[int, int]:
        """(parameters that a token passes through, all parameters); FLOPs follow the first."""
        with torch.device("meta"):
            active, total = (sum(p.numel() for p in self.build(mixer).parameters()) for mixer in ("mamba", None))
        return active, total

    def whole_model(self) -> nn.Module:
        """The trained model, not spread over processes; to be called by all of them."""
        if not self.world.shards:
            return self.model
        state = self.world.model_state(self.model)
        model = self.build().to(self.world.device)
        if self.world.is_main:
            model.load_state_dict(state)
        return model

    def flops_per_step(self, model: nn.Module) -> int:
        """Of all processes, forward and backward."""
        batch = self.training_batch(0)
        return count_flops(model, lambda: model(*batch.inputs)[0].sum()) * self.world.size
