# SPDX-License-Identifier: Apache-2.0
"""Command line of the training examples. Whatever is wrong gets one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from mixture_of_mamba.nn import PROJECTIONS
from training_kit.checkpoint import METRICS_NAME, read_json_lines
from training_kit.failure import fail

__all__ = [
    "REPOSITORY",
    "OneLineParser",
    "chosen_device",
    "decoupled",
    "natural_float",
    "natural_small_int",
    "parse_settings",
    "positive_int",
]

REPOSITORY = Path(__file__).resolve().parents[3]
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


def natural_small_int(text: str) -> int:
    return _number(int, text, lambda value: 0 <= value < 2**31, "an integer, 0 or more")


def mixer(text: str) -> str:
    """``mom``, ``mamba``, or some projections, which come out in the library's order."""
    if text in ("mom", "mamba"):
        return text
    names = text.split(",")
    if not set(names) <= set(PROJECTIONS) or len(set(names)) < len(names):
        choices = ", ".join(PROJECTIONS)
        raise argparse.ArgumentTypeError(f"must be mom, mamba, or some of {choices} with commas, got {text!r}")
    return ",".join(name for name in PROJECTIONS if name in names)


def decoupled(mixer: str) -> tuple[str, ...]:
    """The projections with weights of their own for every modality."""
    return {"mom": PROJECTIONS, "mamba": ()}.get(mixer, tuple(mixer.split(",")))


def parse_settings(
    description: str,
    setting: str,
    presets: Mapping[str, Any],
    more: Callable[[argparse.ArgumentParser], None],
    arguments: list[str] | None = None,
) -> argparse.Namespace:
    """The command line of one of the settings, values of the preset filled in; one line when something is wrong.

    Args:
        description: what ``--help`` begins with.
        setting: name of the script; runs are in ``runs/<setting>-<size>-<mixer>``.
        presets: what ``--size`` stands for, a dataclass each; arguments of the same names change it.
        more: adds the setting's own arguments.
        arguments: instead of those of the command.
    """
    parser = OneLineParser(description=description)
    model = parser.add_argument_group("model and data")
    help_mixer = "mom (Mixture-of-Mamba), mamba (dense), or the projections per modality, as in in_proj,out_proj (mom)"
    model.add_argument("--mixer", type=mixer, default="mom", help=help_mixer)
    model.add_argument("--size", choices=tuple(presets), default="small", help="preset of model and run (small)")
    model.add_argument("--d-model", type=positive_int, help="width (by size)")
    model.add_argument("--layers", type=positive_int, help="depth (by size)")
    model.add_argument("--concepts", type=positive_int, help="how many drawings take part (by size)")
    model.add_argument("--data", type=Path, default=REPOSITORY / "data", help="folder of the data packs (data/)")
    more(parser)
    add_training_arguments(parser, output=f"runs/{setting}-SIZE-MIXER")
    args = parser.parse_args(arguments)
    for name, value in vars(presets[args.size]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.concepts == 1:
        fail("--concepts must be at least 2, got 1")
    if args.compare is not None and not read_json_lines(args.compare / METRICS_NAME):
        fail(f"--compare must be the folder of a run, which has a {METRICS_NAME}, got {args.compare}")
    for name in ("data", "output"):
        folder = getattr(args, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            fail(f"--{name} must be a folder, got the file {folder}")
    args.output = args.output or REPOSITORY / "runs" / f"{setting}-{args.size}-{args.mixer.replace(',', '+')}"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name in ("batch", "eval_samples"):
        if getattr(args, name) % processes:
            shown = name.replace("_", "-")
            fail(f"--{shown} must be a multiple of the {processes} processes, got {getattr(args, name)}")
    return args


def add_training_arguments(parser: argparse.ArgumentParser, *, output: str) -> None:
    """What a preset (``--size``) decides is None here; ``output`` describes the default folder."""
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=positive_int, help="optimiser steps (by size)")
    training.add_argument("--batch", type=positive_int, help="samples a step, over all processes (by size)")
    training.add_argument("--lr", type=positive_float, help="peak learning rate (by size)")
    training.add_argument("--weight-decay", type=natural_float, default=0.1, help="of matrices (0.1)")
    training.add_argument("--clip", type=positive_float, default=1.0, help="gradient norm limit (1)")
    training.add_argument("--seed", type=natural_int, default=0, help="of weights and training data (0)")
    training.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    training.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    help_parallel = "under torchrun: ddp (each process has the model) or fsdp2 (weights are sharded) (ddp)"
    training.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp", help=help_parallel)
    run = parser.add_argument_group("run")
    run.add_argument("--output", type=Path, help=f"folder of this run ({output})")
    run.add_argument("--fresh", action="store_true", help="start over, even if --output holds a run")
    run.add_argument("--save-every", type=positive_int, help="steps between checkpoints (by size)")
    run.add_argument("--eval-every", type=positive_int, default=200, help="steps between validations (200)")
    run.add_argument("--eval-samples", type=positive_int, default=256, help="held-out samples (256)")
    run.add_argument("--compare", type=Path, help="folder of another run to show in the same plot")
    run.add_argument("--draw", type=natural_small_int, default=8, help="held-out samples to draw at the end (8)")


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
