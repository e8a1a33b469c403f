# SPDX-License-Identifier: Apache-2.0
"""The kit's ways to run: compiled, and in two processes that are stopped and go on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from example_support import EXAMPLES, RunScript

STEPS = 60
TINY = shlex.split(
    f"--steps {STEPS} --size tiny --d-model 32 --layers 1 --concepts 24 --codes 64 --batch 4 --lr 0.01 "
    "--save-every 1000 --eval-every 30 --eval-samples 8 --draw 0"
)
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PATIENCE = 120  # seconds


@pytest.mark.slow
def test_compiled_runs_have_the_losses_of_others(run_script: RunScript, data: Path, tmp_path: Path) -> None:
    losses = []
    for how in ([], ["--compile"]):
        folder = tmp_path / f"run{len(how)}"
        options = [*TINY, "--steps", "3", "--data", str(data), "--output", str(folder), *how]
        assert run_script("chameleon", options) == 0
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if record["kind"] == "train"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def start(data: Path, output: Path) -> subprocess.Popen[str]:
    script = [str(EXAMPLES / "chameleon.py"), *TINY, "--parallel", "fsdp2", "--data", str(data)]
    return subprocess.Popen(
        [*LAUNCHER, *script, "--output", str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_sharded_runs_go_on_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    runs = [start(data, whole), start(data, parts)]
    metrics = parts / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 5:
        assert runs[1].poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    runs[1].send_signal(signal.SIGINT)  # torchrun asks both processes, which agree on their last step
    assert "stopped and saved" in runs[1].communicate(timeout=PATIENCE)[0]
    again = start(data, parts)
    output = again.communicate(timeout=PATIENCE)[0]
    assert "going on from step" in output and again.returncode == 0, output
    assert runs[0].wait(PATIENCE) == 0
    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()
