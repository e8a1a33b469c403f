# SPDX-License-Identifier: Apache-2.0
"""The decoder: embedding, N x (RMSNorm -> mixer -> residual), norm, tied head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import mixture_of_mamba as mom
from chameleon_kit.stream import IMAGE, NUM_MODALITIES, PADDING_LABEL, TEXT, Batch, Vocabulary

__all__ = ["Decoder", "modality_losses"]

INIT_STD = 0.02


class Decoder(nn.Module):
    """Causal language model over text and image tokens.

    In training the residual stream stays sorted by modality through all layers: a batch's tokens and labels are
    already sorted, so no layer moves a row.

    Args:
        vocabulary: gives the number of tokens and of slots in a picture.
        d_model, layers: width and depth.
        mixer: "mom" (one set of projections per modality) or "mamba" (dense, the same FLOPs per token).
    """

    def __init__(self, vocabulary: Vocabulary, d_model: int, layers: int, mixer: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary.size, d_model)
        self.slots = nn.Embedding(vocabulary.patches + 1, d_model)
        self.norms = nn.ModuleList(nn.RMSNorm(d_model, eps=1e-5) for _ in range(layers))
        self.mixers = nn.ModuleList(
            mom.MixtureOfMamba(d_model, NUM_MODALITIES, layer_idx=index)
            if mixer == "mom"
            else mom.Mamba(d_model, layer_idx=index)
            for index in range(layers)
        )
        self.final_norm = nn.RMSNorm(d_model, eps=1e-5)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        nn.init.normal_(self.slots.weight, std=INIT_STD)
        with torch.no_grad():
            for name, parameter in self.mixers.named_parameters():
                if "out_proj" in name and name.endswith("weight"):
                    parameter.mul_((2 * layers) ** -0.5)

    def forward(self, tokens: Tensor, slots: Tensor, routing: mom.Routing) -> Tensor:
        """Sorted tokens and slots ``[batch, length]`` -> sorted logits ``[batch, length, vocabulary]``."""
        x = self.embedding(tokens) + self.slots(slots)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x), routing, sorted=True)
        return functional.linear(self.final_norm(x), self.embedding.weight)

    def advance(
        self, tokens: Tensor, slots: Tensor, modality: Tensor, states: list[mom.MambaState] | None
    ) -> tuple[Tensor, list[mom.MambaState]]:
        """Continue sequences: any number of tokens in time order -> (logits of each, states after the last)."""
        routing = mom.Routing.from_ids(modality, NUM_MODALITIES, device=tokens.device)
        x = self.embedding(tokens) + self.slots(slots)
        new_states = []
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            state = None if states is None else states[index]
            y, state = mixer(norm(x), routing, state=state, return_state=True)
            x = x + y
            new_states.append(state)
        return functional.linear(self.final_norm(x), self.embedding.weight), new_states

    def parameters_per_token(self) -> tuple[int, int]:
        """(parameters a token passes through, all parameters); FLOPs follow the first."""
        total = sum(parameter.numel() for parameter in self.parameters())
        idle = 0
        for module in self.modules():
            if isinstance(module, mom.ModalityLinear):
                one, *others = (sum(p.numel() for p in child.parameters()) for child in module)
                idle += sum(others)
        return total - idle, total


def modality_losses(logits: Tensor, batch: Batch, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """Cross-entropy in float32, in nats.

    Returns:
        (sum per modality of the label ``[modalities]``, number of labels per modality ``[modalities]``).
    """
    labels = batch.labels.flatten()
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels, ignore_index=PADDING_LABEL, reduction="none"
    )
    is_image = labels >= vocabulary.first_code
    is_text = (labels >= 0) & ~is_image
    masks = {TEXT: is_text, IMAGE: is_image}
    sums = torch.stack([(losses * masks[m]).sum() for m in range(NUM_MODALITIES)])
    counts = torch.stack([masks[m].sum() for m in range(NUM_MODALITIES)])
    return sums, counts
