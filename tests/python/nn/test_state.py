# SPDX-License-Identifier: Apache-2.0
"""States kept and put back, all or some sequences of them: what redoing a block of tokens needs."""

from __future__ import annotations

import pytest
import torch
from layer_support import make_layer, random_ids

import mixture_of_mamba as mom

CHOICES = {
    "list": [0, 2],
    "tensor": torch.tensor([2, 0]),
    "mask": torch.tensor([True, False, True]),
    "slice": slice(0, 3, 2),
}
each_choice = pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)


def random_state(sequences, layer=None):
    empty = (layer or make_layer()).allocate_state(sequences)
    return mom.MambaState(torch.randn_like(empty.conv), torch.randn_like(empty.ssm))


@each_choice
def test_some_sequences(chosen):
    state, other = random_state(3), random_state(2)
    before, pointers = state.clone(), (state.conv.data_ptr(), state.ssm.data_ptr())
    kept = state[chosen].clone()
    assert torch.equal(kept.conv, before.conv[chosen]) and torch.equal(kept.ssm, before.ssm[chosen])
    state[chosen] = other
    assert torch.equal(state[chosen].ssm, other.ssm) and torch.equal(state[chosen].conv, other.conv)
    assert torch.equal(state[[1]].ssm, before[[1]].ssm)
    state[chosen] = kept
    assert torch.equal(state.ssm, before.ssm) and torch.equal(state.conv, before.conv)
    assert pointers == (state.conv.data_ptr(), state.ssm.data_ptr())


def test_one_sequence_keeps_its_dimension():
    state = random_state(3)
    assert state[[1]].ssm.shape == (1, 32, 16)
    with pytest.raises(TypeError, match=r"sequences must be a slice, a list or a tensor, got 1; \[1\] keeps one"):
        state[1]
    with pytest.raises(TypeError, match=r"state must be a MambaState, got Tensor"):
        state[[1]] = state.ssm


def test_gradients_reach_a_part():
    layer, (x, ids) = make_layer(), (torch.randn(3, 5, 16).double(), random_ids(3, 5, 3))
    x.requires_grad_()
    _, state = layer(x, ids, return_state=True)
    y = layer(x[1:], ids[1:], state=state[1:])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert not gradient[0].any() and gradient[1:].any()


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_block_that_is_drawn_again(rounds, device):
    """Diffusion over a block of two of three sequences, while the third goes on with text: as if done once, cleanly."""
    layer = make_layer().float().to(device)
    prompt, text, clean = (torch.randn(3, length, 16, device=device) for length in (6, 4, 4))
    drawn = [0, 2]
    state = layer.allocate_state(3, device=device)
    layer.step(prompt, state, 0)
    kept = state[drawn]
    for _ in range(rounds):
        noisy = torch.where(
            torch.tensor([True, False, True], device=device).view(3, 1, 1), torch.randn_like(text), text
        )
        trial = state.clone()
        layer.step(noisy, trial, modality=random_ids(3, 4, 3))
        state[drawn] = trial[drawn]
        state[drawn] = kept
    ids = torch.tensor([[1] * 4, [0] * 4, [1] * 4])
    final = torch.where(torch.tensor([True, False, True], device=device).view(3, 1, 1), clean, text)
    y = layer.step(final, state, ids)
    whole_ids = torch.cat([torch.zeros(3, 6, dtype=torch.int64), ids], 1)
    with torch.no_grad():
        expected, last = layer(torch.cat([prompt, final], 1), whole_ids, return_state=True)
    torch.testing.assert_close(y, expected[:, 6:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state.ssm, last.ssm, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ssm_dtype", [None, torch.bfloat16])
def test_a_prefill_goes_on_under_autocast(ssm_dtype):
    layer = make_layer().float()
    x, ids = torch.randn(2, 7, 16), random_ids(2, 7, 3)
    with torch.no_grad():
        _, state = layer(x[:, :6], ids[:, :6], return_state=True)
        expected = layer(x, ids)[:, 6:]
    moved = state.to(dtype=torch.bfloat16, ssm_dtype=ssm_dtype)
    assert moved.conv.dtype == torch.bfloat16 and moved.ssm.dtype == (ssm_dtype or torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"state.conv must .* torch.bfloat16, got torch.float32: allocate_state"):
            layer.step(x[:, 6:], state, ids[:, 6:])
        y = layer.step(x[:, 6:], moved, ids[:, 6:])
    torch.testing.assert_close(y.float(), expected, atol=0.05, rtol=0.05)


def test_to():
    state = make_layer().float().allocate_state(2)
    same = state.to()
    assert same.conv is state.conv and same.ssm is state.ssm
    narrow = state.to(dtype=torch.bfloat16, ssm_dtype=torch.bfloat16)
    assert narrow.to().ssm.dtype == torch.bfloat16 and narrow.to(dtype=torch.float16).ssm.dtype == torch.float32
    assert state.to(dtype=torch.float64).ssm.dtype == torch.float64
    assert all(part.device.type == "meta" for part in vars(state.to("meta")).values())
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, AssertionError)):  # the first GPU, not the CPU
            state.to(0)
