# SPDX-License-Identifier: Apache-2.0
"""Text and discrete image tokens in one causal stream, as in Chameleon, on endless captioned pictures.

    pip install -r examples/python/requirements.txt
    python examples/python/chameleon.py                              # minutes on two CPU cores
    python examples/python/chameleon.py --mixer mamba --compare runs/chameleon-small-mom
    python examples/python/chameleon.py --device cuda --amp --size base

A run can be stopped at any moment, even by kill -9; the same command goes on, to the same losses bit by bit.
"""

from __future__ import annotations

import argparse
import os

# Before torch is loaded, which reads both. The first is what deterministic cuBLAS asks for. The second lets threads of
# GNU OpenMP sleep when they have waited some microseconds: by default they spin for milliseconds, and beside another
# busy program, where the thread they wait for is not running, that slows a step down 20 times.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from training_kit.failure import fail

try:
    import torch
    from chameleon_kit.arguments import parse_arguments
    from chameleon_kit.report import report
    from chameleon_kit.task import ChameleonTask
    from emoji_scenes import MissingPackagesError, SpritePack, load_or_build_pack
    from training_kit.arguments import chosen_device
    from training_kit.checkpoint import CheckpointError, load_checkpoint
    from training_kit.trainer import make_deterministic, resume_command, train
except ModuleNotFoundError as error:
    source = "." if error.name in ("torch", "mixture_of_mamba") else "-r examples/python/requirements.txt"
    fail(f"the Python package {error.name} is not installed: pip install {source}")
except ImportError as error:
    fail(str(error))
except KeyboardInterrupt:
    raise SystemExit(130) from None

MODEL = ("mixer", "d_model", "layers", "concepts", "codes")
TRAINING = ("steps", "batch", "lr", "weight_decay", "clip", "seed", "amp", "compile")


def configuration(args: argparse.Namespace, pack: SpritePack) -> dict[str, object]:
    """What a run and its continuation must agree on."""
    settings = {f"--{name.replace('_', '-')}": getattr(args, name) for name in (*MODEL, *TRAINING)}
    return {**settings, "a sprite pack of checksum": pack.checksum()}


def load_pack(args: argparse.Namespace) -> SpritePack:
    """The drawings that take part; ``args.concepts`` becomes their number."""
    pack = load_or_build_pack(args.data)
    if args.concepts is None:
        args.concepts = len(pack.names)
    if args.concepts > len(pack.names):
        fail(f"--concepts must be at most {len(pack.names)}, the size of the pack in {args.data}, got {args.concepts}")
    return pack.first(args.concepts)


def main() -> int:
    args = parse_arguments(__doc__ or "")
    device = chosen_device(args)
    make_deterministic(args.seed)
    try:
        pack = load_pack(args)
        config = configuration(args, pack)
        checkpoint = None if args.fresh else load_checkpoint(args.output, config)
        task = ChameleonTask(args, pack, device, checkpoint["constants"] if checkpoint else {})
        active, total = task.parameters()
        entropies = task.unigram_entropies()
        print(
            f"{args.mixer} {args.size}: {active / 1e6:.2f} M parameters a token, {total / 1e6:.2f} M in all; ", end=""
        )
        print("unigram entropy " + ", ".join(f"{name} {entropy:.3f}" for name, entropy in entropies.items()))
        if checkpoint:
            print(f"going on from step {checkpoint['step']} in {args.output} (--fresh starts over)")
        complete = train(task, args, config, checkpoint)
        if complete:
            report(task, args, config, entropies)
    except OSError as error:
        fail(str(error) if error.filename else f"{error.strerror or error}, in {args.output}")
    except (MissingPackagesError, CheckpointError, FloatingPointError, ValueError) as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"--device {args.device} has too little memory for --batch {args.batch} at this size")
    if not complete:
        print(f"stopped and saved in {args.output}; go on with: {resume_command()}")
        return 130
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint, if there is one")
        raise SystemExit(130) from None
