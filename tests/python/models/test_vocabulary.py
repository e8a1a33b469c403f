# SPDX-License-Identifier: Apache-2.0
"""Ranges of tokens, the grammar of regions, and drawing."""

from __future__ import annotations

import pytest
import torch
from model_support import VOCABULARY

from mixture_of_mamba.models import Sampling, TokenRange, Vocabulary
from mixture_of_mamba.models.sampling import Regions, draw

TEXT, IMAGE, SPEECH = range(3)
ALL_TEXT = set(range(12)) - {2, 4}
CODES, SOUNDS = set(range(12, 19)), set(range(19, 24))


def test_ranges():
    assert (VOCABULARY.size, VOCABULARY.num_modalities) == (24, 3)
    assert [VOCABULARY.first(m) for m in range(4)] == [0, 12, 19, 24]
    tokens = torch.tensor([[-1, 0, 11, 12], [18, 19, 23, -1]])
    assert VOCABULARY.modality_of(tokens).tolist() == [[-1, 0, 0, 1], [1, 2, 2, -1]]
    assert VOCABULARY.tokens_of([0, 6], IMAGE).tolist() == [1, 12, 18, 2]
    assert VOCABULARY.tokens_of(torch.tensor([4]), SPEECH).tolist() == [3, 23, 4]


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
