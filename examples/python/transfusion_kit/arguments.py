# SPDX-License-Identifier: Apache-2.0
"""Command line of the Transfusion-style example, and what its sizes stand for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from training_kit.arguments import parse_settings, positive_float, positive_int

__all__ = ["parse_transfusion"]


@dataclass(frozen=True)
class Preset:
    """What ``--size`` stands for; arguments of the same names change it. Concepts: None is all of the pack."""

    d_model: int
    layers: int
    concepts: int | None
    latents: int
    batch: int
    steps: int
    lr: float
    save_every: int


PRESETS = {
    "tiny": Preset(64, 2, concepts=32, latents=12, batch=16, steps=300, lr=6e-3, save_every=100),
    "small": Preset(128, 4, concepts=64, latents=16, batch=16, steps=1800, lr=4e-3, save_every=100),
    "base": Preset(512, 12, concepts=None, latents=16, batch=128, steps=2000, lr=1e-3, save_every=500),
    "large": Preset(1024, 24, concepts=None, latents=24, batch=256, steps=10000, lr=5e-4, save_every=1000),
}


def _add_diffusion(parser: argparse.ArgumentParser) -> None:
    diffusion = parser.add_argument_group("diffusion")
    diffusion.add_argument("--latents", type=positive_int, help="numbers that stand for a patch, at most 48 (by size)")
    diffusion.add_argument("--diffusion-weight", type=positive_float, default=2.0, help="of its loss, beside text (2)")
    diffusion.add_argument("--denoising-steps", type=positive_int, default=25, help="of drawing (25)")
    diffusion.add_argument("--guidance", type=positive_float, default=2.0, help="of drawing (2); 1 is none")


def parse_transfusion(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments with the preset's values filled in; ends the process with one line when one is bad."""
    return parse_settings(description, "transfusion", PRESETS, _add_diffusion, arguments)
