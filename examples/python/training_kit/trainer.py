# SPDX-License-Identifier: Apache-2.0
"""The training loop: progress, metrics, validation, checkpoints, Ctrl-C.

A run is a function of its configuration alone: batches come from (seed, step), so a run that was killed and
resumed writes, bit for bit, the losses of one that was not.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training_kit.checkpoint import CHECKPOINT_NAME, CheckpointError, Metrics, save_checkpoint
from training_kit.optimizer import learning_rate, make_adamw

__all__ = ["StepResult", "StopSignal", "Task", "make_deterministic", "resume_command", "train"]

FLUSH_EVERY = 10  # steps; reading losses back waits for the device


@dataclass(frozen=True)
class StepResult:
    """``loss`` to minimise, detached ``losses`` by modality to report, and how many tokens they are of."""

    loss: Tensor
    losses: dict[str, Tensor]
    num_tokens: int


class Task(Protocol):
    """What is trained. ``constants`` are tensors that a resumed run takes from its checkpoint."""

    model: nn.Module
    constants: dict[str, Tensor]

    def training_step(self, step: int) -> StepResult: ...

    def evaluate(self) -> dict[str, float]: ...


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop after the step; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each, handler in self._previous.items():
            signal.signal(each, handler)


def make_deterministic(seed: int) -> None:
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)


def resume_command() -> str:
    words = [word for word in sys.argv if word != "--fresh"]
    return shlex.join([Path(sys.executable).name, *words])


def train(
    task: Task, args: argparse.Namespace, folder: Path, config: dict[str, Any], checkpoint: dict[str, Any] | None
) -> bool:
    """Train from ``checkpoint`` (or from the start) to ``args.steps``.

    Args:
        task: model and data.
        args: of :func:`add_training_arguments`.
        folder: of the run; holds checkpoint and metrics.
        config: what a run and its continuation must agree on.
        checkpoint: of this folder, or None.

    Returns:
        Whether the run is complete; False after Ctrl-C, with everything saved.

    Raises:
        CheckpointError: the checkpoint is of another configuration.
        FloatingPointError: the loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = make_adamw(task.model, args.weight_decay)
    run = _Run(task, optimizer, args, folder, config)
    if checkpoint is None:
        (folder / CHECKPOINT_NAME).unlink(missing_ok=True)
        run.metrics = Metrics(folder)
    else:
        run.restore(checkpoint)
    with StopSignal() as stop:
        run.go(stop)
    run.metrics.close()
    return run.step == args.steps


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    learning_rate: float
    gradient_norm: Tensor
    loss: Tensor
    losses: dict[str, Tensor]
    num_tokens: int


class _Run:
    metrics: Metrics

    def __init__(
        self, task: Task, optimizer: torch.optim.Optimizer, args: argparse.Namespace, folder: Path, config: dict
    ) -> None:
        self.task = task
        self.optimizer = optimizer
        self.args = args
        self.folder = folder
        self.config = config
        self.step = 0
        self.seconds = 0.0
        self.rate = 0.0
        self.pending: list[_Pending] = []
        self.pending_since = time.perf_counter()

    def go(self, stop: StopSignal) -> None:
        args = self.args
        self.pending_since = time.perf_counter()
        with tqdm(total=args.steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True) as bar:
            while self.step < args.steps and not stop.requested:
                self._one_step()
                bar.update()
                last = self.step == args.steps or stop.requested
                if last or self.step % FLUSH_EVERY == 0:
                    bar.set_postfix_str(self._flush(), refresh=False)
                if self.step == args.steps or self.step % args.eval_every == 0:
                    bar.write(self._evaluate())
                if last or self.step % args.save_every == 0:
                    self._save()

    def _one_step(self) -> None:
        rate = learning_rate(self.step, self.args.steps, self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.task.training_step(self.step)
        result.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.task.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.pending.append(_Pending(self.step, rate, norm, result.loss.detach(), result.losses, result.num_tokens))

    def _flush(self) -> str:
        """Write the steps since the last flush; what the progress bar shall say of them."""
        if not self.pending:
            return ""
        sums = dict.fromkeys(self.pending[0].losses, 0.0)
        for one in self.pending:
            losses = {name: loss.item() for name, loss in one.losses.items()}
            loss = one.loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {one.step}; a smaller --lr may help")
            optimisation = {"lr": one.learning_rate, "grad_norm": one.gradient_norm.item()}
            self.metrics.write({"step": one.step, "kind": "train", "loss": loss, **losses, **optimisation})
            for name in sums:
                sums[name] += losses[name]
        elapsed = time.perf_counter() - self.pending_since
        tokens = sum(one.num_tokens for one in self.pending)
        parts = [f"{name} {total / len(self.pending):.3f}" for name, total in sums.items()]
        self.seconds += elapsed
        self.rate = tokens / elapsed
        self.pending = []
        self.pending_since = time.perf_counter()
        return " ".join([*parts, f"{self.rate:,.0f} tokens/s"])

    def _evaluate(self) -> str:
        self._flush()
        self.task.model.eval()
        with torch.no_grad():
            losses = self.task.evaluate()
        self.task.model.train()
        timing = {"seconds": round(self.seconds, 3), "tokens_per_second": round(self.rate)}
        self.metrics.write({"step": self.step, "kind": "validation", **losses, **timing})
        self.pending_since = time.perf_counter()
        text = ", ".join(f"{name.replace('_', ' ')} {loss:.3f}" for name, loss in losses.items())
        return f"step {self.step:>6} of {self.args.steps}: held-out {text}; {self.rate:,.0f} tokens/s"

    def _save(self) -> None:
        self._flush()
        content = {
            "config": self.config,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "constants": self.task.constants,
            "metrics_position": self.metrics.sync(),
        }
        save_checkpoint(self.folder, content)
        self.pending_since = time.perf_counter()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["config"]
        for name in sorted(self.config.keys() | saved.keys()):
            if self.config.get(name) != saved.get(name):
                raise CheckpointError(
                    f"{self.folder} holds a run with {name} {saved.get(name)}, not {self.config.get(name)}; "
                    "choose another --out, or --fresh to start over"
                )
        self.task.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        torch.set_rng_state(checkpoint["random"].cpu())
        self.step = checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.metrics = Metrics(self.folder, checkpoint["metrics_position"])
