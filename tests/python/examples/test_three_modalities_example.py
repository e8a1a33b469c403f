# SPDX-License-Identifier: Apache-2.0
"""Text, images and speech in one stream: a tiny run with all that it leaves, and kill -9 in the middle of one."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import wave
from pathlib import Path

import pytest
from example_support import EXAMPLES, RunScript

STEPS = 90
TINY = shlex.split(
    f"--steps {STEPS} --size tiny --mixer in_proj,out_proj --d-model 32 --layers 1 --concepts 24 --codes 64 "
    "--speech-codes 64 --batch 6 --lr 0.01 --save-every 10 --eval-every 45 --eval-samples 12 --draw 2"
)
PATIENCE = 120  # seconds
NAMES = ("text", "image", "speech")


def options(data: Path, output: Path) -> list[str]:
    return [*TINY, "--data", str(data), "--output", str(output)]


@pytest.fixture(scope="module")
def reference(run_script: RunScript, voices: None, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    assert run_script("three_modalities", options(data, folder)) == 0
    return folder


def test_losses_fall_far_below_the_unigram_entropies(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    entropies, losses = summary["unigram_entropy"], summary["held_out"]
    assert entropies.keys() == set(NAMES)
    assert losses.keys() == {*NAMES, "new_drawings_image", "new_recordings_speech"}
    assert all(losses[name] < 0.8 * entropies[name] for name in NAMES), summary


def test_half_a_mixture_has_weights_in_between(reference: Path) -> None:
    parameters = json.loads((reference / "summary.json").read_text())["parameters"]
    # d_model 32, d_inner 64: two more copies of in_proj and of out_proj, and nothing else.
    assert parameters["total"] - parameters["per_token"] == 2 * (32 * 128 + 64 * 32)


def test_what_it_says_can_be_listened_to(reference: Path) -> None:
    for name in ("1_recorded.wav", "2_recorded.wav"):
        with wave.open(str(reference / "speech" / name)) as sound:
            assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 22050)
            assert 0.2 < sound.getnframes() / 22050 < 5
            assert len(set(sound.readframes(sound.getnframes()))) > 100  # not silence
    assert (reference / "samples.png").stat().st_size > 0
    assert (reference / "losses.png").stat().st_size > 0


def test_the_speech_pack_lies_beside_its_attribution(reference: Path, data: Path) -> None:
    assert list(data.glob("spoken_names_*.npz"))
    assert "eSpeak NG" in (data / "ATTRIBUTION_speech.txt").read_text()
    assert "CC BY-SA" in (data / "ATTRIBUTION.txt").read_text()


def test_a_killed_run_resumes_to_the_same_bytes(
    run_script: RunScript, data: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(EXAMPLES / "three_modalities.py"), *options(data, tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + PATIENCE
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 25):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    run.wait()
    assert run_script("three_modalities", options(data, tmp_path)) == 0
    assert re.search(r"going on from step (20|30|40|50|60|70) in", capsys.readouterr().out)
    assert metrics.read_bytes() == (reference / "metrics.jsonl").read_bytes()
