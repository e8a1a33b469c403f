# SPDX-License-Identifier: Apache-2.0
"""Sound as frames of a mel spectrogram, frames as codes, and back to sound that can be listened to."""

from __future__ import annotations

import math
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from training_kit.codebook import fit_codebook, nearest_code

__all__ = [
    "FRAMES_PER_CODE",
    "HOP",
    "MELS",
    "SAMPLE_RATE",
    "SpeechTokeniser",
    "mel_frames",
    "quantise",
    "sound_of_frames",
    "write_wav",
]

SAMPLE_RATE = 22050
WINDOW = 1024  # samples, 46 ms
HOP = 256  # samples, 12 ms
MELS = 64
TOP_FREQUENCY = 8000.0
FRAMES_PER_CODE = 4  # 21.5 codes a second

# ln of a band's magnitude, where a sine of full scale has about 1: 86 dB in 64 steps, to keep packs small.
QUIETEST, LOUDEST = math.log(1e-4), math.log(2.0)
LEVELS = 63

MAX_STACKS = 20_000
GRIFFIN_LIM_ITERATIONS = 40


def mel_frames(samples: np.ndarray) -> Tensor:
    """float ``[n * HOP]`` -> float32 ``[n, MELS]``, the logarithms of magnitudes in bands."""
    magnitudes = _transform(torch.from_numpy(samples)).abs()[:, :-1] / (WINDOW / 4)
    return (_filters() @ magnitudes).clamp_min(math.exp(QUIETEST)).log().T


def quantise(frames: Tensor) -> np.ndarray:
    """Logarithms -> uint8."""
    levels = (frames - QUIETEST) / (LOUDEST - QUIETEST) * LEVELS
    return levels.round().clamp(0, LEVELS).to(torch.uint8).numpy()


def sound_of_frames(levels: Tensor) -> np.ndarray:
    """Levels 0 .. LEVELS ``[n, MELS]`` -> int16 ``[n * HOP]``.

    The phase is found by Griffin and Lim's method (IEEE TASSP 32, 1984): transform there and back, keeping magnitudes.
    """
    bands = torch.exp(levels.float() / LEVELS * (LOUDEST - QUIETEST) + QUIETEST).T
    magnitudes = (torch.linalg.pinv(_filters()) @ bands).clamp_min(0) * (WINDOW / 4)
    magnitudes = torch.cat((magnitudes, magnitudes[:, -1:]), 1)
    length = HOP * len(levels)
    spectrum = torch.polar(magnitudes, 2 * math.pi * torch.rand(magnitudes.shape, generator=_seeded()))
    for _ in range(GRIFFIN_LIM_ITERATIONS):
        phases = _transform(_inverse(spectrum, length)).angle()
        spectrum = torch.polar(magnitudes, phases)
    samples = _inverse(spectrum, length).clamp(-1, 1)
    return (samples * 32767).round().to(torch.int16).numpy()


def write_wav(path: Path, samples: np.ndarray) -> None:
    """int16 samples, one channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.astype("<i2").tobytes())


class SpeechTokeniser:
    """Stacks of FRAMES_PER_CODE frames <-> codes: the nearest of ``codebook [codes, FRAMES_PER_CODE * MELS]``."""

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook

    @staticmethod
    def fit(frames: np.ndarray, codes: int, seed: int) -> SpeechTokeniser:
        """Fit to uint8 ``frames [n, MELS]``, n a multiple of FRAMES_PER_CODE."""
        stacks, counts = _stacks(frames).unique(dim=0, return_counts=True)
        random = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(stacks), generator=random)[:MAX_STACKS]
        return SpeechTokeniser(fit_codebook(stacks[chosen], counts[chosen], codes, random))

    @property
    def codes(self) -> int:
        return len(self.codebook)

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 ``[n, MELS]`` -> int64 ``[n / FRAMES_PER_CODE]``."""
        codebook = self.codebook.cpu()
        return torch.cat([nearest_code(part, codebook) for part in _stacks(frames).split(8192)])

    def decode(self, codes: Tensor) -> np.ndarray:
        """int64 ``[n]`` -> int16 samples."""
        return sound_of_frames(self._frames(codes))

    def spectrogram(self, codes: Tensor) -> np.ndarray:
        """int64 ``[n]`` -> loudness 0 .. 1 ``[MELS, frames]``."""
        return (self._frames(codes).T / LEVELS).clamp(0, 1).numpy()

    def _frames(self, codes: Tensor) -> Tensor:
        return self.codebook.cpu()[codes.cpu()].reshape(-1, MELS)


def _stacks(frames: np.ndarray) -> Tensor:
    return torch.from_numpy(frames).reshape(-1, FRAMES_PER_CODE * MELS).float()


def _transform(samples: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW)
    return torch.stft(samples, WINDOW, HOP, window=window, pad_mode="constant", return_complex=True)


def _inverse(spectrum: Tensor, length: int) -> Tensor:
    return torch.istft(spectrum, WINDOW, HOP, window=torch.hann_window(WINDOW), length=length)


def _filters() -> Tensor:
    """Triangles ``[MELS, WINDOW / 2 + 1]``, evenly spaced on the mel scale (HTK's), each of sum 1."""
    top = 2595 * math.log10(1 + TOP_FREQUENCY / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, MELS + 2) / 2595) - 1)
    bins = torch.linspace(0, SAMPLE_RATE / 2, WINDOW // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    # The lowest triangles are narrower than a bin of the transform; each keeps at least the bin nearest to its top.
    triangles = torch.minimum(rising, falling).clamp_min(0)
    nearest = (bins - edges[1:-1, None]).abs().argmin(1)
    triangles[torch.arange(MELS), nearest] = triangles[torch.arange(MELS), nearest].clamp_min(0.1)
    return triangles / triangles.sum(1, keepdim=True)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
