# SPDX-License-Identifier: Apache-2.0
"""Write the batches that chameleon.py draws into files that the C++ examples read.

    pip install -r examples/python/requirements.txt
    python examples/python/export_stream.py --size small --output runs/stream

vocabulary.txt is for prompts, see discrete_kit/vocabulary_file.py. stream.bin is int32, little-endian:

    header   [16]                         MAGIC, VERSION, the SIZES in their order, then zeros
    tokens   [steps * batch, length]      of every step's batch; -1 is padding
    tokens   [held_out, length]           of the samples that chameleon.py validates on

They are those of chameleon.py with the same data pack and the same arguments.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from training_kit.startup import imports_explained

with imports_explained():
    import numpy as np
    import torch
    from discrete_kit.arguments import CHAMELEON
    from discrete_kit.data import load_scenes
    from discrete_kit.task import DiscreteTask
    from discrete_kit.vocabulary_file import VOCABULARY_NAME, write_vocabulary
    from scene_streams.vocabulary import BOI, EOI
    from tqdm import tqdm
    from training_kit.arguments import REPOSITORY, OneLineParser, natural_int, positive_int
    from training_kit.failure import fail
    from training_kit.packs import MissingPackagesError
    from training_kit.parallel import World

MAGIC = 0x534D6F4D  # "MoMS"
VERSION = 2
HEADER = 16
SIZES = ("steps", "batch", "held_out", "length", "words", "codes", "begin", "end", "patches")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__ or "")
    parser.add_argument("--size", choices=tuple(CHAMELEON), default="small", help="preset of chameleon.py (small)")
    parser.add_argument("--steps", type=positive_int, help="batches to write (by size)")
    parser.add_argument("--batch", type=positive_int, help="samples a batch (by size)")
    parser.add_argument("--eval-samples", type=positive_int, default=256, help="held-out samples (256)")
    parser.add_argument("--concepts", type=positive_int, help="how many drawings take part (by size)")
    parser.add_argument("--codes", type=positive_int, help="size of the image codebook (by size)")
    parser.add_argument("--seed", type=natural_int, default=0, help="of training data (0)")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="folder of the data packs (data/)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs/stream", help="folder to write (runs/stream)")
    args = parser.parse_args(arguments)
    for name, value in vars(CHAMELEON[args.size]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.concepts == 1:
        fail("--concepts must be at least 2, got 1")
    args.mixer, args.compile = "mom", False  # of the task's model, which goes unused
    return args


def batches(args: argparse.Namespace, task: DiscreteTask) -> Iterator[torch.Tensor]:
    """Tokens of the training batches, then of the held-out ones."""
    for step in range(args.steps):
        yield task.training_batch(step).inputs[0]
    for batch in task.evaluation_batches(task.splits.held_out):
        yield batch.inputs[0]


def export(args: argparse.Namespace, task: DiscreteTask) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    streams = task.streams
    write_vocabulary(args.output / VOCABULARY_NAME, streams.vocabulary, streams.patches)
    length = task.training_batch(0).inputs[0].shape[1]
    numbers = (args.steps, args.batch, args.eval_samples, length, *task.sizes, BOI, EOI, streams.patches)
    header = np.zeros(HEADER, dtype="<i4")
    header[: 2 + len(SIZES)] = [MAGIC, VERSION, *numbers]
    partial = args.output / "stream.bin.partial"
    with open(partial, "wb") as file:
        file.write(header.tobytes())
        for tokens in tqdm(batches(args, task), unit="batch"):
            file.write(tokens.cpu().numpy().astype("<i4").tobytes())
    partial.replace(args.output / "stream.bin")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        export(args, DiscreteTask(args, load_scenes(args), World(torch.device("cpu")), {}))
    except (OSError, MissingPackagesError, ValueError) as error:
        fail(str(error))
    print(f"wrote stream.bin and {VOCABULARY_NAME} in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
