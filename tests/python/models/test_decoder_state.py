# SPDX-License-Identifier: Apache-2.0
"""The state cache: snapshots, sequences chosen and put back, and what it weighs."""

from __future__ import annotations

import pytest
import torch
from model_support import VARIANTS, make_decoder

from mixture_of_mamba import Routing

NAMES = ("mixture", "hybrid", "A and D", "norms and limits")
some_variants = pytest.mark.parametrize("settings", [VARIANTS[name] for name in NAMES], ids=NAMES)


def advance(decoder, x, ids, state=None):
    routing = Routing.from_ids(ids, 3)
    y, state = decoder(routing.sort(x), routing, state=state, return_state=True)
    return routing.unsort(y), state


@some_variants
def test_a_snapshot_is_not_written_to(settings):
    decoder, x = make_decoder(**settings), torch.randn(2, 8, 8).double()
    ids = torch.randint(0, 3, (2, 8))
    _, snapshot = advance(decoder, x[:, :4], ids[:, :4])
    before = snapshot.clone()
    first, _ = advance(decoder, x[:, 4:], ids[:, 4:], snapshot)
    again, _ = advance(decoder, x[:, 4:], ids[:, 4:], snapshot)
    assert torch.equal(first, again)
    for one, other in zip(before._tensors(), snapshot._tensors(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


@some_variants
def test_sequences_go_their_own_way(settings):
    """Two of three sequences go on, another way than planned, and are put back; padding stands for the third."""
    decoder = make_decoder(**settings)
    x, ids = torch.randn(3, 9, 8).double(), torch.randint(0, 3, (3, 9))
    chosen = torch.tensor([2, 0])
    _, state = advance(decoder, x[:, :4], ids[:, :4])
    _, branch = advance(decoder, x[chosen, 4:7], ids[chosen, 4:7], state.select(chosen))
    state = state.restore(chosen, branch)
    got, _ = advance(decoder, x[:, 7:], ids[:, 7:], state)

    ids[1, 4:7] = -1
    expected, _ = advance(decoder, x, ids)
    torch.testing.assert_close(got, expected[:, 7:])


@some_variants
def test_back_to_an_older_snapshot(settings):
    decoder = make_decoder(**settings)
    x, ids = torch.randn(2, 9, 8).double(), torch.randint(0, 3, (2, 9))
    _, old = advance(decoder, x[:, :3], ids[:, :3])
    _, state = advance(decoder, x[:, 3:6], ids[:, 3:6], old)
    one = torch.tensor([1])
    state = state.restore(one, old.select(one))
    got, _ = advance(decoder, x[:, 6:], ids[:, 6:], state)
    ids[1, 3:6] = -1
    expected, _ = advance(decoder, x, ids)
    torch.testing.assert_close(got, expected[:, 6:])


def test_only_attention_grows():
    x, ids = torch.randn(2, 40, 8).double(), torch.randint(0, 3, (2, 40))
    sizes = {}
    for name in ("mixture", "hybrid"):
        decoder = make_decoder(**VARIANTS[name])
        sizes[name] = [advance(decoder, x[:, :n], ids[:, :n])[1].num_bytes for n in (1, 40)]
    assert sizes["mixture"][0] == sizes["mixture"][1]
    heads_and_values = 2 * 39 * 8 * 8 * 2  # sequences, tokens, d_model, bytes, keys and values
    assert sizes["hybrid"][1] - sizes["hybrid"][0] == heads_and_values + 2 * 39  # and one byte of `seen` for each token


def test_history_reaches_back_through_the_state_until_detached():
    decoder = make_decoder()
    x = torch.randn(1, 6, 8).double().requires_grad_()
    ids = torch.randint(0, 3, (1, 6))
    _, state = advance(decoder, x[:, :3], ids[:, :3])
    y, _ = advance(decoder, x[:, 3:], ids[:, 3:], state)
    assert torch.autograd.grad(y.sum(), x)[0][:, :3].abs().sum() > 0
    y, _ = advance(decoder, x[:, 3:], ids[:, 3:], state.detach())
    assert torch.autograd.grad(y.sum(), x)[0][:, :3].abs().sum() == 0


def test_wrong_sequences():
    decoder = make_decoder()
    _, state = advance(decoder, torch.randn(3, 2, 8).double(), torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match=r"sequences must have shape \[3\], the snapshot's, got \[2\]"):
        state.restore(torch.tensor([0, 1]), state)
