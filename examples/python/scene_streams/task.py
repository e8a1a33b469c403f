# SPDX-License-Identifier: Apache-2.0
"""What the settings have in common: scenes are their samples, and the model is one decoder with one mixer a layer."""

from __future__ import annotations

import argparse
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, Protocol

from emoji_scenes import Scenes, SceneSource, Splits, SpritePack, sprite_tensor
from torch import Tensor, nn
from training_kit.arguments import decoupled
from training_kit.parallel import World
from training_kit.task import Batch, Task

from mixture_of_mamba import models

__all__ = ["FITTING_SCENES", "SceneTask"]

FITTING_SCENES = 2048
EVALUATION_BATCH = 32  # for each process


class Packs(Protocol):
    pack: SpritePack


class Streams(Protocol):
    """Makes samples of scenes."""

    def batch(self, source: SceneSource, step: int, size: int, share: slice, **options: Any) -> Batch: ...


class SceneTask(Task):
    """A task on scenes.

    Args:
        args: of the setting.
        data: the packs.
        world: the processes that train.
        constants: of a checkpoint to go on from, or empty; then they are fitted here.
    """

    streams: Streams

    def __init__(self, args: argparse.Namespace, data: Packs, world: World, constants: dict[str, Tensor]) -> None:
        self.args, self.world = args, world
        self.splits = Splits(data.pack, args.seed)
        sprites = sprite_tensor(data.pack, world.device)
        constants = constants or self.fit(data, sprites)
        self.constants = world.agreed({name: tensor.to(world.device) for name, tensor in constants.items()})
        self.set_up(data, sprites)
        self.prepare()

    @abstractmethod
    def fit(self, data: Any, sprites: Tensor) -> dict[str, Tensor]:
        """The constants, from ``splits.fitting``."""

    @abstractmethod
    def set_up(self, data: Any, sprites: Tensor) -> None:
        """Set ``streams``, and what else the model needs, from ``constants``."""

    def decoder(self, modalities: int, mixer: str | None, **more: Any) -> models.DecoderConfig:
        """That of the arguments; of another mixer than the run's, if given."""
        names = decoupled(mixer or self.args.mixer)
        return models.DecoderConfig(
            self.args.d_model, self.args.layers, modalities, decouple=names, mixers_per_layer=1, **more
        )

    def blocks(self, model: Any) -> list[nn.Module]:
        return list(model.model.decoder.layers)

    def drawn_scenes(self) -> Scenes:
        """Held-out scenes to describe and draw."""
        return self.splits.held_out.batch(self.args.eval_samples, max(self.args.draw, self.args.eval_samples))

    def evaluation_batches(self, source: SceneSource, *, whole: bool = False, **options: Any) -> Iterator[Batch]:
        """This process's part of each, or all of it."""
        samples, most = self.args.eval_samples, EVALUATION_BATCH * self.world.size
        for first in range(0, samples, most):
            size = min(most, samples - first)
            share = slice(size) if whole else self.world.share(size)
            yield self.streams.batch(source, first, size, share, **options)
