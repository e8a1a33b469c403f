# SPDX-License-Identifier: Apache-2.0
"""What is trained: scenes as one stream of tokens of all modalities, and the held-out loss of each."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from emoji_scenes import HELD_OUT_SEED, SceneSource, Splits, render, sprite_tensor
from scene_streams.patches import PatchTokeniser
from scene_streams.vocabulary import BOI, BOSP, EOI, EOSP, Vocabulary
from spoken_names import SpeechTokeniser, SpokenScenes
from torch import Tensor, nn
from training_kit.arguments import decoupled
from training_kit.parallel import World
from training_kit.task import Batch, Task

from discrete_kit.data import DiscreteData, TokenStreams
from discrete_kit.samples import draw_samples
from mixture_of_mamba import Routing, models

__all__ = ["DiscreteTask"]

MODALITIES = ("text", "image", "speech")
FITTING_SCENES = 2048
EVALUATION_BATCH = 32  # for each process
Z_LOSS_WEIGHT = 1e-5  # Lumina-mGPT's, which trains Chameleon


class Losses(nn.Module):
    """The model's losses as its forward, for what wraps modules: cross-entropy, z, labels; sums by modality."""

    def __init__(self, model: models.Chameleon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        losses = self.model.loss(tokens, routing)
        return torch.stack((losses.cross_entropy, losses.z, losses.count))


class DiscreteTask(Task):
    """Chameleon, with speech or without.

    Args:
        args: of :mod:`discrete_kit.arguments`.
        data: the packs.
        world: the processes that train.
        constants: of a checkpoint to go on from, or empty; then the tokenisers are fitted here.
    """

    units: ClassVar = dict.fromkeys(MODALITIES, "nats a token")
    baseline_name = "unigram entropy"

    def __init__(
        self, args: argparse.Namespace, data: DiscreteData, world: World, constants: dict[str, Tensor]
    ) -> None:
        self.args, self.world = args, world
        sprites = sprite_tensor(data.pack, world.device)
        self.splits = Splits(data.pack, args.seed)
        constants = constants or fit_codebooks(args, data, self.splits.fitting, sprites)
        self.constants = world.agreed({name: tensor.to(world.device) for name, tensor in constants.items()})
        tokeniser = PatchTokeniser(self.constants["codebook"])
        self.speech_tokeniser, speech, codes = None, None, (args.codes,)
        if data.speech is not None:
            self.speech_tokeniser = SpeechTokeniser(self.constants["speech_codebook"])
            speech, codes = SpokenScenes(data.speech, self.speech_tokeniser), (args.codes, args.speech_codes)
        self.modalities = MODALITIES[: 1 + len(codes)]
        vocabulary = Vocabulary(data.pack.names, self.splits.known, codes)
        patches = tokeniser.encode(render(self.splits.fitting.batch(0, 1), sprites)).shape[1]
        self.streams = TokenStreams(vocabulary, tokeniser, sprites, patches, speech)
        self.sizes = [b - a for a, b in itertools.pairwise(vocabulary.boundaries)]
        self.prepare()

    def build(self, mixer: str | None = None) -> Losses:
        regions = ((BOI, EOI, self.streams.patches), (BOSP, EOSP, None))
        ranges = [models.TokenRange("text", self.sizes[0])]
        for name, size, region in zip(self.modalities[1:], self.sizes[1:], regions, strict=False):
            ranges.append(models.TokenRange(name, size, *region))
        config = models.DecoderConfig(
            self.args.d_model,
            self.args.layers,
            num_modalities=len(ranges),
            decouple=decoupled(mixer or self.args.mixer),
            mixers_per_layer=1,
        )
        return Losses(models.Chameleon(config, models.Vocabulary(tuple(ranges)), tied=True))

    def blocks(self, model: Losses) -> list[nn.Module]:
        return list(model.model.decoder.layers)

    def training_batch(self, step: int) -> Batch:
        size = self.args.batch
        return self.streams.batch(self.splits.training, step, size, self.world.share(size))

    def objective(self, sums: Tensor, counts: Tensor) -> Tensor:
        return (sums[0] + Z_LOSS_WEIGHT * sums[1]).sum() / counts.sum()

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of each modality; of pictures of drawings never seen; of recordings never heard."""
        splits = self.splits
        result = dict(zip(self.modalities, self.means(self._evaluation_batches(splits.held_out)), strict=True))
        if splits.new_drawings is not None:
            result["new_drawings_image"] = self.means(self._evaluation_batches(splits.new_drawings))[1]
        if self.speech_tokeniser is not None:
            batches = self._evaluation_batches(splits.new_recordings, new_recordings=True)
            result["new_recordings_speech"] = self.means(batches)[2]
        return result

    def find_baselines(self) -> dict[str, float]:
        """Entropy of the held-out tokens of each modality themselves: no model that ignores context does better."""
        counts = torch.zeros(sum(self.sizes))
        for batch in self._evaluation_batches(self.splits.held_out, whole=True):
            labels = batch.inputs[0][:, 1:]
            counts += torch.bincount(labels[labels >= 0].cpu(), minlength=len(counts))
        entropies = [torch.distributions.Categorical(part).entropy().item() for part in counts.split(self.sizes)]
        return dict(zip(self.modalities, entropies, strict=True))

    def draw(self, model: Losses, folder: Path) -> dict[str, Any]:
        scenes = self.splits.held_out.batch(self.args.eval_samples, max(self.args.draw, self.args.eval_samples))
        return draw_samples(model.model, self.streams, self.speech_tokeniser, scenes, self.args, folder)

    def _evaluation_batches(self, source: SceneSource, *, whole: bool = False, **options: Any) -> Iterator[Batch]:
        samples, most = self.args.eval_samples, EVALUATION_BATCH * self.world.size
        for first in range(0, samples, most):
            size = min(most, samples - first)
            share = slice(size) if whole else self.world.share(size)
            yield self.streams.batch(source, first, size, share, **options)


def fit_codebooks(
    args: argparse.Namespace, data: DiscreteData, source: SceneSource, sprites: Tensor
) -> dict[str, Tensor]:
    """The image tokeniser's, fitted to scenes of ``source``, and the speech tokeniser's, fitted to the recordings."""
    pictures = render(source.batch(0, FITTING_SCENES), sprites)
    codebooks = {"codebook": PatchTokeniser.fit(pictures, args.codes, HELD_OUT_SEED).codebook}
    if data.speech is not None:
        speech = SpeechTokeniser.fit(data.speech.frames, args.speech_codes, HELD_OUT_SEED)
        codebooks["speech_codebook"] = speech.codebook
    return codebooks
