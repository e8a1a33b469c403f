# SPDX-License-Identifier: Apache-2.0
"""The training loop: progress, metrics, validation, checkpoints, Ctrl-C.

A run is a function of its configuration alone: what is random in a step comes from (seed, step), never from a
generator with a memory. So a run that was killed and resumed writes, byte for byte, the metrics of one that was not;
what depends on the machine's speed goes into a file of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training_kit.checkpoint import METRICS_NAME, TIMING_NAME, JsonLines, remove_checkpoint, save_checkpoint
from training_kit.optimizer import learning_rate, make_adamw
from training_kit.task import StepResult, Task

__all__ = ["make_deterministic", "resume_command", "train"]

FLUSH_EVERY = 10  # steps; reading losses back waits for the device
LOG_SECONDS = 15  # between the bar's lines where nobody sees it move


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
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, and not for free


def resume_command() -> str:
    """Of this process; a launcher's is not known here."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    return shlex.join(word for word in sys.orig_argv if word != "--fresh")


def train(task: Task, args: argparse.Namespace, config: dict[str, Any], checkpoint: dict[str, Any] | None) -> bool:
    """Train from ``checkpoint`` (or from the start) to ``args.steps``.

    Args:
        task: model and data.
        args: of :func:`training_kit.arguments.add_training_arguments`; ``output`` is the folder of the run.
        config: what a run and its continuation must agree on.
        checkpoint: of this folder, or None.

    Returns:
        Whether the run is complete; False after Ctrl-C, with everything saved.

    Raises:
        CheckpointError: the files beside the checkpoint are shorter than they were when it was made.
        FloatingPointError: the loss is no longer finite.
    """
    if task.world.is_main:
        args.output.mkdir(parents=True, exist_ok=True)
    run = _Run(task, args, config, checkpoint)
    with StopSignal() as stop:
        run.go(stop)
    return run.step == args.steps


@dataclass(frozen=True)
class _Pending:
    """A step whose numbers are still on the device."""

    step: int
    learning_rate: float
    gradient_norm: Tensor
    result: StepResult


class _Run:
    def __init__(
        self, task: Task, args: argparse.Namespace, config: dict[str, Any], checkpoint: dict[str, Any] | None
    ) -> None:
        self.task = task
        self.world = task.world
        self.args = args
        self.config = config
        self.optimizer = make_adamw(task.model, args.weight_decay)
        self.step = 0
        self.saved_step = 0
        self.seconds = 0.0
        self.tokens = 0
        self.rate = 0.0
        self.pending: list[_Pending] = []
        self.pending_since = time.perf_counter()
        positions = {METRICS_NAME: 0, TIMING_NAME: 0}
        if checkpoint is None:
            if self.world.is_main:
                remove_checkpoint(args.output)
        else:
            self._restore(checkpoint)
            positions = checkpoint["positions"]
        self.files = {}
        if self.world.is_main:
            self.files = {name: JsonLines(args.output / name, position) for name, position in positions.items()}

    def go(self, stop: StopSignal) -> None:
        args = self.args
        self.pending_since = time.perf_counter()
        interval = 0.1 if sys.stderr.isatty() else LOG_SECONDS
        bar = tqdm(
            total=args.steps, initial=self.step, unit="step", mininterval=interval, dynamic_ncols=True,
            disable=not self.world.is_main,
        )  # fmt: skip
        with bar:
            while self.step < args.steps and not self._shall_stop(stop):
                self._one_step()
                if self.step == args.steps or self.step % FLUSH_EVERY == 0:
                    bar.set_postfix_str(self._flush(), refresh=False)
                bar.update()
                if self.step == args.steps or self.step % args.eval_every == 0:
                    line = self._evaluate()
                    if self.world.is_main:
                        bar.write(line)
                if self.step % args.save_every == 0:
                    self._save()
        if self.saved_step != self.step:
            self._save()
        for file in self.files.values():
            file.close()

    def _shall_stop(self, stop: StopSignal) -> bool:
        """Several processes must agree on the step that is their last one; asking costs a wait for the device."""
        if self.world.size == 1:
            return stop.requested
        return self.step % FLUSH_EVERY == 0 and self.world.any(stop.requested)

    def _one_step(self) -> None:
        rate = learning_rate(self.step, self.args.steps, self.args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = self.task.training_step(self.step)
        result.backward.backward()
        norm = self.world.clip(self.task.model, self.args.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        result = replace(result, backward=result.loss)  # let go of the graph
        self.pending.append(_Pending(self.step, rate, norm, result))

    def _flush(self) -> str:
        """Write the steps since the last flush; what the progress bar shall say of them."""
        if not self.pending:
            return ""
        means = dict.fromkeys(self.pending[0].result.losses, 0.0)
        for one in self.pending:
            losses = {name: loss.item() for name, loss in one.result.losses.items()}
            loss = one.result.loss.item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {one.step}; a smaller --lr may help")
            optimisation = {"lr": one.learning_rate, "grad_norm": one.gradient_norm.item()}
            self._write(METRICS_NAME, {"step": one.step, "kind": "train", "loss": loss, **losses, **optimisation})
            for name in means:
                means[name] += losses[name] / len(self.pending)
        elapsed = time.perf_counter() - self.pending_since
        self.seconds += elapsed
        tokens = sum(one.result.num_tokens for one in self.pending)
        self.tokens += tokens
        self.rate = tokens / elapsed
        self.pending = []
        self.pending_since = time.perf_counter()
        return " ".join([*(f"{name} {mean:.3f}" for name, mean in means.items()), f"{self.rate:,.0f} tokens/s"])

    def _evaluate(self) -> str:
        self._flush()
        self.task.model.eval()
        with torch.no_grad():
            losses = self.task.evaluate()
        self.task.model.train()
        self._write(METRICS_NAME, {"step": self.step, "kind": "validation", **losses})
        timing = {"training_seconds": round(self.seconds, 3), "tokens_per_second": round(self.rate)}
        self._write(TIMING_NAME, {"step": self.step, "tokens": self.tokens, **timing})
        self.pending_since = time.perf_counter()
        text = ", ".join(f"{name.replace('_', ' ')} {loss:.3f}" for name, loss in losses.items())
        return f"step {self.step:>6} of {self.args.steps}: held-out {text}; {self.rate:,.0f} tokens/s"

    def _write(self, name: str, record: dict[str, Any]) -> None:
        if self.world.is_main:
            self.files[name].write(record)

    def _save(self) -> None:
        self._flush()
        self.saved_step = self.step
        model, optimizer = self.world.state(self.task.model, self.optimizer)
        if not self.world.is_main:
            return
        content = {
            "config": self.config,
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "threads": torch.get_num_threads(),
            "model": dict(model),  # not an OrderedDict, which C++ cannot read
            "optimizer": optimizer,
            "constants": self.task.constants,
            "positions": {name: file.sync() for name, file in self.files.items()},
        }
        save_checkpoint(self.args.output, content)
        self.pending_since = time.perf_counter()

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        torch.set_num_threads(checkpoint["threads"])  # sums are split by thread, and their last bits show it
        self.world.restore(self.task.model, self.optimizer, (checkpoint["model"], checkpoint["optimizer"]))
        self.step = self.saved_step = checkpoint["step"]
        self.seconds = checkpoint["seconds"]
        self.tokens = checkpoint["tokens"]
