# SPDX-License-Identifier: Apache-2.0
"""Endless captioned pictures composed of OpenMoji drawings."""

from emoji_scenes.pack import CREDIT, SpritePack, load_or_build_pack
from emoji_scenes.scenes import (
    BACKGROUNDS,
    COLOUR_NAMES,
    NOBODY,
    PLACE_NAMES,
    Scene,
    Scenes,
    SceneSource,
    longest_caption,
    render,
    sprite_tensor,
    template_words,
)
from emoji_scenes.splits import HELD_OUT_SEED, Splits

__all__ = [
    "BACKGROUNDS",
    "COLOUR_NAMES",
    "CREDIT",
    "HELD_OUT_SEED",
    "NOBODY",
    "PLACE_NAMES",
    "Scene",
    "SceneSource",
    "Scenes",
    "Splits",
    "SpritePack",
    "load_or_build_pack",
    "longest_caption",
    "render",
    "sprite_tensor",
    "template_words",
]
