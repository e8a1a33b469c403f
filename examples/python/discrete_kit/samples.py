# SPDX-License-Identifier: Apache-2.0
"""Samples of a trained model: pictures and speech for captions, captions for pictures and speech."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_scenes import CREDIT, Scenes, render
from scene_streams.judging import judged, share_right
from scene_streams.layout import HOLE, compact
from scene_streams.vocabulary import BOI, BOS, BOSP, EOI, EOS, EOSP
from spoken_names import FRAMES_PER_CODE, MELS, SPEECH_CREDIT, SpeechTokeniser, write_wav
from torch import Tensor
from training_kit.plots import PictureRow, pixels, plot_pictures

from discrete_kit.data import TokenStreams
from mixture_of_mamba import models

__all__ = ["draw_samples"]

VOICE_SEED = 1


def draw_samples(
    model: models.Chameleon,
    streams: TokenStreams,
    speech_tokeniser: SpeechTokeniser | None,
    scenes: Scenes,
    args: argparse.Namespace,
    folder: Path,
) -> dict[str, Any]:
    """Write ``samples.png`` of the first ``args.draw`` scenes, and ``speech/``; describe all, and count what is right.

    Returns:
        The share of descriptions without a wrong word: of held-out scenes, and of what the model made itself for their
        captions. Of speech, which does not name the background, the words before it are compared.
    """
    writer = _Writer(model, streams, args)
    shown = slice(args.draw)
    codes, drawn = streams.image_codes(scenes), writer.pictures(scenes)
    read, reread = (judged(writer.captions_of_pictures(each), scenes) for each in (codes, drawn))
    decode = streams.tokeniser.decode
    rows = [
        PictureRow("held-out\nscene", pixels(render(scenes[shown], streams.sprites))),
        PictureRow("its tokens,\nand what the\nmodel says\nof them", pixels(decode(codes[shown])), read[shown]),
        PictureRow("what the\nmodel draws\nfor the caption", pixels(decode(drawn[shown]))),
    ]
    shares = {"held-out pictures": share_right(read), "its own drawings": share_right(reread)}
    credit = CREDIT
    if speech_tokeniser is not None and streams.speech is not None:
        recorded, spoken = streams.speech.say(scenes, np.random.default_rng(VOICE_SEED)), writer.speech(scenes)
        heard, reheard = (
            judged(writer.captions_of_speech(each), scenes, background=False) for each in (recorded, spoken)
        )
        shares |= {"held-out speech": share_right(heard), "its own speech": share_right(reheard)}
        width = max(int((each[shown] != HOLE).sum(1).max()) for each in (recorded, spoken)) * FRAMES_PER_CODE
        for name, sounds, heading, remarks in (
            ("recorded", recorded[shown], "a recording's\ntokens, and\nwhat the model\nhears in them", heard[shown]),
            ("spoken", spoken[shown], "what the\nmodel says\nfor the caption", reheard[shown]),
        ):
            sounds = [row[row != HOLE] for row in sounds]
            rows.append(PictureRow(heading, _spectrograms(speech_tokeniser, sounds, width), remarks))
            for index, sound in enumerate(sounds):
                _write_sound(folder / "speech" / f"{index + 1}_{name}.wav", speech_tokeniser, sound)
        credit = f"{CREDIT}; {SPEECH_CREDIT}"
    plot_pictures(folder / "samples.png", [scene.caption for scene in scenes[shown]], rows, credit)
    print("described without a wrong word: " + ", ".join(f"{share:.0%} of {name}" for name, share in shares.items()))
    print(
        f"drawings: {folder / 'samples.png'}" + ("" if speech_tokeniser is None else f"\nspeech: {folder / 'speech'}")
    )
    return {"described_without_a_wrong_word": shares}


class _Writer:
    """Prompts, and what the model continues them with."""

    def __init__(self, model: models.Chameleon, streams: TokenStreams, args: argparse.Namespace) -> None:
        self.model, self.streams = model, streams
        self.device = streams.sprites.device
        self.boundaries = streams.vocabulary.boundaries
        self.random = torch.Generator(self.device).manual_seed(args.seed)
        self.sampling = models.Sampling(args.temperature, generator=self.random)

    def pictures(self, scenes: Scenes) -> Tensor:
        """Codes ``[scenes, patches]``, counted from 0."""
        prompt = self._after_caption(scenes, BOI)
        return self.model.generate(prompt, self.streams.patches, sampling=self.sampling) - self.boundaries[1]

    def speech(self, scenes: Scenes) -> np.ndarray:
        """Codes ``[scenes, longest]``, counted from 0, holes at the end."""
        assert self.streams.speech is not None
        prompt = self._after_caption(scenes, BOSP)
        tokens = self.model.generate(prompt, self.streams.speech.longest, sampling=self.sampling, stop=EOSP)
        return np.maximum(tokens.cpu().numpy() - self.boundaries[2], HOLE)

    def captions_of_pictures(self, codes: Tensor) -> list[str]:
        return self._captions(_between(BOI, codes + self.boundaries[1], EOI))

    def captions_of_speech(self, codes: np.ndarray) -> list[str]:
        tokens = np.where(codes == HOLE, HOLE, codes + self.boundaries[2])
        return self._captions(_between(BOSP, torch.from_numpy(tokens).to(self.device), EOSP))

    def _after_caption(self, scenes: Scenes, begin: int) -> Tensor:
        captions = self.streams.vocabulary.captions(scenes)
        ends = np.full((len(scenes), 1), begin)
        prompt = compact(np.concatenate((np.full_like(ends, BOS), captions, ends), axis=1))
        return torch.from_numpy(prompt).to(self.device)

    def _captions(self, prompt: Tensor) -> list[str]:
        """The likeliest words, one by one."""
        greedy = models.Sampling(0)
        length = self.streams.vocabulary.longest_caption + 1
        tokens = self.model.generate(prompt, length, sampling=greedy, stop=EOS, regions=False)
        return [self.streams.vocabulary.decode_text(row) for row in tokens.tolist()]


def _between(begin: int, body: Tensor, end: int) -> Tensor:
    one = torch.ones_like(body[:, :1])
    return torch.cat((one * BOS, one * begin, body, one * end), 1)


def _spectrograms(tokeniser: SpeechTokeniser, sounds: list[np.ndarray], width: int) -> np.ndarray:
    """``[sounds, bands, width, 3]`` in 0 .. 1, low notes below, white after the end."""
    result = np.ones((len(sounds), MELS, width))
    for picture, sound in zip(result, sounds, strict=True):
        loudness = tokeniser.spectrogram(torch.from_numpy(sound))
        picture[:, : loudness.shape[1]] = 1 - loudness[::-1]
    return np.repeat(result[..., None], 3, axis=3)


def _write_sound(path: Path, tokeniser: SpeechTokeniser, codes: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    if len(codes):
        write_wav(path, tokeniser.decode(torch.from_numpy(codes)))
