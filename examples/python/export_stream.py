# SPDX-License-Identifier: Apache-2.0
"""Write the batches of chameleon.py into a file that the C++ example maps into memory.

    pip install -r examples/python/requirements.txt
    python examples/python/export_stream.py --size small --output runs/stream

words.txt has one token a line, whose number is its id; image codes follow them. stream.bin is int32, little-endian:

    header  [16]                                      MAGIC, VERSION, the SIZES in their order, then zeros
    data    [batches + held_out, 4, batch, length]    tokens, slots, modality, labels, all in time order

Scenes, image tokeniser and order of samples are those of chameleon.py with the same --size, --batch and --seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from training_kit.failure import fail

try:
    import numpy as np
    import torch
    from chameleon_kit.arguments import PRESETS, REPOSITORY
    from chameleon_kit.stream import IMAGE, SPECIAL, TEXT, Batch, encode_batch
    from chameleon_kit.task import ChameleonTask
    from emoji_scenes import MissingPackagesError, load_or_build_pack
    from tqdm import tqdm
    from training_kit.arguments import OneLineParser, natural_int, positive_int
except ModuleNotFoundError as error:
    source = "." if error.name in ("torch", "mixture_of_mamba") else "-r examples/python/requirements.txt"
    fail(f"the Python package {error.name} is not installed: pip install {source}")

MAGIC = 0x534D6F4D  # "MoMS"
VERSION = 1
HEADER = 16
SIZES = ("batches", "held_out", "batch", "length", "vocabulary", "slots", "first_code")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__ or "")
    parser.add_argument("--size", choices=tuple(PRESETS), default="small", help="preset of chameleon.py (small)")
    parser.add_argument("--batches", type=positive_int, help="training batches (the steps of the size)")
    parser.add_argument("--held-out", type=natural_int, default=8, help="held-out batches (8)")
    parser.add_argument("--batch", type=positive_int, help="samples a batch (by size)")
    parser.add_argument("--concepts", type=positive_int, help="how many drawings take part (by size)")
    parser.add_argument("--codes", type=positive_int, help="size of the image codebook (by size)")
    parser.add_argument("--seed", type=natural_int, default=0, help="of training data (0)")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="folder of the sprite pack (data/)")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "runs/stream", help="folder to write (runs/stream)")
    args = parser.parse_args(arguments)
    for name, value in vars(PRESETS[args.size]).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.mixer, args.compile = "mom", False  # of the task's model, which goes unused
    args.batches = args.batches or args.steps
    return args


def batches(args: argparse.Namespace, task: ChameleonTask) -> Iterator[Batch]:
    """The training batches, then the held-out ones."""
    for step in range(args.batches):
        scenes = task.training.batch(step, args.batch)
        yield encode_batch(scenes, task.vocabulary, task.tokeniser, task.sprites, first_order=step)
    for index in range(args.held_out):
        scenes = task.held_out.batch(index * args.batch, args.batch)
        yield encode_batch(scenes, task.vocabulary, task.tokeniser, task.sprites)


def time_order(batch: Batch) -> torch.Tensor:
    """Tokens, slots, modality and labels, int64 ``[4, batch, length]``."""
    routing = batch.routing
    modality = torch.full_like(batch.tokens, -1).flatten()
    for index in (TEXT, IMAGE):
        modality[routing.offsets[index] : routing.offsets[index + 1]] = index
    parts = (batch.tokens, batch.slots, modality.view_as(batch.tokens), batch.labels)
    return torch.stack([routing.unsort(part) for part in parts])


def export(args: argparse.Namespace, task: ChameleonTask) -> None:
    vocabulary = task.vocabulary
    args.output.mkdir(parents=True, exist_ok=True)
    words = "".join(f"{word}\n" for word in (*SPECIAL, *vocabulary.words))
    (args.output / "words.txt").write_text(words, encoding="utf-8")
    length = vocabulary.sample_length - 1
    sizes = {
        "batches": args.batches,
        "held_out": args.held_out,
        "batch": args.batch,
        "length": length,
        "vocabulary": vocabulary.size,
        "slots": vocabulary.patches + 1,
        "first_code": vocabulary.first_code,
    }
    header = np.zeros(HEADER, dtype="<i4")
    header[: 2 + len(SIZES)] = [MAGIC, VERSION, *(sizes[name] for name in SIZES)]
    partial = args.output / "stream.bin.partial"
    with open(partial, "wb") as file:
        file.write(header.tobytes())
        for batch in tqdm(batches(args, task), total=args.batches + args.held_out, unit="batch"):
            file.write(time_order(batch).numpy().astype("<i4").tobytes())
    partial.replace(args.output / "stream.bin")


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        pack = load_or_build_pack(args.data)
        args.concepts = args.concepts or len(pack.names)
        if not 2 <= args.concepts <= len(pack.names):
            fail(f"--concepts must be from 2 to {len(pack.names)}, the size of the pack, got {args.concepts}")
        export(args, ChameleonTask(args, pack.first(args.concepts), torch.device("cpu"), {}))
    except (OSError, MissingPackagesError, ValueError) as error:
        fail(str(error))
    print(f"wrote stream.bin and words.txt in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
