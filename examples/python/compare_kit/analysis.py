# SPDX-License-Identifier: Apache-2.0
"""Held-out losses of both mixers over all seeds, and when one reaches the last loss of the other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from training_kit.checkpoint import METRICS_NAME, read_json_lines

from compare_kit.runs import SUMMARY_NAME, Run

__all__ = ["Comparison", "Curve", "analyse", "matching_step"]


@dataclass(frozen=True)
class Curve:
    """A held-out loss of one mixer: ``values [seeds, validations]`` at ``steps [validations]``."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> np.ndarray:
        """By seed."""
        return self.values[:, -1]


@dataclass(frozen=True)
class Comparison:
    """All that is known of a comparison.

    Attributes:
        mixers: dense first.
        losses: names of the held-out losses; those of the modalities come first.
        curves: mixer -> loss -> curve.
        matches: loss -> by seed, the step at which the second mixer reaches the first one's last loss; NaN if never.
        baselines, baseline_name: by modality, what context is worth nothing without.
        flops_per_step: mixer -> of forward and backward.
        summaries: mixer -> by seed, what the run left.
    """

    mixers: tuple[str, str]
    losses: list[str]
    curves: dict[str, dict[str, Curve]]
    matches: dict[str, np.ndarray]
    baselines: dict[str, float]
    baseline_name: str
    flops_per_step: dict[str, int]
    summaries: dict[str, list[dict[str, Any]]]


def matching_step(steps: np.ndarray, values: np.ndarray, goal: float) -> float:
    """The first step at which the curve is at ``goal`` or below, on straight lines between its points; NaN if never."""
    below = np.flatnonzero(values <= goal)
    if not len(below):
        return float("nan")
    first = below[0]
    if first == 0:
        return float(steps[0])
    share = (values[first - 1] - goal) / (values[first - 1] - values[first])
    return float(steps[first - 1] + share * (steps[first] - steps[first - 1]))


def analyse(runs: list[Run], mixers: tuple[str, str], baseline_name: str) -> Comparison:
    """From the files of complete runs: those of a mixer by rising seed."""
    by_mixer = {mixer: sorted((run for run in runs if run.mixer == mixer), key=lambda r: r.seed) for mixer in mixers}
    records = {mixer: [_validations(run.folder) for run in each] for mixer, each in by_mixer.items()}
    losses = [name for name in records[mixers[0]][0][0] if name not in ("step", "kind")]
    curves = {}
    for mixer, each in records.items():
        steps = np.array([record["step"] for record in each[0]])
        curves[mixer] = {
            name: Curve(steps, np.array([[record[name] for record in one] for one in each])) for name in losses
        }
    dense, mixed = (curves[mixer] for mixer in mixers)
    matches = {
        name: np.array(
            [
                matching_step(mixed[name].steps, values, goal)
                for values, goal in zip(mixed[name].values, dense[name].last, strict=True)
            ]
        )
        for name in losses
    }
    summaries = {
        mixer: [json.loads((run.folder / SUMMARY_NAME).read_text()) for run in each] for mixer, each in by_mixer.items()
    }
    first = summaries[mixers[0]][0]
    flops = {mixer: each[0]["flops_per_step"] for mixer, each in summaries.items()}
    baselines = first[baseline_name.replace(" ", "_")]
    return Comparison(mixers, losses, curves, matches, baselines, baseline_name, flops, summaries)


def _validations(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(folder / METRICS_NAME) if record["kind"] == "validation"]
