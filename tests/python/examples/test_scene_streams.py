# SPDX-License-Identifier: Apache-2.0
"""Scenes as streams of tokens, and speech as codes and back."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

CONCEPTS = 24


@pytest.fixture(scope="module")
def parts(data: Path, voices: None) -> SimpleNamespace:
    """Drawings, their names spoken, and a stream of all three modalities."""
    names = ("emoji_scenes", "spoken_names", "scene_streams.patches", "scene_streams.vocabulary", "discrete_kit.data")
    scenes, speech, patches, vocabulary, discrete = map(importlib.import_module, names)
    pack = scenes.load_or_build_pack(data).first(CONCEPTS)
    sprites = scenes.sprite_tensor(pack, torch.device("cpu"))
    spoken = speech.load_or_build_speech(data, speech.phrases_of(pack.names))
    splits = scenes.Splits(pack, seed=0)
    image = patches.PatchTokeniser.fit(scenes.render(splits.fitting.batch(0, 256), sprites), 64, seed=0)
    sound = speech.SpeechTokeniser.fit(spoken.frames, 64, seed=0)
    says = speech.SpokenScenes(spoken, sound)
    words = vocabulary.Vocabulary(pack.names, splits.known, (64, 64))
    streams = discrete.TokenStreams(words, image, sprites, 64, says)
    return SimpleNamespace(
        pack=pack, spoken=spoken, splits=splits, sound=sound, says=says, words=words, streams=streams,
        special=vocabulary, frames=importlib.import_module("spoken_names.frames"),
        layout=importlib.import_module("scene_streams.layout"), voices=speech.VOICES,
    )  # fmt: skip


def test_segments_are_joined_in_every_order_without_holes(parts: SimpleNamespace) -> None:
    a, b = np.array([[1, 2], [1, -1], [-1, 2]]), np.array([[7], [8], [9]])
    rows = parts.layout.arrange([a, b], [(0, 1), (1, 0)], first_order=0)
    assert rows.tolist() == [[1, 2, 7], [8, 1, -1], [2, 9, -1]]


def test_captions_are_the_words_of_the_scenes(parts: SimpleNamespace) -> None:
    scenes = parts.splits.held_out.batch(0, 64)
    for row, scene in zip(parts.words.captions(scenes).tolist(), scenes, strict=True):
        assert parts.words.decode_text(row) == scene.caption
        assert parts.words.decode_text([*row, *row[:2]]) == scene.caption  # a caption ends with its background


def test_every_sample_has_all_modalities_in_the_order_that_is_due(parts: SimpleNamespace) -> None:
    step, size, special = 4, 12, parts.special
    batch = parts.streams.batch(parts.splits.training, step, size, slice(size))
    tokens, routing = batch.inputs
    scenes = parts.splits.training.batch(step, size)
    codes = parts.streams.image_codes(scenes)
    first, first_image, first_speech, end = parts.words.boundaries
    assert first == 0 and batch.num_tokens == int((tokens >= 0).sum())
    orders = list(itertools.permutations((special.EOS, special.BOI, special.BOSP)))  # EOS stands for the caption
    for index, row in enumerate(tokens.tolist()):
        row = [token for token in row if token >= 0]
        assert row[0] == special.BOS and row[-1] == special.EOS and max(row) < end
        picture = row[row.index(special.BOI) + 1 : row.index(special.EOI)]
        assert [token - first_image for token in picture] == codes[index].tolist()
        sound = row[row.index(special.BOSP) + 1 : row.index(special.EOSP)]
        assert sound and all(first_speech <= token < end for token in sound)
        caption = [token for token in row if special.EOSP < token < first_image]
        assert parts.words.decode_text(caption) == scenes[index].caption
        places = {special.EOS: row.index(caption[0]), special.BOI: row.index(special.BOI)}
        places[special.BOSP] = row.index(special.BOSP)
        assert tuple(sorted(places, key=places.get)) == orders[(index + step) % 6]
    modality = torch.bucketize(tokens, torch.tensor([0, first_image, first_speech]), right=True) - 1
    counts = [int((modality == m).sum()) for m in range(3)]
    assert routing.host_offsets.tolist() == [0, *itertools.accumulate(counts)]


def test_shares_of_processes_make_up_the_batch(parts: SimpleNamespace) -> None:
    whole, left, right = (
        parts.streams.batch(parts.splits.training, 3, 8, share) for share in (slice(8), slice(4), slice(4, 8))
    )
    assert torch.equal(whole.inputs[0], torch.cat((left.inputs[0], right.inputs[0])))
    assert whole.num_tokens == left.num_tokens == right.num_tokens


@pytest.mark.parametrize("new", [False, True], ids=["training", "new recordings"])
def test_training_hears_no_recording_that_is_held_out(parts: SimpleNamespace, new: bool) -> None:
    scenes = parts.splits.training.batch(0, 2000)
    single = scenes[scenes.concepts[:, 1] < 0]
    said = parts.says.say(single, np.random.default_rng(0), new=new)
    heard = set()
    for row, concept in zip(said, single.concepts[:, 0].tolist(), strict=True):
        clips = parts.says._clips[concept]
        voices = [v for v, clip in enumerate(clips) if np.array_equal(clip[clip >= 0], row[row >= 0])]
        due = [v for v in voices if ((concept + v) % 8 == 0) == new]
        assert due, (concept, voices)  # more than one voice where their codes happen to be the same
        heard.add((concept, due[0]))
    assert len(heard) > CONCEPTS  # in several voices


def test_pairs_are_spoken_by_one_voice_that_has_neither_name_held_out(parts: SimpleNamespace) -> None:
    scenes = parts.splits.training.batch(1, 500)
    pairs = scenes[scenes.concepts[:, 1] >= 0]
    said = parts.says.say(pairs, np.random.default_rng(1))
    assert ((said >= 0).sum(1) <= parts.says.longest).all()
    for row, (first, second), place in zip(said, pairs.concepts, pairs.places, strict=True):
        row = row[row >= 0]
        possible = [
            np.concatenate([clip[clip >= 0] for clip in parts.says._clips[[first, CONCEPTS + place, second], voice]])
            for voice in range(len(parts.voices))
            if (first + voice) % 8 and (second + voice) % 8
        ]
        assert any(np.array_equal(row, one) for one in possible)


def test_frames_become_sound_with_the_same_frames(parts: SimpleNamespace) -> None:
    clip = parts.spoken.frames[: parts.spoken.ends[0]]
    samples = parts.frames.sound_of_frames(torch.from_numpy(clip))
    assert samples.dtype == np.int16 and len(samples) == len(clip) * parts.frames.HOP
    again = parts.frames.quantise(parts.frames.mel_frames(samples.astype(np.float32) / 32767))
    assert np.abs(again.astype(float) - clip).mean() < 0.15 * clip.std()


def test_codes_keep_most_of_the_frames(parts: SimpleNamespace) -> None:
    frames = parts.spoken.frames.astype(float)
    codes = parts.sound.encode(parts.spoken.frames)
    kept = parts.sound.codebook[codes].reshape(frames.shape).numpy()
    assert np.square(kept - frames).mean() < 0.35 * frames.var(0).mean()
    assert torch.equal(parts.sound.encode(np.rint(kept).clip(0, 63).astype(np.uint8))[:50], codes[:50])
    assert parts.sound.spectrogram(codes[:5]).shape == (parts.frames.MELS, 20)


def test_a_phrase_that_is_not_in_the_pack_makes_a_new_one(parts: SimpleNamespace, tmp_path: Path) -> None:
    speech = importlib.import_module("spoken_names")
    first = speech.load_or_build_speech(tmp_path, ["fox"])
    assert speech.load_or_build_speech(tmp_path, ["fox"]).checksum() == first.checksum()
    second = speech.load_or_build_speech(tmp_path, ["ant"])
    assert second.phrases == ["ant"] and second.checksum() != first.checksum()
    assert len(second.ends) == len(parts.voices)
