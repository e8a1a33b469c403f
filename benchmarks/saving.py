# SPDX-License-Identifier: Apache-2.0
"""Where results go, and what is written beside them."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import mixture_of_mamba as mom

__all__ = ["RESULTS", "device_name", "save"]

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"cpu-{torch.backends.cpu.get_cpu_capability()}"
    return name.replace(" ", "-").lower()


def _commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=RESULTS, check=False)
    return git.stdout.strip() or "unknown"


def save(name: str, device: str, **content: Any) -> Path:
    """``results/<device>/<name>.json``, with the versions that made it."""
    document = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mixture_of_mamba": mom.__version__,
        "commit": _commit(),
        **content,
    }
    path = RESULTS / device_name(device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
