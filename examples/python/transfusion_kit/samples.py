# SPDX-License-Identifier: Apache-2.0
"""Samples of a trained model: pictures for captions, denoised from noise, and captions for pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_scenes import CREDIT, Scenes, render
from scene_streams.judging import judged, share_right
from scene_streams.layout import compact
from scene_streams.vocabulary import BOI, BOS, EOI, EOS, NULL
from torch import Tensor
from training_kit.plots import PictureRow, pixels, plot_pictures

from mixture_of_mamba import models
from transfusion_kit.data import LatentStreams

__all__ = ["draw_samples"]

MAX_DRAWINGS = 64  # each costs as many passes as there are denoising steps, twice with guidance


def draw_samples(
    model: models.Transfusion, streams: LatentStreams, scenes: Scenes, args: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """Write ``samples.png`` of the first ``args.draw`` scenes; describe all, draw some, and count what is right.

    Returns:
        The share of descriptions without a wrong word: of held-out scenes, and of what the model drew itself for their
        captions.
    """
    shown = slice(args.draw)
    drawn_scenes = scenes[: max(args.draw, MAX_DRAWINGS)]
    latents, drawn = streams.picture_latents(scenes), _draw(model, streams, drawn_scenes, args)
    read = judged(_captions(model, streams, latents), scenes)
    reread = judged(_captions(model, streams, drawn), drawn_scenes)
    rows = [
        PictureRow("held-out\nscene", pixels(render(scenes[shown], streams.sprites))),
        PictureRow(
            "its latents,\nand what the\nmodel says\nof them", pixels(streams.pictures(latents[shown])), read[shown]
        ),
        PictureRow("what the\nmodel draws\nfor the caption", pixels(streams.pictures(drawn[shown]))),
    ]
    plot_pictures(folder / "samples.png", [scene.caption for scene in scenes[shown]], rows, CREDIT)
    shares = {"held-out pictures": share_right(read), "its own drawings": share_right(reread)}
    print("described without a wrong word: " + ", ".join(f"{share:.0%} of {name}" for name, share in shares.items()))
    print(f"drawings: {folder / 'samples.png'}")
    return {"described_without_a_wrong_word": shares}


def _draw(model: models.Transfusion, streams: LatentStreams, scenes: Scenes, args: argparse.Namespace) -> Tensor:
    """Latents ``[scenes, side, side, latents]`` for the captions of scenes."""
    device = streams.sprites.device
    captions = streams.vocabulary.captions(scenes)
    begin, end = np.full((len(scenes), 1), BOS), np.full((len(scenes), 1), BOI)
    prompt = torch.from_numpy(compact(np.concatenate((begin, captions, end), axis=1))).to(device)
    return model.generate(
        prompt,
        0,
        (streams.side, streams.side),
        steps=args.denoising_steps,
        guidance=args.guidance,
        generator=torch.Generator(device).manual_seed(args.seed),
    ).latents


def _captions(model: models.Transfusion, streams: LatentStreams, latents: Tensor) -> list[str]:
    """The likeliest words, one by one, for pictures."""
    count, patches = len(latents), streams.side**2
    prompt = torch.tensor([BOS, BOI, *[NULL] * patches, EOI], device=latents.device).expand(count, -1)
    positions = torch.tensor([(row, 2) for row in range(count)])
    written = model.generate(
        prompt,
        streams.vocabulary.longest_caption + 1,
        (streams.side, streams.side),
        latents=latents,
        positions=positions,
        sampling=models.Sampling(0),
        stop=EOS,
        pictures=False,
    ).tokens
    return [streams.vocabulary.decode_text(row) for row in written.tolist()]
