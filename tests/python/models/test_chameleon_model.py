# SPDX-License-Identifier: Apache-2.0
"""Chameleon: losses against written-out ones, generation against the whole computed anew for each token."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from model_support import VARIANTS, VOCABULARY, config, disturb, reference_decoder
from torch.utils._python_dispatch import TorchDispatchMode

from mixture_of_mamba import Routing
from mixture_of_mamba.models import Chameleon, ModalityLosses, Sampling, modality_losses, next_tokens

GREEDY = Sampling(temperature=0)
NAMES = ("mixture", "hybrid", "shared experts", "A and D", "norms and limits")
some_variants = pytest.mark.parametrize("settings", [VARIANTS[name] for name in NAMES], ids=NAMES)
PROMPTS = [[5, 6, 1], [7, 1, 12, 13, 14, 2, 3, 20], [8], [9, 1, 15, 16]]


def make(tied=False, **settings):
    return disturb(Chameleon(config(**settings), VOCABULARY, tied=tied).double(), 0.4)


def padded(prompts, where):
    longest = max(map(len, prompts)) + 1
    rows = []
    for prompt in prompts:
        empty = [-1] * (longest - len(prompt))
        rows.append(
            {"left": [*empty, *prompt], "right": [*prompt, *empty], "inside": [*prompt[:1], *empty, *prompt[1:]]}[where]
        )
    return torch.tensor(rows)


def slow_losses(model, documents):
    """Sums by modality of the label, token by token: (cross-entropy, z, count)."""
    head = model.embedding.weight if model.head is None else model.head.weight
    sums = torch.zeros(3, 3).double()
    for document in documents:
        tokens = torch.tensor([document])
        x = model.embedding.weight[tokens]
        logits = reference_decoder(model.decoder, x, VOCABULARY.modality_of(tokens))[0] @ head.T
        for row, label in zip(logits[:-1], document[1:], strict=True):
            z = math.log(sum(math.exp(value) for value in row.tolist()))
            m = int(VOCABULARY.modality_of(torch.tensor(label)))
            sums[:, m] += torch.tensor([z - row[label].item(), z * z, 1])
    return sums


@pytest.mark.parametrize("tied", [False, True])
@some_variants
def test_losses_are_those_written_out(settings, tied):
    model = make(tied, **settings)
    expected = slow_losses(model, PROMPTS)
    packed = torch.tensor([token for prompt in PROMPTS for token in prompt]).view(2, -1)
    cu_seqlens = torch.tensor([0, *map(len, PROMPTS)]).cumsum(0).int()
    left, right = padded(PROMPTS, "left"), padded(PROMPTS, "right")
    for losses in (
        model.loss(left),
        model.loss(right, VOCABULARY.modality_of(right)),
        model.loss(packed, Routing.from_ids(VOCABULARY.modality_of(packed), 3), cu_seqlens=cu_seqlens),
    ):
        got = torch.stack((losses.cross_entropy, losses.z, losses.count))
        torch.testing.assert_close(got, expected)
    assert expected[2].tolist() == [6, 5, 1]  # text, image, speech
    total = (expected[0].sum() + 0.01 * expected[1].sum()) / 12
    torch.testing.assert_close(losses.total(0.01), total)
    torch.testing.assert_close(losses.means(), expected[0] / expected[2])


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_a_loss_in_parts_has_the_same_gradients(rows):
    model, tokens = make(), padded(PROMPTS, "left")
    whole, parts = model.loss(tokens), model.loss(tokens, rows_at_once=rows)
    for name in ("cross_entropy", "z", "count"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    gradients = [torch.autograd.grad(one.total(0.1), tuple(model.parameters())) for one in (whole, parts)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("settings", [{}, {"attention_every": 2, "attention_heads": 2}], ids=["mamba", "hybrid"])
def test_only_attention_moves_the_residual_stream(settings):
    """From the loss and back: tokens and labels are permuted, one routing serves all layers, hidden states stay."""
    model, tokens, moved, routings = make(layers=4, **settings), padded(PROMPTS, "left"), [], []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            name = str(operator)
            if "permute_rows" in name:
                moved.append(args[0].dtype)
            routings.extend([name] * ("modality_routing" in name))
            return operator(*args, **(kwargs or {}))

    with Spy():
        model.loss(tokens).total().backward()
    assert moved.count(torch.int64) == 2
    assert len(routings) == 1
    each = 4  # of an attention layer: in and out, and their gradients
    assert len(moved) == 2 + (2 * each if settings else 0)


def test_next_tokens():
    tokens = torch.tensor([[-1, 3, 4, -1], [5, -1, 6, 7]])
    assert next_tokens(tokens).tolist() == [[-1, 4, -1, -1], [-1, -1, 7, -1]]
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    cu_seqlens = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    assert next_tokens(tokens, cu_seqlens).tolist() == [[2, -1, 4], [5, -1, -1]]
    assert next_tokens(tokens, cu_seqlens[:3]).flatten().tolist()[:2] == [2, -1]
    assert next_tokens(tokens[:0]).shape == next_tokens(tokens[:0], cu_seqlens[:2] * 0).shape == (0, 3)


def test_losses_of_nothing_are_zero():
    labels = torch.full((2, 3), -1)
    logits = torch.full((2, 3, 24), torch.nan, requires_grad=True)
    losses = modality_losses(logits, labels, labels, 3)
    assert isinstance(losses, ModalityLosses)
    assert losses.total().item() == 0
    assert losses.means().tolist() == losses.count.tolist() == [0, 0, 0]
    half = modality_losses(torch.zeros(1, 24, dtype=torch.bfloat16), torch.tensor([3]), torch.tensor([0]), 3)
    assert half.cross_entropy.dtype == torch.float32
    assert half.cross_entropy[0].item() == pytest.approx(math.log(24))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
@pytest.mark.parametrize("rows", [None, 3])
@some_variants
def test_a_batch_of_nothing_has_no_loss(settings, shape, rows):
    """And every parameter a gradient of zero, as those of an absent modality: a rank without data is a rank as any."""
    model, tokens = make(**settings), torch.zeros(shape, dtype=torch.int64)
    losses = model.loss(tokens, rows_at_once=rows)
    losses.total().backward()
    assert losses.total().item() == 0
    assert losses.count.tolist() == [0, 0, 0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0, name
    assert model(tokens).shape == (*shape, 24)


def test_sums_of_losses_stay_wide_under_autocast():
    logits, labels = torch.randn(500, 24), torch.randint(0, 24, (500,))
    modality = VOCABULARY.modality_of(labels)
    expected = modality_losses(logits, labels, modality, 3)
    with torch.autocast("cpu", torch.bfloat16):
        got = modality_losses(logits, labels, modality, 3)
    for name in ("cross_entropy", "z", "count"):
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))


def slow_generation(model, prompt, count, stop=None):
    """Greedy, the whole sequence anew for each token, and the grammar as a few ifs."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        ids = torch.tensor([tokens])
        logits = model(ids)[0, -1]
        begins = [t for t, token in enumerate(tokens) if token in (1, 2, 3, 4)]
        region, length = (tokens[begins[-1]], len(tokens) - 1 - begins[-1]) if begins else (2, 0)
        if region == 1:
            legal = list(range(12, 19)) if length < 3 else [2]
        elif region == 3:
            legal = [4, *range(19, 24)]
        else:
            legal = [token for token in range(12) if token not in (2, 4)]
        tokens.append(max(legal, key=lambda token: logits[token].item()))
        if tokens[-1] == stop:
            break
    new = tokens[len(prompt) :]
    return new + [-1] * (count - len(new))


