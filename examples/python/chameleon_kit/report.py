# SPDX-License-Identifier: Apache-2.0
"""What a complete run leaves: two pictures, a summary, and a table on the terminal."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import torch
from training_kit.checkpoint import read_json_lines
from training_kit.plots import plot_losses
from training_kit.trainer import METRICS_NAME, TIMING_NAME

import mixture_of_mamba as mom
from chameleon_kit.task import MODALITIES, ChameleonTask

__all__ = ["report"]


def report(task: ChameleonTask, args: argparse.Namespace, config: dict[str, Any], entropies: dict[str, float]) -> None:
    """Write ``losses.png``, ``samples.png`` and ``summary.json`` into ``args.output``; print losses and entropies."""
    runs = {} if args.compare is None else {args.compare.name: read_json_lines(args.compare / METRICS_NAME)}
    runs[args.mixer] = read_json_lines(args.output / METRICS_NAME)
    curves, drawings = args.output / "losses.png", args.output / "samples.png"
    plot_losses(curves, runs, list(MODALITIES), entropies, "unigram entropy")
    shares = task.draw(drawings)

    last = {
        label: [record for record in records if record["kind"] == "validation"][-1:] for label, records in runs.items()
    }
    rows = {f"{label}, step {record['step']}": record for label, records in last.items() for record in records}
    print(f"{'held out, nats a token':<40}" + "".join(f"{name:>10}" for name in MODALITIES))
    for label, row in {"unigram entropy": entropies, **rows}.items():
        print(f"{label:<40}" + "".join(f"{row[name]:>10.3f}" for name in MODALITIES))
    print("described without a wrong word: " + ", ".join(f"{share:.0%} of {name}" for name, share in shares.items()))

    active, total = task.parameters()
    summary = {
        "settings": {"size": args.size, "device": args.device}
        | {name[2:]: value for name, value in config.items() if name.startswith("--")},
        "parameters": {"per_token": active, "total": total},
        "unigram_entropy": entropies,
        "held_out": {name: loss for name, loss in last[args.mixer][0].items() if name not in ("step", "kind")},
        "described_without_a_wrong_word": shares,
        "timing": {**read_json_lines(args.output / TIMING_NAME)[-1], "threads": torch.get_num_threads()},
        "versions": {
            "mixture_of_mamba": mom.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"curves: {curves}\ndrawings: {drawings}")
