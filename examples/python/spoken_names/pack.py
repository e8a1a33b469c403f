# SPDX-License-Identifier: Apache-2.0
"""The speech pack: every phrase in every voice, as frames of a mel spectrogram, built once with eSpeak NG.

The speech engine comes from pip (espeakng-loader) and runs in this process; a phrase takes it 1 to 2 ms.
"""

from __future__ import annotations

import ctypes
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from training_kit.packs import MissingPackagesError, read_pack, write_pack

from spoken_names.frames import FRAMES_PER_CODE, HOP, SAMPLE_RATE, mel_frames, quantise

__all__ = ["SPEECH_CREDIT", "VOICES", "SpeechPack", "load_or_build_speech"]

PACK_FORMAT = 1
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")
TIMBRES = ("m3", "f2", "m7", "f5")
VOICES = tuple(f"{accent}+{timbre}" for accent in ACCENTS for timbre in TIMBRES)

SILENCE = 300  # of 32767: what a phrase begins and ends with, and is cut off
LEVEL = 0.7  # of full scale, the loudest sample of a phrase

SPEECH_CREDIT = "speech: synthesised with eSpeak NG"
ATTRIBUTION = """\
spoken_names_*.npz hold mel spectrograms of phrases synthesised with eSpeak NG {version}
(https://github.com/espeak-ng/espeak-ng), voices {voices}.
The program is licensed under GPL-3.0-or-later; it is not part of the packs.
"""


@dataclass(frozen=True)
class SpeechPack:
    """Clip ``phrase * len(VOICES) + voice`` is rows ``ends[clip - 1] .. ends[clip]`` of the frames.

    Attributes:
        phrases: what is said.
        frames: uint8 ``[frames, MELS]``; every clip has a multiple of FRAMES_PER_CODE of them.
        ends: int64 ``[clips]``.
    """

    phrases: list[str]
    frames: np.ndarray
    ends: np.ndarray

    def checksum(self) -> int:
        return zlib.crc32(self.frames.tobytes(), zlib.crc32("\n".join(self.phrases).encode()))


def load_or_build_speech(folder: Path, phrases: list[str]) -> SpeechPack:
    """The pack of these phrases in ``folder``, built there first if need be (5 ms a phrase and voice).

    Raises:
        MissingPackagesError: there is no pack and the package to build it with is not installed.
    """
    path = folder / f"spoken_names_{len(phrases)}.npz"
    arrays = read_pack(path, PACK_FORMAT)
    if arrays is None or arrays["phrases"].tolist() != phrases:
        try:
            import espeakng_loader
        except ImportError as error:
            raise MissingPackagesError("the voices", error.name) from error
        frames, ends, version = _build(espeakng_loader, phrases)
        arrays = {"phrases": np.array(phrases), "frames": frames, "ends": ends}
        attribution = ATTRIBUTION.format(version=version, voices=", ".join(VOICES))
        write_pack(path, PACK_FORMAT, arrays, ("ATTRIBUTION_speech.txt", attribution))
    return SpeechPack(arrays["phrases"].tolist(), arrays["frames"], arrays["ends"])


def _build(loader: object, phrases: list[str]) -> tuple[np.ndarray, np.ndarray, str]:
    engine = _Engine(loader)
    clips = [None] * (len(phrases) * len(VOICES))
    for voice, name in enumerate(VOICES):
        engine.choose(name)
        for phrase, text in enumerate(phrases):
            clips[phrase * len(VOICES) + voice] = quantise(mel_frames(_trimmed(engine.say(text))))
    return np.concatenate(clips), np.cumsum([len(clip) for clip in clips]), engine.version


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """int16 -> float32 without silence at its ends, as loud as every other phrase, whole codes long."""
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > SILENCE)
    samples = samples[loud[0] : loud[-1] + 1].astype(np.float32)
    samples *= LEVEL / np.abs(samples).max()
    return np.pad(samples, (0, -len(samples) % (FRAMES_PER_CODE * HOP)))


class _Engine:
    """eSpeak NG through its C interface (speak_lib.h)."""

    _SYNCHRONOUS = (
        2  # AUDIO_OUTPUT_SYNCHRONOUS: a call returns when the callback has all of its samples; no sound device
    )
    _CHARACTERS, _UTF8 = 1, 1

    def __init__(self, loader: object) -> None:
        self._library = ctypes.CDLL(loader.get_library_path())
        self._library.espeak_Info.restype = ctypes.c_char_p
        rate = self._library.espeak_Initialize(self._SYNCHRONOUS, 0, loader.get_data_path().encode(), 0)
        if rate != SAMPLE_RATE:
            raise OSError(f"eSpeak NG must give {SAMPLE_RATE} samples a second, got {rate}")
        self._chunks: list[np.ndarray] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._collect)  # the engine keeps no reference of its own
        self._library.espeak_SetSynthCallback(self._callback)
        self.version = self._library.espeak_Info(None).decode()

    def _collect(self, samples: object, count: int, events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def choose(self, voice: str) -> None:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise OSError(f"eSpeak NG has no voice {voice}")

    def say(self, text: str) -> np.ndarray:
        self._chunks.clear()
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(data, len(data), 0, self._CHARACTERS, 0, self._UTF8, None, None)
        if status != 0 or not self._chunks:
            raise OSError(f"eSpeak NG cannot say {text!r} (status {status})")
        return np.concatenate(self._chunks)