@some_variants
def test_generation_of_ragged_prompts(settings):
    model = make(**settings)
    expected = [slow_generation(model, prompt, 6) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    for where in ("left", "right", "inside"):
        assert model.generate(padded(PROMPTS, where), 6, sampling=GREEDY).tolist() == expected
    packed = torch.tensor([[token for prompt in PROMPTS for token in prompt]])
    cu_seqlens = torch.tensor([0, *map(len, PROMPTS)]).cumsum(0).int()
    assert model.generate(packed, 6, sampling=GREEDY, cu_seqlens=cu_seqlens).tolist() == expected


def test_generation_stops():
    model = make()
    free = model.generate(padded(PROMPTS, "left"), 8, sampling=GREEDY)
    stop = int(free[2, 1])
    expected = [slow_generation(model, prompt, 8, stop) for prompt in PROMPTS]
    assert model.generate(padded(PROMPTS, "left"), 8, sampling=GREEDY, stop=stop).tolist() == expected
    assert expected[2][2:] == [-1] * 6
    assert model.generate(padded(PROMPTS, "left"), 0).shape == (4, 0)


def test_generation_obeys_the_grammar():
    """Drawn at a high temperature: every region is complete and in its range, and only text outside."""
    model = make()
    drawn = model.generate(torch.full((16, 1), 1), 30, sampling=Sampling(5.0, top_k=20))
    for row in drawn.tolist():
        assert all(12 <= token < 19 for token in row[:3])
        assert row[3] == 2
        region = None
        for token in row[4:]:
            if region is None:
                assert token < 12 and token not in (2, 4)
                region = {1: [1], 3: [3]}.get(token)
            elif region[0] == 1:
                region.append(token)
                assert token == 2 if len(region) == 5 else 12 <= token < 19
                region = None if token == 2 else region
            else:
                assert token == 4 or token >= 19
                region = None if token == 4 else region
    quiet = model.generate(torch.full((8, 1), 5), 10, sampling=Sampling(5.0), regions=False)
    assert not set(quiet.flatten().tolist()) & {1, 2, 3, 4, *range(12, 24)}


def test_logits_in_chunks(device):
    model = disturb(Chameleon(config(), VOCABULARY), 0.2).to(device)
    tokens = padded(PROMPTS, "inside").to(device)
    whole = model(tokens)
    first, state = model(tokens[:, :4], return_state=True)
    second, _ = model(tokens[:, 4:], VOCABULARY.modality_of(tokens[:, 4:].cpu()), state=state, return_state=True)
    real = tokens >= 0
    torch.testing.assert_close(torch.cat((first, second), 1)[real], whole[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients(tied):
    model = make(tied)
    model.loss(torch.tensor([[*PROMPTS[1], 21, 4, 5]])).total(0.1).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()
    model.loss(torch.tensor([[5, 1, 12, 13, 14, 2]])).total().backward()  # no speech
    for name, parameter in model.named_parameters():
        assert (parameter.grad.abs().sum() == 0) == ("_proj.2." in name), name


def test_copies(tmp_path):
    model, tokens = make(tied=True), padded(PROMPTS, "left")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = Chameleon(model.config, VOCABULARY, tied=True, device="meta").to_empty(device="cpu").double()
    fresh.reset_parameters()
    assert not torch.equal(fresh(tokens), model(tokens))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    for other in (copy.deepcopy(model), fresh):
        assert torch.equal(other(tokens), model(tokens))
    assert copy.deepcopy(model).decoder.layers[0].mixers[0].A_log._no_weight_decay


def test_wrong_inputs():
    with pytest.raises(ValueError, match=r"config.num_modalities must be the vocabulary's, 3, got 2"):
        Chameleon(config(num_modalities=2), VOCABULARY)
    model = make()
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got torch.int64 \[3\]"):
        model(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"modality must have the shape of tokens, \[1, 3\], got \[1, 2\]"):
        model.loss(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="rows_at_once must be at least 1, got 0"):
        model.loss(torch.zeros(1, 3, dtype=torch.int64), rows_at_once=0)
    with pytest.raises(ValueError, match="tokens must have a token that is no padding in every prompt"):
        model.generate(torch.tensor([[3, 4], [-1, -1]]), 2)
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got torch.int64 \[3\]"):
        model.generate(torch.tensor([5, 6, 7]), 2)
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got list"):
        model([[5, 6]])
    for new_tokens in (-1, 2.0):
        with pytest.raises(ValueError, match=f"new_tokens must be an integer of at least 0, got {new_tokens}"):
            model.generate(torch.tensor([[5, 6]]), new_tokens)


@pytest.mark.parametrize("call", ["__call__", "loss", "generate", "with ids"])
@pytest.mark.parametrize(("token", "at"), [(24, 0), (100, 5), (-2, 3), (-100, 1)])
def test_tokens_outside_of_the_vocabulary(call, token, at):
    """Also those that a data loader's modality ids make look right; -1 alone is padding."""
    model, tokens = make(), torch.tensor([[-1, 5, 6], [7, 8, 23]])
    arguments = {"generate": (2,), "with ids": (VOCABULARY.modality_of(tokens),)}.get(call, ())
    tokens.view(-1)[at] = token
    message = rf"tokens must lie in -1 .. vocabulary.size - 1 = 23 .*, got {token} at flat position {at}"
    with pytest.raises(ValueError, match=message):
        getattr(model, "__call__" if call == "with ids" else call)(tokens, *arguments)


@pytest.mark.parametrize("settings", [{}, {"attention_every": 2, "attention_heads": 2}], ids=["mamba", "hybrid"])
def test_wrong_boundaries(settings):
    model, tokens = make(**settings), torch.tensor([[5, 6, 7, 8, 9]])
    for call in (model, model.loss, lambda *a, **b: model.generate(*a, 2, **b)):
        with pytest.raises(ValueError, match=r"cu_seqlens must be an int32 tensor \[sequences \+ 1\], got list"):
            call(tokens, cu_seqlens=[0, 5])
    for wrong in ([1, 5], [0, 4], [0, 3, 2, 5], [0]):
        with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to batch \* length = 5, got \["):
            model.generate(tokens, 2, cu_seqlens=torch.tensor(wrong))
    with pytest.raises(ValueError, match=r"cu_seqlens must be an int32 tensor .*, got torch.float32 \[2\]"):
        model.generate(tokens, 2, cu_seqlens=torch.tensor([0.0, 5.0]))
