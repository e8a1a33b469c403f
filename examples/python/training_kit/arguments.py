# SPDX-License-Identifier: Apache-2.0
"""Command line of the training examples. Whatever is wrong gets one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from training_kit.failure import fail

__all__ = [
    "OneLineParser",
    "add_training_arguments",
    "chosen_device",
    "natural_float",
    "natural_int",
    "positive_float",
    "positive_int",
]

Number = TypeVar("Number", int, float)


class OneLineParser(argparse.ArgumentParser):
    """Shows its description as written, takes no abbreviations, and says what is wrong in one line."""

    def __init__(self, description: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the arguments)")


def positive_int(text: str) -> int:
    return _number(int, text, lambda value: 0 < value < 2**31, "a positive integer")


def natural_int(text: str) -> int:
    return _number(int, text, lambda value: 0 <= value < 2**63, "an integer from 0 to 2**63 - 1")


def positive_float(text: str) -> float:
    return _number(float, text, lambda value: 0 < value < float("inf"), "a positive number")


def natural_float(text: str) -> float:
    return _number(float, text, lambda value: 0 <= value < float("inf"), "a number, 0 or more")


def _number(kind: Callable[[str], Number], text: str, accept: Callable[[Number], bool], wanted: str) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not accept(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return value


def add_training_arguments(parser: argparse.ArgumentParser, *, output: str) -> None:
    """What a preset (``--size``) decides is None here; ``output`` describes the default folder."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, help="optimiser steps (by size)")
    training.add_argument("--batch", type=positive_int, help="samples a step (by size)")
    training.add_argument("--lr", type=positive_float, help="peak learning rate (by size)")
    training.add_argument("--weight-decay", type=natural_float, default=0.1, help="of matrices (0.1)")
    training.add_argument("--clip", type=positive_float, default=1.0, help="gradient norm limit (1)")
    training.add_argument("--seed", type=natural_int, default=0, help="of weights and training data (0)")
    training.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    training.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, help=f"folder of this run ({output})")
    run.add_argument("--fresh", action="store_true", help="start over, even if --output holds a run")
    run.add_argument("--save-every", type=positive_int, help="steps between checkpoints (by size)")
    run.add_argument("--eval-every", type=positive_int, default=200, help="steps between validations (200)")
    run.add_argument("--eval-samples", type=positive_int, default=256, help="held-out samples (256)")


def chosen_device(args: argparse.Namespace) -> torch.device:
    """The device of the run, or one line that says what is wrong with the arguments."""
    try:
        device = torch.device(args.device)
    except RuntimeError:
        fail(f"--device must be cpu or cuda, got {args.device!r}")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device must be cpu or cuda, got {args.device!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            fail(f"--device {args.device} needs a GPU and a CUDA build of torch; torch {torch.__version__} sees none")
        if (device.index or 0) >= torch.cuda.device_count():
            fail(f"--device {args.device} does not exist: torch sees {torch.cuda.device_count()} GPUs")
    return device
