# SPDX-License-Identifier: Apache-2.0
"""Names of the drawings, and what stands between them, spoken in many voices; frames of sound as codes and back."""

from spoken_names.frames import FRAMES_PER_CODE, MELS, SAMPLE_RATE, SpeechTokeniser, write_wav
from spoken_names.pack import SPEECH_CREDIT, VOICES, SpeechPack, load_or_build_speech
from spoken_names.scenes import SpokenScenes, phrases_of

__all__ = [
    "FRAMES_PER_CODE",
    "MELS",
    "SAMPLE_RATE",
    "SPEECH_CREDIT",
    "VOICES",
    "SpeechPack",
    "SpeechTokeniser",
    "SpokenScenes",
    "load_or_build_speech",
    "phrases_of",
    "write_wav",
]
