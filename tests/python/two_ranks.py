# SPDX-License-Identifier: Apache-2.0
"""Two processes on CPUs for tests of torch.distributed."""

from __future__ import annotations

import datetime
import gc
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["RANKS", "run_on_two_ranks"]

RANKS = 2


def run_on_two_ranks(worker: Callable[[int], None], tmp_path: Path) -> None:
    """``worker(rank)`` in each process; it must be picklable. Random numbers begin alike."""
    mp.spawn(_start, args=(worker, str(tmp_path / "store")), nprocs=RANKS)


def _start(rank: int, worker: Callable[[int], None], store: str) -> None:
    torch.manual_seed(11)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support on cpu")
    timeout = datetime.timedelta(seconds=30)  # a collective that waits for the other rank is an error, not a hang
    dist.init_process_group("gloo", f"file://{store}", timeout, RANKS, rank)
    try:
        worker(rank)
        gc.collect()  # DDP lies in reference cycles and holds the group
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # all has been tested; threads of gloo that are still there would abort an orderly exit
