# SPDX-License-Identifier: Apache-2.0
"""What is trained: text token by token, pictures by flow matching, and the held-out loss of each."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from discrete_kit.data import DiscreteData
from emoji_scenes import SceneSource, Splits, render, sprite_tensor
from scene_streams.patches import PatchLatents
from scene_streams.vocabulary import BOI, EOI, NULL, Vocabulary
from torch import Tensor, nn
from training_kit.arguments import decoupled
from training_kit.parallel import World
from training_kit.task import Batch, Task

from mixture_of_mamba import models
from transfusion_kit.data import LatentStreams
from transfusion_kit.samples import draw_samples

__all__ = ["TransfusionTask"]

FITTING_SCENES = 2048
EVALUATION_BATCH = 32  # for each process


class Losses(nn.Module):
    """The model's losses as its forward, for what wraps modules: losses, then what they are means of."""

    def __init__(self, model: models.Transfusion) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,
        latents: Tensor,
        positions: Tensor,
        routing: Any,
        times: Tensor,
        noise: Tensor,
        dropped: Tensor,
    ) -> Tensor:
        losses = self.model.loss(tokens, latents, positions, routing, times=times, noise=noise, dropped=dropped)
        counts = torch.stack((losses.text_count.float(), losses.text.new_tensor(losses.pictures)))
        return torch.stack((torch.stack((losses.text, losses.diffusion)) * counts, counts))


class TransfusionTask(Task):
    """Transfusion.

    Args:
        args: of :mod:`transfusion_kit.arguments`.
        data: the pack.
        world: the processes that train.
        constants: of a checkpoint to go on from, or empty; then the latents are fitted here.
    """

    modalities = ("text", "image")
    units: ClassVar = {"text": "nats a token", "image": "squared error of the velocity"}
    baseline_name = "without context"

    def __init__(
        self, args: argparse.Namespace, data: DiscreteData, world: World, constants: dict[str, Tensor]
    ) -> None:
        self.args, self.world = args, world
        sprites = sprite_tensor(data.pack, world.device)
        self.splits = Splits(data.pack, args.seed)
        if not constants:
            fitted = PatchLatents.fit(render(self.splits.fitting.batch(0, FITTING_SCENES), sprites), args.latents)
            constants = {"mean": fitted.mean, "basis": fitted.basis}
        self.constants = world.agreed({name: tensor.to(world.device) for name, tensor in constants.items()})
        latents = PatchLatents(self.constants["mean"], self.constants["basis"])
        patches = latents.encode(render(self.splits.fitting.batch(0, 1), sprites)).shape[1]
        vocabulary = Vocabulary(data.pack.names, self.splits.known, ())
        self.streams = LatentStreams(vocabulary, latents, sprites, round(patches**0.5))
        self.prepare()

    def build(self, mixer: str | None = None) -> Losses:
        args = self.args
        decoder = models.DecoderConfig(
            args.d_model,
            args.layers,
            num_modalities=2,
            decouple=decoupled(mixer or args.mixer),
            mixers_per_layer=1,
            bidirectional=True,
            modulated=True,
        )
        config = models.TransfusionConfig(
            decoder,
            text_size=self.streams.vocabulary.boundaries[-1],
            dim_latent=args.latents,
            boi=BOI,
            eoi=EOI,
            null=NULL,
            prediction="velocity",
            patch_size=1,
            tied=True,
        )
        return Losses(models.Transfusion(config))

    def blocks(self, model: Losses) -> list[nn.Module]:
        return list(model.model.decoder.layers)

    def training_batch(self, step: int) -> Batch:
        size = self.args.batch
        return self.streams.batch(self.splits.training, step, size, self.world.share(size), drop=True)

    def objective(self, sums: Tensor, counts: Tensor) -> Tensor:
        text, image = sums[0] / counts
        return text + self.args.diffusion_weight * image

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of each modality; and of pictures of drawings never seen, whose names have no token."""
        result = dict(zip(self.modalities, self.means(self._evaluation_batches(self.splits.held_out)), strict=True))
        if self.splits.new_drawings is not None:
            result["new_drawings_image"] = self.means(self._evaluation_batches(self.splits.new_drawings))[1]
        return result

    def find_baselines(self) -> dict[str, float]:
        """Text: entropy of the held-out tokens themselves. Image: error of the best linear map of each noisy number.

        Latents have mean 0 and variance 1, as noise has. Of x_t = (1 - t) x + t n, the best linear estimate of n - x is
        (2 t - 1) / ((1 - t)^2 + t^2) x_t, and its mean squared error 1 / ((1 - t)^2 + t^2).
        """
        counts = torch.zeros(self.streams.vocabulary.boundaries[-1])
        errors = []
        for batch in self._evaluation_batches(self.splits.held_out, whole=True):
            tokens, _, _, routing, times, _, _ = (_on_cpu(part) for part in batch.inputs)
            is_text = (routing.rows < routing.offsets[1]).view(tokens.shape).cpu()
            labels = tokens[:, 1:][is_text[:, 1:] & is_text[:, :-1]]
            counts += torch.bincount(labels, minlength=len(counts))
            errors.append(1 / ((1 - times).square() + times.square()))
        entropy = torch.distributions.Categorical(counts).entropy().item()
        return {"text": entropy, "image": torch.cat(errors).mean().item()}

    def draw(self, model: Losses, folder: Path) -> dict[str, Any]:
        scenes = self.splits.held_out.batch(self.args.eval_samples, max(self.args.draw, self.args.eval_samples))
        return draw_samples(model.model, self.streams, scenes, self.args, folder)

    def _evaluation_batches(self, source: SceneSource, *, whole: bool = False) -> Iterator[Batch]:
        samples, most = self.args.eval_samples, EVALUATION_BATCH * self.world.size
        for first in range(0, samples, most):
            size = min(most, samples - first)
            yield self.streams.batch(source, first, size, slice(size) if whole else self.world.share(size))


def _on_cpu(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part
