# SPDX-License-Identifier: Apache-2.0
"""From the command line to a finished run: what the scripts of all settings do in the same way."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch

from training_kit.arguments import chosen_device
from training_kit.checkpoint import CheckpointError, load_checkpoint
from training_kit.failure import fail
from training_kit.packs import MissingPackagesError
from training_kit.parallel import World
from training_kit.report import report
from training_kit.task import Task
from training_kit.trainer import make_deterministic, resume_command, train

__all__ = ["Data", "Setting", "finish", "run"]

TRAINING = ("steps", "batch", "lr", "weight_decay", "clip", "seed", "amp", "compile", "parallel")
MODEL = ("mixer", "d_model", "layers", "concepts")


class Data(Protocol):
    """What the packs hold. A run and its continuation must have the same ``checksums``."""

    checksums: Mapping[str, int]


@dataclass(frozen=True)
class Setting:
    """What a script is about.

    Attributes:
        parse: its description -> its arguments.
        arguments: names of the setting's own arguments that a run and its continuation must agree on.
        load: arguments -> data; ``args.concepts`` becomes a number.
        task: what is trained, made of (arguments, data, world, constants of a checkpoint or {}).
    """

    parse: Callable[[str], argparse.Namespace]
    arguments: tuple[str, ...]
    load: Callable[[argparse.Namespace], Data]
    task: type[Task]


def run(description: str, setting: Setting) -> int:
    """Train to the end, or until Ctrl-C; the exit status."""
    args = setting.parse(description)
    device = chosen_device(args)
    make_deterministic(args.seed)
    try:
        with World.of(device, args.parallel) as world:
            complete = _run(args, setting, world)
    except OSError as error:
        fail(str(error) if error.filename else f"{error.strerror or error}, in {args.output}")
    except (MissingPackagesError, CheckpointError, FloatingPointError, ValueError) as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"--device {args.device} has too little memory for --batch {args.batch} at this size")
    if not complete:
        if world.is_main:
            print(f"stopped and saved in {args.output}; go on with: {resume_command()}")
        return 130
    return 0


def finish(main: Callable[[], int]) -> NoReturn:
    """End the process with main's status; without a traceback after Ctrl-C."""
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint, if there is one")
        raise SystemExit(130) from None


def _run(args: argparse.Namespace, setting: Setting, world: World) -> bool:
    with world.main_first():
        data = setting.load(args)
    config = _configuration(args, setting, data, world)
    checkpoint = None if args.fresh else load_checkpoint(args.output, config)
    task = setting.task(args, data, world, checkpoint["constants"] if checkpoint else {})
    if world.is_main:
        active, total = task.parameters()
        print(
            f"{args.mixer} {args.size}: {active / 1e6:.2f} M parameters a token, {total / 1e6:.2f} M in all; "
            f"{task.baseline_name} " + ", ".join(f"{name} {value:.3f}" for name, value in task.baselines.items())
        )
        if checkpoint:
            print(f"going on from step {checkpoint['step']} in {args.output} (--fresh starts over)")
    complete = train(task, args, config, checkpoint)
    if complete:
        model = task.whole_model()  # gathered by all processes
        if world.is_main:
            report(task, model, args, config)
    return complete


def _configuration(args: argparse.Namespace, setting: Setting, data: Data, world: World) -> dict[str, object]:
    """What a run and its continuation must agree on."""
    names = (*MODEL, *setting.arguments, *TRAINING)
    settings: dict[str, object] = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return {**settings, "processes": world.size, **{f"{n} of checksum": c for n, c in data.checksums.items()}}
