# SPDX-License-Identifier: Apache-2.0
"""Ranges of tokens, the grammar of regions, and drawing."""

from __future__ import annotations

import math

import pytest
import torch
from model_support import VOCABULARY
from torch._subclasses.fake_tensor import FakeTensorMode

from mixture_of_mamba.models import Sampling, TokenRange, Vocabulary
from mixture_of_mamba.models.sampling import Regions, draw, nucleus

TEXT, IMAGE, SPEECH = range(3)
ALL_TEXT = set(range(12)) - {2, 4}
CODES, SOUNDS = set(range(12, 19)), set(range(19, 24))


def test_ranges():
    assert (VOCABULARY.size, VOCABULARY.num_modalities) == (24, 3)
    assert [VOCABULARY.first(m) for m in range(4)] == [0, 12, 19, 24]
    tokens = torch.tensor([[-1, 0, 11, 12], [18, 19, 23, -1]])
    assert VOCABULARY.modality_of(tokens).tolist() == [[-1, 0, 0, 1], [1, 2, 2, -1]]
    assert VOCABULARY.tokens_of([0, 6, 3], IMAGE).tolist() == [1, 12, 18, 15, 2]
    assert VOCABULARY.tokens_of(torch.tensor([4]), SPEECH).tolist() == [3, 23, 4]
    assert VOCABULARY.tokens_of(torch.tensor([4], dtype=torch.uint8), SPEECH).tolist() == [3, 23, 4]
    assert VOCABULARY.tokens_of([], SPEECH).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("seen", "follows"),
    [
        ([5], ALL_TEXT),
        ([5, -1, -1], ALL_TEXT),
        ([-1, 5, 1], CODES),
        ([1, 12, -1, 13], CODES),
        ([1, 12, 13, 14], {2}),
        ([1, 12, 13, 14, 2], ALL_TEXT),
        ([3], SOUNDS | {4}),
        ([1, 12, 13, 14, 2, 3, 20, 20, 20, 20, 20, 20], SOUNDS | {4}),
        ([3, 20, 4], ALL_TEXT),
    ],
)
@pytest.mark.parametrize("piece", [1, 2, 100])
def test_what_may_follow(seen, follows, piece):
    regions = Regions(VOCABULARY, 2, torch.device("cpu"))
    tokens = torch.tensor([seen, [-1] * len(seen)])
    for part in tokens.split(piece, 1):
        regions.advance(part)
    logits = regions.mask(torch.randn(2, 24))
    for row, expected in ((0, follows), (1, ALL_TEXT)):
        assert set(logits[row].isfinite().nonzero().flatten().tolist()) == expected


def test_text_alone():
    regions = Regions(VOCABULARY, 1, torch.device("cpu"), free=False)
    legal = regions.mask(torch.zeros(1, 24))[0].isfinite().nonzero().flatten().tolist()
    assert legal == [0, 5, 6, 7, 8, 9, 10, 11]


def test_draw():
    logits = torch.tensor([0.0, 2.0, 1.0, -torch.inf]).expand(20_000, 4)
    assert draw(logits, Sampling(temperature=0)).unique().tolist() == [1]
    assert draw(logits, Sampling(top_k=1)).unique().tolist() == [1]
    for temperature, top_k, kept in ((1.0, 0, 3), (0.5, 0, 3), (2.0, 2, 2)):
        drawn = draw(logits, Sampling(temperature, top_k, torch.Generator().manual_seed(5)))
        expected = logits[0] / temperature
        expected[expected < expected.sort(descending=True).values[kept - 1]] = -torch.inf
        frequencies = torch.bincount(drawn, minlength=4) / len(logits)
        torch.testing.assert_close(frequencies, expected.softmax(0), atol=0.015, rtol=0)
    same = [draw(logits[:50], Sampling(generator=torch.Generator().manual_seed(1))) for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [1]),
        (0.5, [1]),
        (0.51, [0, 1]),
        (0.75, [0, 1]),
        (0.76, [0, 1, 3]),
        (0.875, [0, 1, 3]),
        (0.9, [0, 1, 2, 3]),
    ],
)
def test_a_nucleus_is_the_smallest_set_that_reaches_top_p(top_p, kept):
    """Of equals, here 2 and 3 without and with 0, the lower id is taken first."""
    probabilities = torch.tensor([[0.25, 0.5, 0.0625, 0.125, 0.0625, 0]])
    expected = torch.zeros_like(probabilities)
    expected[0, kept] = probabilities[0, kept]
    assert torch.equal(nucleus(probabilities, top_p), expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 0.6), (0.5, 0, 0.9), (2.0, 7, 0.8), (1.0, 3, 0.01)]
)
def test_draw_from_a_nucleus(temperature, top_k, top_p):
    """Temperature, then top_k, then top_p of what is left: the draws are those of probabilities made by hand."""
    logits = 3 * torch.randn(500, 24)
    logits[:, 5] = -torch.inf
    rows, sizes = [], set()
    for row in (logits / temperature).tolist():
        falling = sorted(range(24), key=lambda token: -row[token])[: top_k or 24]
        weights = {token: math.exp(row[token]) for token in falling}
        kept, mass = [], 0.0
        while mass < top_p * sum(weights.values()):
            kept.append(falling[len(kept)])
            mass += weights[kept[-1]]
        rows.append([weights[token] if token in kept else 0.0 for token in range(24)])
        sizes.add(len(kept))
    assert sizes == {1} if top_p < 0.1 else max(sizes) > 2
    expected = torch.multinomial(torch.tensor(rows), 1, generator=torch.Generator().manual_seed(5)).squeeze(1)
    for _ in range(2):
        sampling = Sampling(temperature, top_k, torch.Generator().manual_seed(5), top_p=top_p)
        assert torch.equal(draw(logits, sampling), expected)


