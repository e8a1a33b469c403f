# SPDX-License-Identifier: Apache-2.0
"""Command lines of the discrete settings, and what their sizes stand for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

from training_kit.arguments import natural_float, parse_settings, positive_int

__all__ = ["parse_chameleon", "parse_three_modalities"]


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


@dataclass(frozen=True)
class SpeechPreset(Preset):
    speech_codes: int


CHAMELEON = {
    "tiny": Preset(64, 2, concepts=32, codes=128, batch=16, steps=300, lr=6e-3, save_every=100),
    "small": Preset(128, 4, concepts=64, codes=768, batch=16, steps=2500, lr=4e-3, save_every=100),
    "base": Preset(512, 12, concepts=None, codes=1024, batch=128, steps=2000, lr=1e-3, save_every=500),
    "large": Preset(1024, 24, concepts=None, codes=2048, batch=256, steps=10000, lr=5e-4, save_every=1000),
}
THREE = {
    "tiny": SpeechPreset(64, 2, 32, codes=128, speech_codes=128, batch=12, steps=300, lr=6e-3, save_every=100),
    "small": SpeechPreset(128, 4, 64, codes=512, speech_codes=512, batch=12, steps=2000, lr=4e-3, save_every=100),
    "base": SpeechPreset(512, 12, 512, codes=1024, speech_codes=1024, batch=96, steps=2000, lr=1e-3, save_every=500),
    "large": SpeechPreset(1024, 24, 512, codes=2048, speech_codes=2048, batch=192, steps=9000, lr=5e-4, save_every=900),
}  # fmt: skip


def _add_codes(speech: bool, parser: argparse.ArgumentParser) -> None:
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--codes", type=positive_int, help="size of the image codebook (by size)")
    if speech:
        tokens.add_argument("--speech-codes", type=positive_int, help="size of the speech codebook (by size)")
    tokens.add_argument("--temperature", type=natural_float, default=0.7, help="of drawing (0.7); 0 is greedy")


def parse_chameleon(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The arguments with the preset's values filled in; ends the process with one line when one is bad."""
    return parse_settings(description, "chameleon", CHAMELEON, partial(_add_codes, False), arguments)


def parse_three_modalities(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The same, with speech."""
    return parse_settings(description, "three_modalities", THREE, partial(_add_codes, True), arguments)
