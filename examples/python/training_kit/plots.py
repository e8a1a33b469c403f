# SPDX-License-Identifier: Apache-2.0
"""PNGs of a run: loss curves and grids of pictures."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

__all__ = ["plot_losses", "plot_pictures"]

SMOOTHING = 0.95
CAPTION_WIDTH = 26


def plot_losses(
    path: Path, runs: dict[str, list[dict[str, Any]]], modalities: list[str], floors: dict[str, float]
) -> None:
    """One panel per modality: training loss (smoothed), held-out loss (points), a dashed line at ``floors``.

    Args:
        path: the PNG.
        runs: label -> metrics records.
        modalities: names of the losses in the records.
        floors: modality -> what a model that ignores context could reach at best.
    """
    figure, axes = pyplot.subplots(1, len(modalities), figsize=(5.5 * len(modalities), 4), squeeze=False)
    for axis, modality in zip(axes[0], modalities, strict=True):
        for index, (label, records) in enumerate(runs.items()):
            colour = f"C{index}"
            train = [(r["step"], r[modality]) for r in records if r["kind"] == "train"]
            held_out = [(r["step"], r[modality]) for r in records if r["kind"] == "validation"]
            if train:
                steps, losses = zip(*train, strict=True)
                axis.plot(steps, _smooth(np.array(losses)), color=colour, alpha=0.5, label=f"{label}, training")
            if held_out:
                axis.plot(*zip(*held_out, strict=True), "o-", color=colour, label=f"{label}, held out")
        if modality in floors:
            axis.axhline(floors[modality], color="grey", linestyle="--", label="unigram entropy")
        axis.set(title=modality, xlabel="step", ylabel="nats a token")
        axis.legend()
        axis.grid(alpha=0.3)
    _save(figure, path)


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Running mean whose memory grows to 1 / (1 - SMOOTHING) steps."""
    smooth, mean, weight = np.empty_like(losses), 0.0, 0.0
    for index, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth[index] = mean / weight
    return smooth


def plot_pictures(path: Path, columns: dict[str, np.ndarray], captions: list[str], note: str, notes: list[str]) -> None:
    """A row per caption, a column per kind of picture.

    Args:
        path: the PNG.
        columns: heading -> pictures ``[rows, height, width, 3]`` in 0 .. 1.
        captions: left of each row.
        note, notes: heading and text right of each row.
    """
    width = len(columns)
    figure, axes = pyplot.subplots(
        len(captions), width + 2, figsize=(1.5 * width + 4.4, 1.5 * len(captions)), squeeze=False,
        width_ratios=[1.5, *[1.0] * width, 1.5],
    )  # fmt: skip
    for row, (caption, remark) in enumerate(zip(captions, notes, strict=True)):
        for axis in axes[row]:
            axis.axis("off")
        for axis, text in ((axes[row][0], caption), (axes[row][-1], remark)):
            axis.text(0.5, 0.5, textwrap.fill(text, CAPTION_WIDTH), ha="center", va="center", fontsize=8)
        for axis, (heading, pictures) in zip(axes[row][1:-1], columns.items(), strict=True):
            axis.imshow(np.clip(pictures[row], 0, 1), interpolation="nearest")
            if row == 0:
                axis.set_title(heading, fontsize=9)
    axes[0][0].set_title("caption", fontsize=9)
    axes[0][-1].set_title(note, fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)
