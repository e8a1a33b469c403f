# SPDX-License-Identifier: Apache-2.0
"""What is trained: text token by token, pictures by flow matching, and the held-out loss of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from discrete_kit.data import DiscreteData
from emoji_scenes import render
from scene_streams.patches import PatchLatents
from scene_streams.task import FITTING_SCENES, SceneTask
from scene_streams.vocabulary import BOI, EOI, NULL, Vocabulary
from torch import Tensor, nn
from training_kit.task import Batch

from mixture_of_mamba import models
from transfusion_kit.data import LatentStreams
from transfusion_kit.samples import draw_samples

__all__ = ["TransfusionTask"]


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


class TransfusionTask(SceneTask):
    """Transfusion; its constants make latents of patches."""

    streams: LatentStreams
    modalities = ("text", "image")
    units: ClassVar = {"text": "nats a token", "image": "squared error of the velocity"}
    baseline_name = "without context"

    def fit(self, data: DiscreteData, sprites: Tensor) -> dict[str, Tensor]:
        fitted = PatchLatents.fit(render(self.splits.fitting.batch(0, FITTING_SCENES), sprites), self.args.latents)
        return {"mean": fitted.mean, "basis": fitted.basis}

    def set_up(self, data: DiscreteData, sprites: Tensor) -> None:
        latents = PatchLatents(self.constants["mean"], self.constants["basis"])
        patches = latents.encode(render(self.splits.fitting.batch(0, 1), sprites)).shape[1]
        vocabulary = Vocabulary(data.pack.names, self.splits.known, ())
        self.streams = LatentStreams(vocabulary, latents, sprites, round(patches**0.5))

    def build(self, mixer: str | None = None) -> Losses:
        config = models.TransfusionConfig(
            self.decoder(2, mixer, bidirectional=True, modulated=True),
            text_size=self.streams.vocabulary.boundaries[-1],
            dim_latent=self.args.latents,
            boi=BOI,
            eoi=EOI,
            null=NULL,
            prediction="velocity",
            patch_size=1,
            tied=True,
        )
        return Losses(models.Transfusion(config))

    def training_batch(self, step: int) -> Batch:
        size = self.args.batch
        return self.streams.batch(self.splits.training, step, size, self.world.share(size), drop=True)

    def objective(self, sums: Tensor, counts: Tensor) -> Tensor:
        text, image = sums[0] / counts
        return text + self.args.diffusion_weight * image

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of each modality; and of pictures of drawings never seen, whose names have no token."""
        result = dict(zip(self.modalities, self.means(self.evaluation_batches(self.splits.held_out)), strict=True))
        if self.splits.new_drawings is not None:
            result["new_drawings_image"] = self.means(self.evaluation_batches(self.splits.new_drawings))[1]
        return result

    def find_baselines(self) -> dict[str, float]:
        """Text: entropy of the held-out tokens themselves. Image: error of the best linear map of each noisy number.

        Latents have mean 0 and variance 1, as noise has. Of x_t = (1 - t) x + t n, the best linear estimate of n - x is
        (2 t - 1) / ((1 - t)^2 + t^2) x_t, and its mean squared error 1 / ((1 - t)^2 + t^2).
        """
        counts = torch.zeros(self.streams.vocabulary.boundaries[-1])
        errors = []
        for batch in self.evaluation_batches(self.splits.held_out, whole=True):
            tokens, _, _, routing, times, _, _ = (_on_cpu(part) for part in batch.inputs)
            is_text = (routing.rows < routing.offsets[1]).view(tokens.shape).cpu()
            labels = tokens[:, 1:][is_text[:, 1:] & is_text[:, :-1]]
            counts += torch.bincount(labels, minlength=len(counts))
            errors.append(1 / ((1 - times).square() + times.square()))
        entropy = torch.distributions.Categorical(counts).entropy().item()
        return {"text": entropy, "image": torch.cat(errors).mean().item()}

    def draw(self, model: Losses, folder: Path) -> dict[str, Any]:
        return draw_samples(model.model, self.streams, self.drawn_scenes(), self.args, folder)


def _on_cpu(part: Any) -> Any:
    return part.cpu() if isinstance(part, Tensor) else part
