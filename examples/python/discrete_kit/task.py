# SPDX-License-Identifier: Apache-2.0
"""What is trained: scenes as one stream of tokens of all modalities, and the held-out loss of each."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import torch
from emoji_scenes import HELD_OUT_SEED, render
from scene_streams.patches import PatchTokeniser
from scene_streams.task import FITTING_SCENES, SceneTask
from scene_streams.vocabulary import BOI, BOSP, EOI, EOSP, Vocabulary
from spoken_names import SpeechTokeniser, SpokenScenes
from torch import Tensor, nn
from training_kit.task import Batch

from discrete_kit.data import DiscreteData, TokenStreams
from discrete_kit.samples import draw_samples
from mixture_of_mamba import Routing, models

__all__ = ["DiscreteTask"]

MODALITIES = ("text", "image", "speech")
Z_LOSS_WEIGHT = 1e-5  # Lumina-mGPT's, which trains Chameleon


class Losses(nn.Module):
    """The model's losses as its forward, for what wraps modules: cross-entropy, z, labels; sums by modality."""

    def __init__(self, model: models.Chameleon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, routing: Routing) -> Tensor:
        losses = self.model.loss(tokens, routing)
        return torch.stack((losses.cross_entropy, losses.z, losses.count))


class DiscreteTask(SceneTask):
    """Chameleon, with speech or without; its constants are the codebooks of the tokenisers."""

    streams: TokenStreams
    units: ClassVar = dict.fromkeys(MODALITIES, "nats a token")
    baseline_name = "unigram entropy"

    def fit(self, data: DiscreteData, sprites: Tensor) -> dict[str, Tensor]:
        """The image tokeniser's to scenes, the speech tokeniser's to the recordings."""
        pictures = render(self.splits.fitting.batch(0, FITTING_SCENES), sprites)
        codebooks = {"codebook": PatchTokeniser.fit(pictures, self.args.codes, HELD_OUT_SEED).codebook}
        if data.speech is not None:
            speech = SpeechTokeniser.fit(data.speech.frames, self.args.speech_codes, HELD_OUT_SEED)
            codebooks["speech_codebook"] = speech.codebook
        return codebooks

    def set_up(self, data: DiscreteData, sprites: Tensor) -> None:
        tokeniser = PatchTokeniser(self.constants["codebook"])
        self.speech_tokeniser, speech, codes = None, None, (self.args.codes,)
        if data.speech is not None:
            self.speech_tokeniser = SpeechTokeniser(self.constants["speech_codebook"])
            speech, codes = SpokenScenes(data.speech, self.speech_tokeniser), (*codes, self.args.speech_codes)
        self.modalities = MODALITIES[: 1 + len(codes)]
        vocabulary = Vocabulary(data.pack.names, self.splits.known, codes)
        patches = tokeniser.encode(render(self.splits.fitting.batch(0, 1), sprites)).shape[1]
        self.streams = TokenStreams(vocabulary, tokeniser, sprites, patches, speech)
        self.sizes = [b - a for a, b in itertools.pairwise(vocabulary.boundaries)]

    def build(self, mixer: str | None = None) -> Losses:
        regions = ((BOI, EOI, self.streams.patches), (BOSP, EOSP, None))
        ranges = [models.TokenRange("text", self.sizes[0])]
        for name, size, region in zip(self.modalities[1:], self.sizes[1:], regions, strict=False):
            ranges.append(models.TokenRange(name, size, *region))
        config = self.decoder(len(ranges), mixer)
        return Losses(models.Chameleon(config, models.Vocabulary(tuple(ranges)), tied=True))

    def training_batch(self, step: int) -> Batch:
        size = self.args.batch
        return self.streams.batch(self.splits.training, step, size, self.world.share(size))

    def objective(self, sums: Tensor, counts: Tensor) -> Tensor:
        return (sums[0] + Z_LOSS_WEIGHT * sums[1]).sum() / counts.sum()

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of each modality; of pictures of drawings never seen; of recordings never heard."""
        splits = self.splits
        result = dict(zip(self.modalities, self.means(self.evaluation_batches(splits.held_out)), strict=True))
        if splits.new_drawings is not None:
            result["new_drawings_image"] = self.means(self.evaluation_batches(splits.new_drawings))[1]
        if self.speech_tokeniser is not None:
            batches = self.evaluation_batches(splits.new_recordings, new_recordings=True)
            result["new_recordings_speech"] = self.means(batches)[2]
        return result

    def find_baselines(self) -> dict[str, float]:
        """Entropy of the held-out tokens of each modality themselves: no model that ignores context does better."""
        counts = torch.zeros(sum(self.sizes))
        for batch in self.evaluation_batches(self.splits.held_out, whole=True):
            labels = batch.inputs[0][:, 1:]
            counts += torch.bincount(labels[labels >= 0].cpu(), minlength=len(counts))
        entropies = [torch.distributions.Categorical(part).entropy().item() for part in counts.split(self.sizes)]
        return dict(zip(self.modalities, entropies, strict=True))

    def draw(self, model: Losses, folder: Path) -> dict[str, Any]:
        scenes = self.drawn_scenes()
        return draw_samples(model.model, self.streams, self.speech_tokeniser, scenes, self.args, folder)
