# SPDX-License-Identifier: Apache-2.0
"""Scenes: one or two drawings on a coloured background, with a caption that says so.

What a scene holds is drawn from (seed, stream, step) alone, so a run that resumes at a step sees the same
scenes as one that never stopped. Pictures are rendered in batches with torch, on the device that trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from training_kit.transfer import to_device

from emoji_scenes.pack import MAX_WORDS, SpritePack

__all__ = [
    "BACKGROUNDS",
    "COLOUR_NAMES",
    "IMAGE_SIZE",
    "NOBODY",
    "PLACE_NAMES",
    "Scene",
    "SceneSource",
    "Scenes",
    "longest_caption",
    "render",
    "sprite_tensor",
    "template_words",
]

IMAGE_SIZE = 32
SUPERSAMPLING = 2

# Light ones, against which the drawings' black outlines show; each costs the image codebook its own set of edges.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "mint": (178, 235, 210),
    "sky": (160, 210, 250),
    "rose": (250, 190, 205),
    "lemon": (252, 240, 150),
}
COLOUR_NAMES = tuple(BACKGROUNDS)

# The words between two drawings -> centre of the first one, in units of half the picture; the second mirrors it.
PLACES = {"left of": (-0.5, 0.0), "right of": (0.5, 0.0), "above": (0.0, -0.5), "below": (0.0, 0.5)}
PLACE_NAMES = tuple(PLACES)
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

NOBODY = -1
SINGLE_SHARE = 0.5
SINGLE_SIZE = (0.96, 1.04)  # of the picture's side
PAIR_SIZE = (0.54, 0.58)
JITTER = 0.02
MAX_TURN = np.deg2rad(4.0)


@dataclass(frozen=True)
class Scene:
    """One or two sprites on a background: what a scene of :class:`Scenes` is, for people.

    Attributes:
        concepts: indices into the pack.
        captions: all that are true of it, the one it goes by first: what is left of a thing has that to its right.
    """

    concepts: tuple[int, ...]
    background: int
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        return self.captions[0]


@dataclass(frozen=True)
class Scenes(Sequence[Scene]):
    """Scenes as arrays, one row each; ``scenes[number]`` is one as a :class:`Scene`, any other index gives Scenes.

    Attributes:
        names: of the pack.
        concepts: ``[scenes, 2]``, indices into the pack; the second is NOBODY where there is one drawing.
        places: ``[scenes]``, index into PLACES: where the first one is, seen from the second.
        backgrounds: ``[scenes]``, index into BACKGROUNDS.
        poses: float32 ``[scenes, 2, 4]``, x, y, size and turn of each.
    """

    names: list[str]
    concepts: np.ndarray
    places: np.ndarray
    backgrounds: np.ndarray
    poses: np.ndarray

    def __len__(self) -> int:
        return len(self.concepts)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice | np.ndarray):
            arrays = (self.concepts, self.places, self.backgrounds, self.poses)
            return Scenes(self.names, *(array[index] for array in arrays))
        concepts = tuple(concept for concept in self.concepts[index].tolist() if concept != NOBODY)
        names = [self.names[concept] for concept in concepts]
        place, background = PLACE_NAMES[self.places[index]], int(self.backgrounds[index])
        orders = [(place, names), (OPPOSITES[place], names[::-1])][: len(names)]
        captions = tuple(f" {relation} ".join(order) + f" on {COLOUR_NAMES[background]}" for relation, order in orders)
        return Scene(concepts, background, captions)


class SceneSource:
    """Draws scenes of some of the pack's concepts.

    Args:
        pack: drawings and names.
        concepts: which of them may appear.
        seed, stream: scenes of different seeds or streams (training, validation ...) are independent.
    """

    def __init__(self, pack: SpritePack, concepts: list[int], seed: int, stream: int) -> None:
        self.names = pack.names
        self.concepts = np.array(concepts)
        self.seed = seed
        self.stream = stream

    def batch(self, step: int, size: int) -> Scenes:
        random = np.random.default_rng([self.seed, self.stream, step])
        count = len(self.concepts)
        backgrounds = random.integers(len(COLOUR_NAMES), size=size)
        paired = (random.random(size) >= SINGLE_SHARE) & (count > 1)
        first = random.integers(count, size=size)
        second = (first + random.integers(1, max(count, 2), size=size)) % count  # never the first one again
        places = random.integers(len(PLACE_NAMES), size=size)

        centres = np.array(list(PLACES.values()))[places, None, :] * np.array([[1.0], [-1.0]]) * paired[:, None, None]
        jitter = random.uniform(-JITTER, JITTER, size=(size, 2, 2))
        low, high = np.where(paired[:, None], PAIR_SIZE, SINGLE_SIZE).T[:, :, None]
        sizes = low + (high - low) * random.random((size, 2))
        turns = random.uniform(-MAX_TURN, MAX_TURN, size=(size, 2))
        poses = np.concatenate((centres + jitter, sizes[..., None], turns[..., None]), axis=2).astype(np.float32)
        concepts = np.stack((self.concepts[first], np.where(paired, self.concepts[second], NOBODY)), 1)
        return Scenes(self.names, concepts, places, backgrounds, poses)


def render(scenes: Scenes, sprites: Tensor) -> Tensor:
    """Pictures of scenes.

    Args:
        scenes: what to draw.
        sprites: :func:`sprite_tensor` of the pack, on the device that shall draw.

    Returns:
        float32 ``[len(scenes), 3, IMAGE_SIZE, IMAGE_SIZE]`` in 0 .. 1.
    """
    device = sprites.device
    side = IMAGE_SIZE * SUPERSAMPLING
    palette = np.array(list(BACKGROUNDS.values()), dtype=np.float32) / 255
    backgrounds = to_device(palette[scenes.backgrounds], device)
    canvas = backgrounds[:, :, None, None].expand(-1, -1, side, side).contiguous()
    for layer in range(2):
        members = np.flatnonzero(scenes.concepts[:, layer] != NOBODY)
        if not len(members):
            continue
        concepts = to_device(scenes.concepts[members, layer], device)
        maps = to_device(_inverse_maps(scenes.poses[members, layer]), device)
        grid = functional.affine_grid(maps, [len(members), 4, side, side], align_corners=False)
        drawn = functional.grid_sample(sprites[concepts], grid, align_corners=False)
        at = to_device(members, device)
        canvas[at] = canvas[at] * (1 - drawn[:, 3:]) + drawn[:, :3]
    return functional.avg_pool2d(canvas, SUPERSAMPLING)


def _inverse_maps(poses: np.ndarray) -> np.ndarray:
    """``[sprites, 4]`` -> ``[sprites, 2, 3]``, from places on the canvas to places on the sprite."""
    x, y, size, turn = poses.T
    cosine, sine = np.cos(turn) / size, np.sin(turn) / size
    rows = [cosine, sine, -(cosine * x + sine * y), -sine, cosine, sine * x - cosine * y]
    return np.stack(rows, 1).reshape(-1, 2, 3).astype(np.float32)


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
