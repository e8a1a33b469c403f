# SPDX-License-Identifier: Apache-2.0
"""Compile a trained decoder into a package that a C++ program runs without Python.

    python examples/python/export_model.py --checkpoint runs/chameleon-small-mom/checkpoint.pt --output model.pt2

One graph reads a prompt and generates: any number of sequences, any number of tokens, states in and out.

    tokens, slots, modality   int64 [batch, length], in time order; modality -1 is padding
    conv                      [layers, batch, d_conv - 1, d_inner], zeros before the first token
    ssm                       float32 [layers, batch, d_inner, d_state], zeros before the first token
    -> logits [batch, length, vocabulary], conv, ssm

The sizes are in the package's metadata. The checkpoint is one of chameleon.py or of the C++ example.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

from training_kit.failure import fail

try:
    import torch
    from chameleon_kit.decoder import Decoder
    from torch import Tensor, nn
    from training_kit.arguments import OneLineParser, chosen_device

    import mixture_of_mamba as mom
except ModuleNotFoundError as error:
    source = "." if error.name in ("torch", "mixture_of_mamba") else "-r examples/python/requirements.txt"
    fail(f"the Python package {error.name} is not installed: pip install {source}")

MAX_BATCH = 1024
MAX_LENGTH = 65536


class Continuation(nn.Module):
    """``Decoder.advance`` on two tensors of states, as a package's interface has no dataclasses."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, slots: Tensor, modality: Tensor, conv: Tensor, ssm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        states = [mom.MambaState(*parts) for parts in zip(conv.unbind(0), ssm.unbind(0), strict=True)]
        logits, states = self.model.advance(tokens, slots, modality, states)
        return logits, torch.stack([state.conv for state in states]), torch.stack([state.ssm for state in states])


def load_decoder(path: Path) -> Decoder:
    """The decoder in a checkpoint; its sizes are those of its weights."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("model", content)
        vocabulary, d_model = weights["embedding.weight"].shape
        sizes = SimpleNamespace(size=vocabulary, patches=len(weights["slots.weight"]) - 1)
        layers = sum(name.startswith("norms.") for name in weights)
        model = Decoder(sizes, d_model, layers, "mom" if "mixers.0.in_proj.0.weight" in weights else "mamba")
        model.load_state_dict(weights)
    except FileNotFoundError:
        fail(f"--checkpoint must be a file, got {path}")
    except Exception as error:
        fail(f"{path} is not a checkpoint of the Chameleon example: {error}")
    return model.eval()


def give_every_projection_a_bias(model: Decoder) -> None:
    """Zeros, where there was none. The runtime of torch 2.13 hands an operator None in place of an empty list."""
    for mixer in model.mixers:
        for projection in (mixer.in_proj, mixer.out_proj):
            for linear in projection.modules():
                if isinstance(linear, nn.Linear) and linear.bias is None:
                    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


@torch.no_grad()
def compile_package(model: Decoder, path: Path, device: torch.device) -> None:
    """Write ``path`` (.pt2). Lengths and batches other than the example's run as well; 1 too."""
    give_every_projection_a_bias(model)
    model = model.to(device)
    first = model.mixers[0].allocate_state(1)
    layers, batch, length = len(model.mixers), 2, 8
    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    modality = torch.zeros(batch, length, dtype=torch.int64)  # on the CPU: the host routes
    states = [part.new_zeros(layers, batch, *part.shape[1:]) for part in (first.conv, first.ssm)]
    sequences = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    steps = torch.export.Dim("length", min=1, max=MAX_LENGTH)
    dynamic = (*({0: sequences, 1: steps},) * 3, *({1: sequences},) * 2)
    example = (tokens, tokens.clone(), modality, *states)
    program = torch.export.export(Continuation(model), example, dynamic_shapes=dynamic)
    metadata = {
        "vocabulary": model.embedding.num_embeddings,
        "slots": model.slots.num_embeddings,
        "layers": layers,
        "conv_steps": first.conv.shape[1],
        "d_inner": first.conv.shape[2],
        "d_state": first.ssm.shape[2],
    }
    configuration = {"aot_inductor.metadata": {name: str(value) for name, value in metadata.items()}}
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configuration)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of chameleon.py or of the C++ example")
    parser.add_argument("--output", type=Path, default=Path("model.pt2"), help="package to write (model.pt2)")
    parser.add_argument("--device", default="cpu", help="where the package shall run: cpu or cuda (cpu)")
    args = parser.parse_args(arguments)
    if args.output.suffix != ".pt2":
        fail(f"--output must end in .pt2, got {args.output}")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    device = chosen_device(args)
    compile_package(load_decoder(args.checkpoint), args.output, device)
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
