# SPDX-License-Identifier: Apache-2.0
"""The runs of a comparison, each a process of its setting's script, some of them at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm
from training_kit.checkpoint import METRICS_NAME

__all__ = ["Run", "RunError", "carry_out"]

OUTPUT_NAME = "output.txt"
SUMMARY_NAME = "summary.json"
POLL_SECONDS = 0.2
LOG_SECONDS = 15  # between the bar's lines where nobody sees it move


class RunError(Exception):
    """A run failed; the message says which, and its last words."""


@dataclass(frozen=True, eq=False)
class Run:
    """One run.

    Attributes:
        mixer, seed: which one of the comparison.
        command: of the script, without the interpreter.
        folder: its output.
    """

    mixer: str
    seed: int
    command: list[str]
    folder: Path

    @property
    def steps_done(self) -> int:
        metrics = self.folder / METRICS_NAME
        return metrics.read_bytes().count(b'"kind": "train"') if metrics.exists() else 0

    def start(self, threads: int) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / SUMMARY_NAME).unlink(missing_ok=True)  # it is written last
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(self.folder / OUTPUT_NAME, "wb") as output:
            # In a session of its own: Ctrl-C reaches this process alone, which asks each run to save and stop, once.
            return subprocess.Popen(
                [sys.executable, *self.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def last_words(self) -> str:
        lines = (self.folder / OUTPUT_NAME).read_text(errors="replace").splitlines()
        return lines[-1] if lines else "nothing"


def carry_out(runs: list[Run], steps: int, jobs: int) -> None:
    """All runs, ``jobs`` at a time, from where each has got to; a bar of their steps.

    Raises:
        RunError: a run failed. Those beside it are asked to save and stop.
    """
    previous = signal.signal(signal.SIGTERM, _leave)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    waiting, running = list(runs), dict[Run, subprocess.Popen[bytes]]()
    done = 0
    try:
        interval = 0.5 if sys.stderr.isatty() else LOG_SECONDS
        with tqdm(total=steps * len(runs), unit="step", dynamic_ncols=True, mininterval=interval) as bar:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = run.start(threads)
                for run, process in list(running.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del running[run]
                    if status != 0:
                        raise RunError(f"{run.folder} ended with status {status}: {run.last_words()}")
                    done += 1
                    bar.set_postfix_str(f"{done} of {len(runs)} runs", refresh=False)
                bar.update(sum(run.steps_done for run in runs) - bar.n)
                time.sleep(POLL_SECONDS)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
