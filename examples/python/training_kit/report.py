# SPDX-License-Identifier: Apache-2.0
"""What a complete run leaves: pictures, a summary, and a table on the terminal."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from torch import nn

import mixture_of_mamba as mom
from training_kit.checkpoint import METRICS_NAME, TIMING_NAME, read_json_lines
from training_kit.plots import plot_losses
from training_kit.task import Task

__all__ = ["report"]


def report(task: Task, model: nn.Module, args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Write ``losses.png``, ``summary.json`` and the samples into ``args.output``; print losses beside baselines."""
    runs = {} if args.compare is None else {args.compare.name: read_json_lines(args.compare / METRICS_NAME)}
    runs[args.mixer] = read_json_lines(args.output / METRICS_NAME)
    baselines, modalities = task.baselines, list(task.modalities)
    curves = args.output / "losses.png"
    plot_losses(curves, runs, modalities, baselines, task.baseline_name, task.units)
    samples = task.draw(model.eval(), args.output) if args.draw else {}

    last = {
        label: [record for record in records if record["kind"] == "validation"][-1:] for label, records in runs.items()
    }
    rows = {f"{label}, step {record['step']}": record for label, records in last.items() for record in records}
    print(f"{'held out':<40}" + "".join(f"{name:>10}" for name in modalities))
    for label, row in {task.baseline_name: baselines, **rows}.items():
        print(f"{label:<40}" + "".join(f"{row[name]:>10.3f}" for name in modalities))

    active, total = task.parameters()
    summary = {
        "settings": {"size": args.size, "device": args.device}
        | {name[2:]: value for name, value in config.items() if name.startswith("--")},
        "parameters": {"per_token": active, "total": total},
        "flops_per_step": task.flops_per_step(model),
        task.baseline_name.replace(" ", "_"): baselines,
        "held_out": {name: loss for name, loss in last[args.mixer][0].items() if name not in ("step", "kind")},
        **samples,
        "timing": {**read_json_lines(args.output / TIMING_NAME)[-1], "threads": torch.get_num_threads()},
        "versions": {
            "mixture_of_mamba": mom.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"curves: {curves}")
