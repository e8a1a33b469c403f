# SPDX-License-Identifier: Apache-2.0
"""PNGs of a run: loss curves and grids of pictures."""

from __future__ import annotations

import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from torch import Tensor

__all__ = ["PictureRow", "pixels", "plot_losses", "plot_pictures"]

SMOOTHING = 0.95
CAPTION_WIDTH = 17
HEADROOM = 1.4  # of the axis over the dashed line: the first losses leave it, and the legend goes there
ENLARGED_FROM = 0.5  # of the steps


def plot_losses(
    path: Path,
    runs: dict[str, list[dict[str, Any]]],
    modalities: list[str],
    floors: dict[str, float],
    floor_name: str,
    units: dict[str, str],
) -> None:
    """A column per modality: training loss (smoothed), held-out loss (points), a dashed line; below, the end enlarged.

    Args:
        path: the PNG.
        runs: label -> metrics records.
        modalities: names of the losses in the records.
        floors: modality -> height of the dashed line.
        floor_name: what it is.
        units: modality -> what its axis says.
    """
    figure, axes = pyplot.subplots(
        2, len(modalities), figsize=(5.5 * len(modalities), 6.6), height_ratios=(3, 2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (axis, below), modality in zip(axes.T, modalities, strict=True):
        for index, (label, records) in enumerate(runs.items()):
            train = [(r["step"], r[modality]) for r in records if r["kind"] == "train"]
            held_out = [(r["step"], r[modality]) for r in records if r["kind"] == "validation"]
            _plot_run(axis, below, f"C{index}", label, train, held_out)
        floor = floors[modality]
        axis.axhline(floor, color="grey", linestyle="--", label=f"{floor_name}: {floor:.3f}")
        axis.set(title=modality, ylabel=units[modality], ylim=(0, HEADROOM * floor))
        axis.legend(loc="upper right", fontsize=9, framealpha=1)
        below.set(title="the second half", xlabel="step", ylabel=units[modality])
        for each in (axis, below):
            each.grid(alpha=0.3)
    _save(figure, path)


def _plot_run(
    axis: Any, below: Any, colour: str, label: str, train: list[tuple[int, float]], held_out: list[tuple[int, float]]
) -> None:
    steps = np.array([step for step, _ in train])
    losses = _smooth(np.array([loss for _, loss in train]))
    held_out_steps, held_out_losses = np.array(held_out).reshape(-1, 2).T
    last = f": {held_out_losses[-1]:.3f}" if held_out else ""
    for panel, begin in ((axis, 0), (below, ENLARGED_FROM * steps.max(initial=0))):
        shown, points = steps >= begin, held_out_steps >= begin
        panel.plot(steps[shown], losses[shown], color=colour, alpha=0.4, label=f"{label}, training")
        panel.plot(
            held_out_steps[points], held_out_losses[points], "o-", color=colour, markersize=4,
            label=f"{label}, held out{last}",
        )  # fmt: skip


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Running mean whose memory grows to 1 / (1 - SMOOTHING) steps."""
    smooth, mean, weight = np.empty_like(losses), 0.0, 0.0
    for index, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth[index] = mean / weight
    return smooth


@dataclass(frozen=True)
class PictureRow:
    """A row of :func:`plot_pictures`: ``pictures [columns, height, width, 3]`` in 0 .. 1, and what stands below each.

    ``remarks`` are pairs of a text and whether it is right.
    """

    heading: str
    pictures: np.ndarray
    remarks: list[tuple[str, bool]] | None = None


def pixels(pictures: Tensor) -> np.ndarray:
    """``[count, 3, height, width]`` -> ``[count, height, width, 3]``."""
    return pictures.permute(0, 2, 3, 1).cpu().numpy()


def plot_pictures(path: Path, captions: list[str], rows: list[PictureRow], credit: str) -> None:
    """A column per caption, which stands on top; ``credit`` at the foot."""
    figure, axes = pyplot.subplots(
        len(rows), len(captions), figsize=(1.45 * len(captions) + 1.3, 1.75 * len(rows) + 0.6), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(textwrap.fill(caption, CAPTION_WIDTH), fontsize=9)
    for axes_of_row, row in zip(axes, rows, strict=True):
        axes_of_row[0].set_ylabel(row.heading, fontsize=9, rotation=0, ha="right", va="center", labelpad=8)
        for axis, picture in zip(axes_of_row, row.pictures, strict=True):
            axis.imshow(np.clip(picture, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("lightgrey")
        for axis, (text, right) in zip(axes_of_row, row.remarks or [], strict=False):
            mark, colour = ("\u2713", "tab:green") if right else ("\u2717", "tab:red")
            axis.set_xlabel(textwrap.fill(f"{mark} {text}", CAPTION_WIDTH), fontsize=8, color=colour)
    figure.supxlabel(credit, fontsize=7, color="grey")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    pyplot.close(figure)
    os.replace(partial, path)
