# SPDX-License-Identifier: Apache-2.0
"""The convolution under the names and layouts of Dao-AILab/causal-conv1d, against torch's own convolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mixture_of_mamba import causal_conv1d_fn, causal_conv1d_update
from mixture_of_mamba.integrations.causal_conv1d import causal_conv1d_varlen_states


def plain(x, weight, bias, activation, initial_states=None):
    """[batch, channels, length] through F.conv1d."""
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], dim=-1)
    y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])
    return (y if activation is None else F.silu(y)), padded[..., padded.shape[-1] - (width - 1) :]


def problem(batch=2, channels=6, length=11, width=4):
    x = torch.randn(batch, channels, length).double()
    return x, torch.randn(channels, width).double(), torch.randn(channels).double()


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("width", [2, 3, 4, 6])
@pytest.mark.parametrize("channel_last", [False, True])
def test_function(activation, width, channel_last):
    x, weight, bias = problem(width=width)
    if channel_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    states = torch.randn(2, 6, width - 1).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias, states)]
    out, final = causal_conv1d_fn(x, weight, bias, None, states, True, activation=activation)
    expected, expected_final = plain(x, weight, bias, activation, states)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(final, expected_final)
    grads = [torch.randn_like(out), torch.randn_like(final)]
    ours = torch.autograd.grad([out, final], leaves, grads)
    for got, wanted in zip(ours, torch.autograd.grad([expected, expected_final], leaves, grads), strict=True):
        torch.testing.assert_close(got, wanted)


def test_sequence_indices_separate_documents():
    x, weight, bias = problem(length=12)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, -1, -1]])
    out = causal_conv1d_fn(x, weight, bias, seq_idx.int(), activation="silu")
    for b in range(2):
        for value in seq_idx[b].unique():
            here = seq_idx[b] == value
            expected = (
                plain(x[b : b + 1, :, here], weight, bias, "silu")[0] if value >= 0 else 0 * x[b : b + 1, :, here]
            )
            torch.testing.assert_close(out[b : b + 1, :, here], expected)


def test_sequence_indices_with_states():
    """Initial states belong to each row's first document, final states to its last."""
    x, weight, bias = problem(length=8)
    states = torch.randn(2, 6, 3).double()
    seq_idx = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    out, final = causal_conv1d_fn(x, weight, bias, seq_idx, states, return_final_states=True)
    torch.testing.assert_close(out[:1, :, :5], plain(x[:1, :, :5], weight, bias, None, states[:1])[0])
    last, last_state = plain(x[:1, :, 5:], weight, bias, None)
    torch.testing.assert_close(out[:1, :, 5:], last)
    torch.testing.assert_close(final[:1], last_state)
    torch.testing.assert_close(final[1:], plain(x[1:], weight, bias, None, states[1:])[1])


def test_final_states_out():
    x, weight, bias = problem()
    storage = torch.zeros(2, 6, 3).double()
    _, final = causal_conv1d_fn(x, weight, bias, return_final_states=True, final_states_out=storage)
    assert final.data_ptr() == storage.data_ptr()
    assert torch.equal(storage, x[..., -3:])


@pytest.mark.parametrize("state_length", [3, 5])
@pytest.mark.parametrize("length", [None, 1, 4])
def test_update_continues_the_function(state_length, length):
    x, weight, bias = problem(length=12)
    whole, _ = plain(x, weight, bias, "silu")
    state = F.pad(x[..., :8], (state_length, 0))[..., -state_length:].clone()
    new = x[..., 8] if length is None else x[..., 8 : 8 + length]
    out = causal_conv1d_update(new, state, weight, bias, "silu")
    torch.testing.assert_close(out, whole[..., 8] if length is None else whole[..., 8 : 8 + length])
    seen = 8 + (length or 1)
    torch.testing.assert_close(state, F.pad(x[..., :seen], (state_length, 0))[..., -state_length:])


def test_update_of_a_ring():
    x, weight, bias = problem(length=9)
    whole, _ = plain(x, weight, bias, None)
    ring, lengths = torch.zeros(2, 6, 5).double(), torch.zeros(2, dtype=torch.int32)
    for t in range(9):
        out = causal_conv1d_update(x[..., t], ring, weight, bias, cache_seqlens=lengths)
        torch.testing.assert_close(out, whole[..., t])
        lengths += 1


def test_update_of_chosen_entries():
    x, weight, bias = problem(batch=3, length=1)
    pool = torch.randn(6, 6, 3).double()
    before = pool.clone()
    entries = torch.tensor([4, -1, 0], dtype=torch.int32)
    out = causal_conv1d_update(x, pool, weight, bias, conv_state_indices=entries)
    for row, entry in enumerate(entries.tolist()):
        if entry < 0:
            assert not out[row].any()
            continue
        state = before[entry : entry + 1].clone()
        torch.testing.assert_close(out[row : row + 1], causal_conv1d_update(x[row : row + 1], state, weight, bias))
        assert torch.equal(pool[entry : entry + 1], state)
    for untouched in (1, 2, 3, 5):
        assert torch.equal(pool[untouched], before[untouched])


def test_states_of_packed_sequences():
    x = torch.randn(11, 4)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 6, 6, 8, 11], dtype=torch.int32), 3)
    assert torch.equal(states[0], x[3:6].t())
    assert not states[1].any()
    assert torch.equal(states[2], F.pad(x[6:8].t(), (1, 0)))
    assert torch.equal(states[3], x[8:11].t())


def test_errors():
    x, weight, bias = problem()
    with pytest.raises(NotImplementedError, match=r'activation must be None, "silu" or "swish", got \'relu\''):
        causal_conv1d_fn(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"conv_state must hold at least width - 1 = 3 inputs, got 2"):
        causal_conv1d_update(x[..., 0], torch.zeros(2, 6, 2).double(), weight)
