# SPDX-License-Identifier: Apache-2.0
"""What is trained: scenes as one stream of text and image tokens, and the held-out loss of each modality."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from emoji_scenes import CREDIT, Scene, SceneSource, SpritePack, longest_caption, render, sprite_tensor, template_words
from torch import Tensor
from training_kit.plots import PictureRow, plot_pictures
from training_kit.trainer import StepResult

from chameleon_kit.decoder import Decoder, ModalityLosses, modality_losses
from chameleon_kit.drawing import caption_pictures, draw_captions
from chameleon_kit.patches import PatchTokeniser
from chameleon_kit.stream import IMAGE, Batch, Vocabulary, encode_batch

__all__ = ["MODALITIES", "ChameleonTask"]

MODALITIES = ("text", "image")
TRAINING, VALIDATION, NEW_DRAWINGS, FITTING = range(4)  # streams of scenes
HELD_OUT_SEED = 20250127
HOLD_OUT_EVERY = 20  # every 20th concept is never trained on
FITTING_SCENES = 2048
EVALUATION_BATCH = 32
READING_SAMPLES = 256
Z_LOSS_WEIGHT = 1e-5  # Lumina-mGPT's, which trains Chameleon


class ChameleonTask:
    """Model and data of a run.

    Args:
        args: of :func:`chameleon_kit.arguments.parse_arguments`.
        pack: the drawings.
        device: where the model trains.
        constants: of a checkpoint to go on from, or empty; then the image tokeniser is fitted here.
    """

    def __init__(
        self, args: argparse.Namespace, pack: SpritePack, device: torch.device, constants: dict[str, Tensor]
    ) -> None:
        self.args = args
        self.device = device
        self.sprites = sprite_tensor(pack, device)
        concepts = range(len(pack.names))
        known = [c for c in concepts if c % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1]
        new = list(concepts[HOLD_OUT_EVERY - 1 :: HOLD_OUT_EVERY])
        self.training = SceneSource(pack, known, args.seed, TRAINING)
        self.held_out = SceneSource(pack, known, HELD_OUT_SEED, VALIDATION)
        self.new_drawings = SceneSource(pack, new, HELD_OUT_SEED, NEW_DRAWINGS) if new else None
        if constants:
            self.tokeniser = PatchTokeniser(constants["codebook"].to(device))
        else:
            scenes = SceneSource(pack, known, HELD_OUT_SEED, FITTING).batch(0, FITTING_SCENES)
            self.tokeniser = PatchTokeniser.fit(render(scenes, self.sprites), args.codes, HELD_OUT_SEED)
        self.constants = {"codebook": self.tokeniser.codebook}
        words = sorted(template_words() | {word for c in known for word in pack.names[c].split()})
        patches = self.tokeniser.encode(render(self.held_out.batch(0, 1), self.sprites)).shape[1]
        self.vocabulary = Vocabulary(words, args.codes, patches, longest_caption())
        self.model = Decoder(self.vocabulary, args.d_model, args.layers, args.mixer).to(device)
        # Graphs for fixed shapes only: which graph a step runs must not depend on what ran before it.
        self.forward = torch.compile(self.model, dynamic=False) if args.compile else self.model

    def parameters(self) -> tuple[int, int]:
        """(parameters that a token passes through, all parameters); FLOPs follow the first."""
        with torch.device("meta"):
            dense = Decoder(self.vocabulary, self.args.d_model, self.args.layers, "mamba")
        active, total = (sum(p.numel() for p in model.parameters()) for model in (dense, self.model))
        return active, total

    def training_step(self, step: int) -> StepResult:
        scenes = self.training.batch(step, self.args.batch)
        batch = encode_batch(scenes, self.vocabulary, self.tokeniser, self.sprites, first_order=step)
        losses = self._losses(batch)
        loss = (losses.cross_entropy + Z_LOSS_WEIGHT * losses.z).sum() / losses.count.sum()
        means = (losses.cross_entropy / losses.count).detach()
        return StepResult(loss, dict(zip(MODALITIES, means, strict=True)), batch.num_tokens)

    def evaluate(self) -> dict[str, float]:
        """Held-out loss of each modality; also of pictures of drawings never seen, whose names have no token."""
        result = dict(zip(MODALITIES, self._held_out_means(self.held_out), strict=True))
        if self.new_drawings is not None:
            result["new_drawings_image"] = self._held_out_means(self.new_drawings)[IMAGE]
        return result

    def unigram_entropies(self) -> dict[str, float]:
        """Of the held-out labels themselves: no model that ignores context does better."""
        counts = torch.zeros(self.vocabulary.size)
        for batch in self._evaluation_batches(self.held_out):
            labels = batch.labels[batch.labels >= 0].cpu()
            counts += torch.bincount(labels, minlength=self.vocabulary.size)
        parts = counts.split([self.vocabulary.first_code, self.vocabulary.codes])
        entropies = [torch.distributions.Categorical(part).entropy().item() for part in parts]
        return dict(zip(MODALITIES, entropies, strict=True))

    def draw(self, path: Path) -> dict[str, float]:
        """Draw held-out scenes, what the model says of them, and what it draws for their captions.

        Returns:
            The share of pictures that the model describes without a wrong word: of held-out scenes, and of what it
            drew itself for their captions.
        """
        self.model.eval()
        args, vocabulary = self.args, self.vocabulary
        scenes = self.held_out.batch(args.eval_samples, max(args.draw, min(args.eval_samples, READING_SAMPLES)))
        originals = render(scenes, self.sprites)
        codes = self.tokeniser.encode(originals)
        drawn = draw_captions(self.model, vocabulary, scenes, self.device, args.temperature, args.seed)
        read, reread = self._read(codes, scenes), self._read(drawn, scenes)
        shown = slice(args.draw)
        pixels = (
            pictures[shown].permute(0, 2, 3, 1).cpu().numpy()
            for pictures in (originals, self.tokeniser.decode(codes[shown]), self.tokeniser.decode(drawn[shown]))
        )
        headings = (
            "held-out\nscene",
            "its tokens,\nand what the\nmodel says\nof them",
            "what the\nmodel draws\nfor the caption",
        )
        remarks = (None, read[shown], None)
        rows = [PictureRow(*row) for row in zip(headings, pixels, remarks, strict=True)]
        plot_pictures(path, [scene.caption for scene in scenes[shown]], rows, CREDIT)
        return {
            "held-out pictures": sum(right for _, right in read) / len(read),
            "its own drawings": sum(right for _, right in reread) / len(reread),
        }

    def _read(self, codes: Tensor, scenes: list[Scene]) -> list[tuple[str, bool]]:
        """(what the model says of a picture, whether that is true of its scene) for each."""
        captions = caption_pictures(self.model, self.vocabulary, codes)
        return [(caption, caption in scene.captions) for caption, scene in zip(captions, scenes, strict=True)]

    def _losses(self, batch: Batch) -> ModalityLosses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            logits = self.forward(batch.tokens, batch.slots, batch.routing)
        return modality_losses(logits, batch, self.vocabulary)

    def _held_out_means(self, source: SceneSource) -> list[float]:
        losses = [self._losses(batch) for batch in self._evaluation_batches(source)]
        sums = sum(one.cross_entropy.double() for one in losses)
        return (sums / sum(one.count.double() for one in losses)).tolist()

    def _evaluation_batches(self, source: SceneSource) -> Iterator[Batch]:
        samples = self.args.eval_samples
        for first in range(0, samples, EVALUATION_BATCH):
            scenes = source.batch(first, min(EVALUATION_BATCH, samples - first))
            yield encode_batch(scenes, self.vocabulary, self.tokeniser, self.sprites)
