# SPDX-License-Identifier: Apache-2.0
"""Scenes: one or two drawings on a coloured background, with a caption that says so.

What a scene holds is drawn from (seed, stream, step) alone, so a run that resumes at a step sees the same
scenes as one that never stopped. Pictures are rendered in batches with torch, on the device that trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from emoji_scenes.pack import MAX_WORDS, SpritePack

__all__ = ["BACKGROUNDS", "IMAGE_SIZE", "Scene", "SceneSource", "longest_caption", "render", "sprite_tensor", "template_words"]

IMAGE_SIZE = 32
SUPERSAMPLING = 2

BACKGROUNDS = {
    "white": (255, 255, 255),
    "mint": (178, 235, 210),
    "sky": (160, 210, 250),
    "rose": (250, 190, 205),
    "lemon": (252, 240, 150),
    "lilac": (205, 185, 240),
    "grey": (170, 174, 180),
    "navy": (45, 55, 100),
}
COLOUR_NAMES = tuple(BACKGROUNDS)

# The words between two drawings -> centre of the first one, in units of half the picture; the second mirrors it.
PLACES = {"left of": (-0.5, 0.0), "right of": (0.5, 0.0), "above": (0.0, -0.5), "below": (0.0, 0.5)}
PLACE_NAMES = tuple(PLACES)

SINGLE_SHARE = 0.5
SINGLE_SIZE = (0.92, 1.08)  # of the picture's side
PAIR_SIZE = (0.54, 0.62)
JITTER = 0.04
MAX_TURN = np.deg2rad(8.0)


@dataclass(frozen=True)
class Scene:
    """One or two sprites; ``concepts`` index the pack, ``poses`` hold (x, y, size, turn) of each."""

    concepts: tuple[int, ...]
    poses: tuple[tuple[float, float, float, float], ...]
    background: int
    caption: str


class SceneSource:
    """Draws scenes of some of the pack's concepts.

    Args:
        pack: drawings and names.
        concepts: which of them may appear.
        seed, stream: scenes of different seeds or streams (training, validation ...) are independent.
    """

    def __init__(self, pack: SpritePack, concepts: list[int], seed: int, stream: int) -> None:
        self.pack = pack
        self.concepts = concepts
        self.seed = seed
        self.stream = stream

    def batch(self, step: int, size: int) -> list[Scene]:
        random = np.random.default_rng([self.seed, self.stream, step])
        return [self._scene(random) for _ in range(size)]

    def _scene(self, random: np.random.Generator) -> Scene:
        background = int(random.integers(len(COLOUR_NAMES)))
        count = 1 if random.random() < SINGLE_SHARE or len(self.concepts) < 2 else 2
        concepts = tuple(int(c) for c in random.choice(self.concepts, size=count, replace=False))
        names = [self.pack.names[concept] for concept in concepts]
        if count == 1:
            centres = [(0.0, 0.0)]
            sizes = SINGLE_SIZE
            words = names[0]
        else:
            place = PLACE_NAMES[int(random.integers(len(PLACE_NAMES)))]
            x, y = PLACES[place]
            centres = [(x, y), (-x, -y)]
            sizes = PAIR_SIZE
            words = f"{names[0]} {place} {names[1]}"
        poses = tuple(
            (
                x + random.uniform(-JITTER, JITTER),
                y + random.uniform(-JITTER, JITTER),
                random.uniform(*sizes),
                random.uniform(-MAX_TURN, MAX_TURN),
            )
            for x, y in centres
        )
        return Scene(concepts, poses, background, f"{words} on {COLOUR_NAMES[background]}")


def render(scenes: list[Scene], sprites: Tensor) -> Tensor:
    """Pictures of scenes.

    Args:
        scenes: what to draw.
        sprites: :func:`sprite_tensor` of the pack, on the device that shall draw.

    Returns:
        float32 ``[len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE]`` in 0 .. 1.
    """
    device = sprites.device
    side = IMAGE_SIZE * SUPERSAMPLING
    palette = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device) / 255
    backgrounds = torch.tensor([scene.background for scene in scenes], device=device)
    canvas = palette[backgrounds][:, :, None, None].expand(-1, -1, side, side)

    owners = [index for index, scene in enumerate(scenes) for _ in scene.concepts]
    concepts = torch.tensor([concept for scene in scenes for concept in scene.concepts], device=device)
    poses = torch.tensor([pose for scene in scenes for pose in scene.poses], dtype=torch.float32)
    x, y, size, turn = poses.unbind(1)
    cosine, sine = turn.cos() / size, turn.sin() / size
    # affine_grid maps places of the canvas to places of the sprite: the inverse of shift, turn and scale.
    rows = [cosine, sine, -(cosine * x + sine * y), -sine, cosine, sine * x - cosine * y]
    maps = torch.stack(rows, 1).reshape(-1, 2, 3).to(device)
    grid = functional.affine_grid(maps, [len(owners), 4, side, side], align_corners=False)
    drawn = functional.grid_sample(sprites[concepts], grid, align_corners=False)

    canvas = canvas.clone()
    first = torch.tensor([i for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner], device=device)
    second = torch.tensor([i for i, owner in enumerate(owners) if i > 0 and owners[i - 1] == owner], device=device)
    for layer in (first, second):
        if layer.numel():
            at = torch.tensor(owners, device=device)[layer]
            colour, opacity = drawn[layer, :3], drawn[layer, 3:]
            canvas[at] = canvas[at] * (1 - opacity) + colour
    return functional.avg_pool2d(canvas, SUPERSAMPLING)


def sprite_tensor(pack: SpritePack, device: torch.device) -> Tensor:
    """The pack's drawings as :func:`render` wants them; colours are premultiplied by opacity, so edges stay clean."""
    rgba = torch.from_numpy(pack.sprites).to(device).permute(0, 3, 1, 2).float() / 255
    return torch.cat((rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]), 1)


def template_words() -> set[str]:
    """Every word a caption may hold beside the names."""
    return {"on", *COLOUR_NAMES, *" ".join(PLACE_NAMES).split()}


def longest_caption() -> int:
    """In words."""
    place = max(len(name.split()) for name in PLACE_NAMES)
    return 2 * MAX_WORDS + place + len(("on", "colour"))