def test_a_nucleus_of_everything_is_no_nucleus():
    logits = 5 * torch.randn(300, 1000)  # float32 sums of so many reach 1 early
    one, other = (draw(logits, Sampling(generator=torch.Generator().manual_seed(1), top_p=p)) for p in (None, 1.0))
    assert torch.equal(one, other)
    assert torch.equal(draw(logits, Sampling(top_p=1e-9)), logits.argmax(-1))
    assert torch.equal(draw(logits, Sampling(temperature=0, top_p=0.9)), logits.argmax(-1))


@pytest.mark.parametrize(
    ("codes", "modality", "message"),
    [
        (
            [0, 1, 2],
            0,
            r"modality must be an integer in 1 .. num_modalities - 1 = 2 \(0, text, has no regions\), got 0",
        ),
        ([0, 1, 2], 3, r"modality must be an integer in 1 .. .* = 2 .*, got 3"),
        ([0, 1, 2], -1, r"modality must be an integer in 1 .. .* = 2 .*, got -1"),
        ([0, 1, 2], 1.0, r"modality must be an integer in 1 .. .* = 2 .*, got 1.0"),
        ([0, 1, 2], True, r"modality must be an integer in 1 .. .* = 2 .*, got True"),
        ([64, -70, 200], IMAGE, r"codes must lie in 0 .. size - 1 = 6 of image, got 64 at 0"),
        (torch.tensor([0, 6, -1]), IMAGE, r"codes must lie in 0 .. size - 1 = 6 of image, got -1 at 2"),
        (torch.tensor([4, 5], dtype=torch.uint8), SPEECH, r"codes must lie in 0 .. .* = 4 of speech, got 5 at 1"),
        ([0, 1], IMAGE, "codes must be as many as a region of image has, 3, got 2"),
        ([0.0, 1.0, 2.0], IMAGE, r"codes must be integers \[codes\], got torch.float32 \[3\]"),
        (torch.zeros(1, 3).long(), IMAGE, r"codes must be integers \[codes\], got torch.int64 \[1, 3\]"),
        (torch.ones(3) > 0, IMAGE, r"codes must be integers \[codes\], got torch.bool \[3\]"),
        ("abc", IMAGE, "codes must be a tensor or a list of integers, got str"),
    ],
)
def test_wrong_codes(codes, modality, message):
    with pytest.raises(ValueError, match=message):
        VOCABULARY.tokens_of(codes, modality)


def test_tokens_beyond_the_vocabulary():
    with pytest.raises(
        ValueError, match=r"tokens must lie in -1 .. size - 1 = 23 \(-1 is padding\), got 24 at flat pos"
    ):
        VOCABULARY.modality_of(torch.tensor([[0, 23], [24, 99]]))
    with pytest.raises(ValueError, match=r"tokens must lie in .*, got -2 at flat position 1"):
        VOCABULARY.modality_of(torch.tensor([-1, -2]))
    with pytest.raises(ValueError, match=r"tokens must be a tensor of integers, got torch.float32 \[2\]"):
        VOCABULARY.modality_of(torch.zeros(2))
    for modality in (-1, 4):
        with pytest.raises(ValueError, match=f"modality must lie in 0 .. num_modalities = 3, got {modality}"):
            VOCABULARY.first(modality)


def test_values_that_cannot_be_read_are_not():
    """Under torch.compile, in vmap and of tensors without values: no error, and nothing waits."""
    beyond = torch.tensor([[0, 24], [12, 5]])
    compiled = torch.compile(VOCABULARY.modality_of, fullgraph=True, backend="eager")
    assert compiled(beyond).tolist() == torch.func.vmap(VOCABULARY.modality_of)(beyond).tolist() == [[0, 2], [1, 0]]
    assert VOCABULARY.modality_of(beyond.to("meta")).is_meta
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(beyond)
        assert VOCABULARY.modality_of(fake).shape == (2, 2)
        assert VOCABULARY.tokens_of(fake[0], SPEECH).shape == (4,)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ((), "ranges must hold one TokenRange per modality, text first, got none"),
        ((TokenRange("text", 0),), r"ranges\[0\] must have a size of at least 1, got 0"),
        ((TokenRange("text", 5, begin=1),), r"ranges\[0\] is text and must have no begin, end and length"),
        ((TokenRange("text", 5), TokenRange("image", 3, 1)), r"ranges\[1\].end must be a text token, 0 .. 4, got None"),
        (
            (TokenRange("text", 5), TokenRange("image", 3, 5, 2)),
            r"ranges\[1\].begin must be a text token, 0 .. 4, got 5",
        ),
        ((TokenRange("text", 5), TokenRange("image", 3, 1, 1)), r"begin and an end of their own, got tokens \[1, 1\]"),
        ((TokenRange("text", 5), TokenRange("image", 3, 1, 2, 0)), r"ranges\[1\].length must be at least 1, got 0"),
    ],
)
def test_wrong_ranges(ranges, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(ranges)


def test_wrong_sampling():
    with pytest.raises(ValueError, match="temperature must be at least 0, got -1"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match=r"top_k must be at least 0 \(all tokens\), got -2"):
        Sampling(top_k=-2)
    for top_p in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"top_p must lie in 0 \(not included\) .. 1, or be None .*, got {top_p}"):
            Sampling(top_p=top_p)
