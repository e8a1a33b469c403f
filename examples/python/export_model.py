# SPDX-License-Identifier: Apache-2.0
"""Compile a trained model into a package that a C++ program runs without Python.

    python examples/python/export_model.py --checkpoint runs/chameleon-small-mom/checkpoint.pt \\
      --vocabulary runs/stream/vocabulary.txt --output model.pt2

One graph reads a prompt and generates: any number of sequences, any number of tokens, states in and out.

    tokens, modality   int64 [batch, length], in time order; -1 is padding in both; modality is on the CPU
    conv               [mixers, batch, d_conv - 1, d_inner], zeros before the first token
    ssm                float32 [mixers, batch, d_inner, d_state], zeros before the first token
    -> logits [batch, length, vocabulary], conv, ssm

The sizes are in the package's metadata. The checkpoint is one of chameleon.py or of the C++ example.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from training_kit.startup import imports_explained

with imports_explained():
    import torch
    from discrete_kit.vocabulary_file import read_vocabulary
    from torch import Tensor, nn
    from training_kit.arguments import OneLineParser, chosen_device
    from training_kit.failure import fail

    import mixture_of_mamba as mom
    from mixture_of_mamba import models
    from mixture_of_mamba.nn import PROJECTIONS

MAX_BATCH = 1024
MAX_LENGTH = 65536
WRAPPER = "model."  # what chameleon.py trains holds the model under this name


class Continuation(nn.Module):
    """The model on two tensors of states, as a package's interface has no dataclasses."""

    def __init__(self, model: models.Chameleon) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, modality: Tensor, conv: Tensor, ssm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = [mom.MambaState(*parts) for parts in zip(conv.unbind(0), ssm.unbind(0), strict=True)]
        state = models.DecoderState(states, [], None)
        logits, state = self.model(tokens, modality, state=state, return_state=True)
        return logits, torch.stack([one.conv for one in state.mamba]), torch.stack([one.ssm for one in state.mamba])


def load_model(path: Path, vocabulary: models.Vocabulary) -> models.Chameleon:
    """The model in a checkpoint; its sizes are those of its weights."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = {name.removeprefix(WRAPPER): tensor for name, tensor in content["model"].items()}
        model = models.Chameleon(config_of(weights, vocabulary), vocabulary, tied="head.weight" not in weights)
        model.load_state_dict(weights)
    except FileNotFoundError:
        fail(f"--checkpoint must be a file, got {path}")
    except Exception as error:
        fail(f"{path} is not a checkpoint of the Chameleon example: {error}")
    return model.eval()


def config_of(weights: dict[str, Tensor], vocabulary: models.Vocabulary) -> models.DecoderConfig:
    mixers = {tuple(name.split(".")[2:5:2]) for name in weights if ".mixers." in name}
    layers = len({layer for layer, _ in mixers})
    first = "decoder.layers.0.mixers.0."
    return models.DecoderConfig(
        weights["embedding.weight"].shape[1],
        layers,
        vocabulary.num_modalities,
        tuple(name for name in PROJECTIONS if f"{first}{name}.0.weight" in weights),
        len(mixers) // layers,
        weights[f"{first}A_log"].shape[1],
        weights[f"{first}conv1d.weight"].shape[2],
    )


def mixers_of(model: models.Chameleon) -> list[mom.MixtureOfMamba]:
    return [module for module in model.modules() if isinstance(module, mom.MixtureOfMamba)]


def give_every_projection_a_bias(model: models.Chameleon) -> None:
    """Zeros, where there was none. The runtime of torch 2.13 hands an operator None in place of an empty list."""
    for mixer in mixers_of(model):
        for projection in (mixer.in_proj, mixer.out_proj):
            for linear in projection.modules():
                if isinstance(linear, nn.Linear) and linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


@torch.no_grad()
def compile_package(model: models.Chameleon, path: Path, device: torch.device) -> None:
    """Write ``path`` (.pt2). Lengths and batches other than the example's run as well; 1 too."""
    give_every_projection_a_bias(model)
    model = model.to(device)
    mixers, batch, length = mixers_of(model), 2, 8
    first = mixers[0].allocate_state(1)
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    modality = torch.zeros(batch, length, dtype=torch.int64)  # on the CPU: the host routes
    states = [part.new_zeros(len(mixers), batch, *part.shape[1:]) for part in (first.conv, first.ssm)]
    sequences = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    steps = torch.export.Dim("length", min=1, max=MAX_LENGTH)
    dynamic: Any = (*({0: sequences, 1: steps},) * 2, *({1: sequences},) * 2)
    program = torch.export.export(Continuation(model), (tokens, modality, *states), dynamic_shapes=dynamic)
    metadata = {
        "vocabulary": model.vocabulary.size,
        "mixers": len(mixers),
        "conv_steps": first.conv.shape[1],
        "d_inner": first.conv.shape[2],
        "d_state": first.ssm.shape[2],
    }
    configuration = {"aot_inductor.metadata": {name: str(value) for name, value in metadata.items()}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configuration)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of chameleon.py or of the C++ example")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary.txt of export_stream.py")
    parser.add_argument("--output", type=Path, default=Path("model.pt2"), help="package to write (model.pt2)")
    parser.add_argument("--device", default="cpu", help="where the package shall run: cpu or cuda (cpu)")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".pt2":
        fail(f"--output must end in .pt2, got {args.output}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    device = chosen_device(args)
    try:
        vocabulary = read_vocabulary(args.vocabulary)
    except (OSError, ValueError) as error:
        fail(str(error))
    compile_package(load_model(args.checkpoint, vocabulary), args.output, device)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
