# SPDX-License-Identifier: Apache-2.0
"""Text and latents in one stream: a tiny run, its baseline, and the same run on two processes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from example_support import EXAMPLES, RunScript

STEPS = 80
TINY = shlex.split(
    f"--steps {STEPS} --size tiny --d-model 48 --layers 1 --concepts 24 --latents 8 --batch 8 --lr 0.01 "
    "--save-every 40 --eval-every 40 --eval-samples 16 --draw 2 --denoising-steps 3"
)
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def reference(run_script: RunScript, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    assert run_script("transfusion", [*TINY, "--data", str(data), "--output", str(folder)]) == 0
    return folder


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_fall_below_what_needs_no_context(reference: Path) -> None:
    summary = json.loads((reference / "summary.json").read_text())
    baselines, losses = summary["without_context"], summary["held_out"]
    assert losses.keys() == {"text", "image", "new_drawings_image"}
    assert losses["text"] < 0.5 * baselines["text"] and losses["image"] < 0.95 * baselines["image"], summary
    assert (reference / "samples.png").stat().st_size > 0


def test_a_complete_run_is_reported_again_to_the_same_losses(
    run_script: RunScript, data: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    assert run_script("transfusion", [*TINY, "--data", str(data), "--output", str(reference), "--draw", "0"]) == 0
    assert f"going on from step {STEPS}" in capsys.readouterr().out
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_the_baseline_is_the_error_of_the_best_linear_estimate(data: Path) -> None:
    scenes = importlib.import_module("emoji_scenes")
    patches = importlib.import_module("scene_streams.patches")
    pack = scenes.load_or_build_pack(data)
    source = scenes.SceneSource(pack, list(range(24)), seed=0, stream=0)
    pictures = scenes.render(source.batch(0, 512), scenes.sprite_tensor(pack, torch.device("cpu")))
    latents = patches.PatchLatents.fit(pictures, 8).encode(pictures)
    noise, time = torch.randn_like(latents), 0.3
    noisy, target = (1 - time) * latents + time * noise, noise - latents
    best = (noisy * target).mean() / noisy.square().mean()
    error = (target - best * noisy).square().mean().item()
    assert error == pytest.approx(1 / ((1 - time) ** 2 + time**2), rel=0.02)


def test_all_components_give_the_picture_back(data: Path) -> None:
    scenes = importlib.import_module("emoji_scenes")
    patches = importlib.import_module("scene_streams.patches")
    pack = scenes.load_or_build_pack(data)
    source = scenes.SceneSource(pack, list(range(24)), seed=0, stream=0)
    pictures = scenes.render(source.batch(0, 64), scenes.sprite_tensor(pack, torch.device("cpu")))
    whole = patches.PatchLatents.fit(pictures, patches.CHANNELS)
    torch.testing.assert_close(whole.decode(whole.encode(pictures)), pictures, atol=1e-4, rtol=0)
    few = patches.PatchLatents.fit(pictures, 16)
    assert (few.decode(few.encode(pictures)) - pictures).square().mean() < 0.05 * pictures.var()
    with pytest.raises(ValueError, match="latents must be at most 48"):
        patches.PatchLatents.fit(pictures, 49)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ddp", "fsdp2"])
def test_two_processes_train_to_the_losses_of_one(method: str, data: Path, reference: Path, tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    draw = {"ddp": "0", "fsdp2": "2"}[method]
    command = [str(EXAMPLES / "transfusion.py"), *TINY, "--parallel", method, "--data", str(data), "--draw", draw]
    finished = subprocess.run(
        [*launcher, *command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    ours, theirs = records(tmp_path), records(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for one, other in zip(ours[:20], theirs[:20], strict=True):  # rounding grows with the steps
        assert one["text"] == pytest.approx(other["text"], rel=2e-3)
        assert one["image"] == pytest.approx(other["image"], rel=2e-3)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    whole = torch.load(reference / "checkpoint.pt", weights_only=True)["model"]
    assert {name: tensor.shape for name, tensor in checkpoint["model"].items()} == {
        name: tensor.shape for name, tensor in whole.items()
    }
    assert (tmp_path / "samples.png").exists() == (draw != "0")
