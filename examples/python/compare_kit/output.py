# SPDX-License-Identifier: Apache-2.0
"""A comparison as a Markdown table, as JSON, and as a picture for each modality."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot

from compare_kit.analysis import Comparison, Curve

__all__ = ["as_json", "as_markdown", "plot_modality"]

LABELS = {"mamba": "dense Mamba", "mom": "Mixture-of-Mamba"}


def label(mixer: str) -> str:
    return LABELS.get(mixer, f"Mixture-of-Mamba ({mixer})")


def as_markdown(comparison: Comparison) -> str:
    """Mean and standard deviation over the seeds; steps and FLOPs as shares of the dense run's."""
    dense, mixed = comparison.mixers
    seeds = len(next(iter(comparison.matches.values())))
    steps = int(next(iter(comparison.curves[dense].values())).steps[-1])
    flops = comparison.flops_per_step[dense] * steps
    lines = [
        f"| held-out loss | {comparison.baseline_name} | {label(dense)} | {label(mixed)} | difference "
        "| steps to match | FLOPs to match |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in comparison.losses:
        first, second = comparison.curves[dense][name].last, comparison.curves[mixed][name].last
        baseline = f"{comparison.baselines[name]:.3f}" if name in comparison.baselines else ""
        change = _spread(100 * (second - first) / first, "{:+.1f}", " %")
        share = comparison.matches[name] / steps
        cost = share * comparison.flops_per_step[mixed] / comparison.flops_per_step[dense]
        cells = (
            name.replace("_", " "), baseline, _spread(first, "{:.4f}"), _spread(second, "{:.4f}"), change,
            _spread(100 * share, "{:.1f}", " %"), _spread(100 * cost, "{:.1f}", " %"),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    parameters = (comparison.summaries[mixer][0]["parameters"] for mixer in comparison.mixers)
    counts = "; ".join(
        f"{label(mixer)} {one['per_token'] / 1e6:.2f} M parameters a token, {one['total'] / 1e6:.2f} M in all"
        for mixer, one in zip(comparison.mixers, parameters, strict=True)
    )
    tokens = comparison.summaries[dense][0]["timing"]["tokens"]
    lines += [
        "",
        f"{seeds} seeds, mean ± standard deviation. {steps} steps, {tokens / 1e6:.2f} M tokens, {flops:.3g} FLOPs.",
        f"{counts}. FLOPs a step: {comparison.flops_per_step[dense]:.4g} and {comparison.flops_per_step[mixed]:.4g}.",
        "To match: what the second needs to reach the last loss of the first with the same seed, in shares of the run.",
    ]
    return "\n".join(lines) + "\n"


def as_json(comparison: Comparison, about: dict[str, Any]) -> str:
    """Everything: what was run, every held-out curve, and what the table says."""
    curves = {
        mixer: {
            "steps": next(iter(by_loss.values())).steps.tolist(),
            "held_out_by_seed": {name: curve.values.tolist() for name, curve in by_loss.items()},
        }
        for mixer, by_loss in comparison.curves.items()
    }
    content = {
        **about,
        comparison.baseline_name.replace(" ", "_"): comparison.baselines,
        "flops_per_step": comparison.flops_per_step,
        "steps_to_match_by_seed": {
            name: [None if math.isnan(step) else step for step in steps.tolist()]
            for name, steps in comparison.matches.items()
        },
        "curves": curves,
        "runs": comparison.summaries,
    }
    return json.dumps(content, indent=1) + "\n"


def plot_modality(path: Path, comparison: Comparison, name: str, units: str) -> None:
    """Held-out loss of both mixers: mean over the seeds, and a band from the lowest to the highest."""
    figure, (axis, below) = pyplot.subplots(2, 1, figsize=(6.5, 7), height_ratios=(3, 2), layout="constrained")
    steps = comparison.curves[comparison.mixers[0]][name].steps
    for index, mixer in enumerate(comparison.mixers):
        curve = comparison.curves[mixer][name]
        for panel, shown in ((axis, steps > 0), (below, steps >= steps[-1] / 2)):
            _plot_curve(panel, curve, shown, f"C{index}", f"{label(mixer)}: {_spread(curve.last, '{:.4f}')}")
    goal = comparison.curves[comparison.mixers[0]][name].last.mean()
    below.axhline(goal, color="C0", linestyle=":", linewidth=1)
    if name in comparison.baselines:
        baseline = comparison.baselines[name]
        axis.axhline(baseline, color="grey", linestyle="--", label=f"{comparison.baseline_name}: {baseline:.3f}")
    axis.set(title=name.replace("_", " "), ylabel=units)
    below.set(title="the second half", xlabel="step", ylabel=units)
    axis.legend(loc="upper right", fontsize=9)
    for panel in (axis, below):
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_curve(axis: Any, curve: Curve, shown: np.ndarray, colour: str, label: str) -> None:
    steps, values = curve.steps[shown], curve.values[:, shown]
    axis.plot(steps, values.mean(0), "o-", color=colour, markersize=3, label=label)
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)


def _spread(values: np.ndarray, form: str, unit: str = "") -> str:
    """``mean ± standard deviation`` of those that are numbers, and how many are not."""
    known = values[~np.isnan(values)]
    if not len(known):
        return "not reached"
    text = form.format(known.mean())
    if len(known) > 1:
        text += " ± " + form.replace("+", "").format(known.std(ddof=1))
    missing = f", not reached by {len(values) - len(known)} of {len(values)}" if len(known) < len(values) else ""
    return text + unit + missing
