# SPDX-License-Identifier: Apache-2.0
"""Endless captioned pictures composed of OpenMoji drawings."""

from emoji_scenes.pack import CREDIT, MissingPackagesError, SpritePack, load_or_build_pack
from emoji_scenes.scenes import (
    BACKGROUNDS,
    Scene,
    SceneSource,
    longest_caption,
    render,
    sprite_tensor,
    template_words,
)

__all__ = [
    "BACKGROUNDS",
    "CREDIT",
    "MissingPackagesError",
    "Scene",
    "SceneSource",
    "SpritePack",
    "load_or_build_pack",
    "longest_caption",
    "render",
    "sprite_tensor",
    "template_words",
]
