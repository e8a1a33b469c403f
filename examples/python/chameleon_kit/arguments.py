# SPDX-License-Identifier: Apache-2.0
"""Command line of the Chameleon-style example, and what its sizes stand for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from training_kit.arguments import OneLineParser, add_training_arguments, natural_float, positive_int
from training_kit.checkpoint import read_json_lines
from training_kit.failure import fail
from training_kit.trainer import METRICS_NAME

__all__ = ["parse_arguments"]

REPOSITORY = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Preset:
    """What ``--size`` stands for; arguments of the same names change it. Concepts: None is all of the pack."""

    d_model: int
    layers: int
    concepts: int | None
    codes: int
    batch: int
    steps: int
    lr: float
    save_every: int


PRESETS = {
    "tiny": Preset(64, 2, concepts=32, codes=128, batch=16, steps=300, lr=6e-3, save_every=100),
    "small": Preset(128, 4, concepts=64, codes=768, batch=16, steps=3000, lr=4e-3, save_every=100),
    "base": Preset(512, 12, concepts=None, codes=1024, batch=256, steps=4000, lr=1e-3, save_every=500),
    "large": Preset(1024, 24, concepts=None, codes=2048, batch=256, steps=10000, lr=5e-4, save_every=1000),
}


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments with the preset's values filled in; ends the process with one line when one is bad."""
    parser = OneLineParser(description=description)
    parser.add_argument("--mixer", choices=("mom", "mamba"), default="mom", help="Mixture-of-Mamba or dense (mom)")
    parser.add_argument("--size", choices=tuple(PRESETS), default="small", help="preset of model and run (small)")
    parser.add_argument("--d-model", type=positive_int, help="width (by size)")
    parser.add_argument("--layers", type=positive_int, help="depth (by size)")
    parser.add_argument("--concepts", type=positive_int, help="how many drawings take part (by size)")
    parser.add_argument("--codes", type=positive_int, help="size of the image codebook (by size)")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="folder of the sprite pack (data/)")
    add_training_arguments(parser, output="runs/chameleon-SIZE-MIXER")
    parser.add_argument("--compare", type=Path, help="folder of another run to show in the same plot")
    parser.add_argument("--draw", type=positive_int, default=8, help="held-out captions to draw (8)")
    parser.add_argument("--temperature", type=natural_float, default=0.7, help="of drawing (0.7); 0 is greedy")
    args = parser.parse_args(arguments)
    for name, value in vars(PRESETS[args.size]).items():
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
    args.output = args.output or REPOSITORY / "runs" / f"chameleon-{args.size}-{args.mixer}"
    return args
