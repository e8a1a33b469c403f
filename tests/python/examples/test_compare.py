# SPDX-License-Identifier: Apache-2.0
"""Dense against mixture: what two tiny runs come to, and the arithmetic of matching."""

from __future__ import annotations

import importlib
import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from example_support import RunScript

TINY = shlex.split(
    "--setting chameleon --seeds 1 --jobs 2 --size tiny --steps 24 --d-model 32 --layers 1 --concepts 24 --codes 64 "
    "--batch 4 --eval-samples 8 --eval-every 8"
)


@pytest.fixture
def arguments(data: Path, tmp_path: Path) -> list[str]:
    return [*TINY, "--data", str(data), "--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "results")]


@pytest.mark.slow
def test_two_runs_become_a_table_and_pictures(
    run_script: RunScript, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("compare", arguments) == 0
    results = tmp_path / "results"
    table = (results / "compare-chameleon-tiny.md").read_text()
    assert table in capsys.readouterr().out
    assert [line.split(" | ")[0] for line in table.splitlines()[2:5]] == ["| text", "| image", "| new drawings image"]
    content = json.loads((results / "compare-chameleon-tiny.json").read_text())
    assert content["device"] == "cpu"
    assert content["flops_per_step"]["mamba"] == content["flops_per_step"]["mom"] > 1e6
    assert content["curves"].keys() == content["runs"].keys() == {"mamba", "mom"}
    for curves in content["curves"].values():
        assert curves["steps"] == [8, 16, 24]
        assert all(np.shape(values) == (1, 3) for values in curves["held_out_by_seed"].values())
    assert {path.name for path in results.glob("*.png")} == {
        f"compare-chameleon-tiny-{name}.png" for name in ("text", "image", "new_drawings_image")
    }


def test_a_run_that_fails_is_named(
    run_script: RunScript, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script("compare", [*arguments, "--jobs", "1", "--codes", "1000000"])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("compare.py: ") and "ended with status 2" in error
    assert "codes must be at most the number of distinct pieces" in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--batch 0", "argument --batch: must be a positive integer, got '0'"),
        ("--mixer mamba", "--mixer must be another one than mamba"),
        ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
    ],
)
def test_a_bad_argument_gets_one_line(
    run_script: RunScript, arguments: list[str], capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_script("compare", [*arguments, *more.split()])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error, error


@pytest.mark.parametrize(("goal", "step"), [(3.5, 10), (4.0, 10), (3.0, 10), (2.5, 15), (2.0, 20), (1.9, math.nan)])
def test_the_step_that_matches_lies_between_validations(kits: None, goal: float, step: float) -> None:
    matching_step = importlib.import_module("compare_kit.analysis").matching_step
    found = matching_step(np.array([10, 20, 30]), np.array([3.0, 2.0, 2.1]), goal)
    assert found == pytest.approx(step, nan_ok=True)


def test_mean_and_deviation_are_over_the_seeds(kits: None) -> None:
    spread = importlib.import_module("compare_kit.output")._spread
    assert spread(np.array([1.0, 2.0, 3.0]), "{:.2f}") == "2.00 ± 1.00"
    assert spread(np.array([-1.0, -3.0]), "{:+.1f}", " %") == "-2.0 ± 1.4 %"
    assert spread(np.array([1.0, math.nan]), "{:.1f}") == "1.0, not reached by 1 of 2"
    assert spread(np.array([math.nan]), "{:.1f}", " %") == "not reached"
