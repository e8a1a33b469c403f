# SPDX-License-Identifier: Apache-2.0
"""A layer's scan state in 16 bits: allocated, prefilled, stepped, cached; and how far it drifts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from layer_support import make_layer, random_ids

import mixture_of_mamba as mom
from mixture_of_mamba.nn import PROJECTIONS

# All ways that a step goes: one operator, its steps one by one, a wide delta, and the scan of pairs.
OPTIONS = {
    "one operator": {},
    "dense": {"decouple": ()},
    "norms": {"bcdt_norm": True},
    "limits of delta": {"dt_limit": (0.01, 0.1)},
    "D per modality": {"decouple": (*PROJECTIONS, "D")},
    "A per modality": {"decouple": (*PROJECTIONS, "A_log")},
    "shared expert": {"shared_expert": PROJECTIONS},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
NARROW = (torch.bfloat16, torch.float16)


def layer_in(dtype, device="cpu", **options):
    """As it is after training in mixed precision and ``to(dtype)``, with A_log and D in float32."""
    layer = make_layer(**options)
    A_log, D = layer.A_log.detach().float(), layer.D.detach().float()
    layer.to(device, dtype)
    layer.A_log.data, layer.D.data = A_log.to(device), D.to(device)
    return layer


def prefilled(layer, tokens=6, batch=3):
    weight = layer.conv1d.weight
    x, ids = torch.randn(batch, tokens, 16).to(weight), random_ids(batch, tokens, 3)
    with torch.no_grad():
        return layer(x, ids, return_state=True)[1]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_allocated(dtype, device):
    layer = layer_in(dtype, device)
    usual, narrow = layer.allocate_state(2), layer.allocate_state(2, ssm_dtype=dtype)
    assert usual.ssm.dtype == torch.float32 and narrow.ssm.dtype == narrow.conv.dtype == dtype
    assert narrow.ssm.shape == usual.ssm.shape and narrow.ssm.device == layer.A_log.device and not narrow.ssm.any()
    assert layer.allocate_state(2, ssm_dtype=torch.float32).ssm.dtype == torch.float32
    assert layer.allocate_state(2, dtype=torch.float64, ssm_dtype=torch.float64).ssm.dtype == torch.float64
    other = make_layer().float().allocate_state(2, dtype=dtype, ssm_dtype=dtype)
    assert other.ssm.dtype == other.conv.dtype == dtype


@pytest.mark.parametrize(
    ("dtype", "ssm_dtype", "message"),
    [
        (torch.bfloat16, torch.float16, r"torch.float32 or torch.bfloat16 .* torch.bfloat16, got torch.float16"),
        (torch.float32, torch.bfloat16, r"torch.float32 beside activations of torch.float32, got torch.bfloat16"),
        (torch.float64, torch.float32, r"torch.float64 beside activations of torch.float64, got torch.float32"),
        (torch.float16, torch.int16, r"torch.float32 or torch.float16 .* got torch.int16"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(dtype, ssm_dtype, message):
    layer = make_layer()
    with pytest.raises(ValueError, match=rf"^ssm_dtype must be {message}$"):
        layer.allocate_state(2, dtype=dtype, ssm_dtype=ssm_dtype)
    with pytest.raises(ValueError, match=rf"^ssm_dtype must be {message}$"):
        layer.allocate_state(2, dtype=dtype).to(ssm_dtype=ssm_dtype)


@each_option
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_step_is_that_of_float32_rounded(options, length, dtype, device):
    layer = layer_in(dtype, device, **options)
    narrow = prefilled(layer).to(ssm_dtype=dtype)
    wide = mom.MambaState(narrow.conv.clone(), narrow.ssm.float())
    x, ids = torch.randn(3, length, 16, device=device, dtype=dtype), random_ids(3, length, 3)
    pointer = narrow.ssm.data_ptr()
    y, expected = layer.step(x, narrow, ids), layer.step(x, wide, ids)
    assert y.dtype == dtype and narrow.ssm.dtype == dtype and narrow.ssm.data_ptr() == pointer
    assert torch.equal(narrow.ssm, wide.ssm.to(dtype)) and torch.equal(narrow.conv, wide.conv)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@each_option
def test_padding_leaves_it_bitwise(options, device):
    layer = layer_in(torch.bfloat16, device, **options)
    state = prefilled(layer).to(ssm_dtype=torch.bfloat16)
    before = state.clone()
    layer.step(torch.randn(3, 2, 16, device=device).bfloat16(), state, torch.full((3, 2), -1))
    assert torch.equal(state.ssm, before.ssm) and torch.equal(state.conv, before.conv)


def test_another_16_bit_dtype_is_refused(device):
    for options in OPTIONS.values():
        layer = layer_in(torch.bfloat16, device, **options)
        state = layer.allocate_state(1)
        state.ssm = state.ssm.half()
        with pytest.raises((RuntimeError, ValueError), match=r"state.*must be .*float32 or .*bfloat16.* got .*float16"):
            layer.step(torch.zeros(1, 1, 16, device=device, dtype=torch.bfloat16), state, 0)


def test_under_autocast(device):
    """Activations have 16 bits, weights float32."""
    layer = make_layer().float().to(device)
    narrow = layer.allocate_state(2, dtype=torch.bfloat16, ssm_dtype=torch.bfloat16)
    wide = layer.allocate_state(2, dtype=torch.bfloat16)
    x = torch.randn(2, 1, 16, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, expected = layer.step(x, narrow, 1), layer.step(x, wide, 1)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    assert narrow.ssm.any() and torch.equal(narrow.ssm, wide.ssm.bfloat16())


@each_option
def test_a_chunk_goes_on_from_it(options, device):
    """And ends in float32."""
    layer = layer_in(torch.bfloat16, device, **options)
    narrow = prefilled(layer).to(ssm_dtype=torch.bfloat16)
    wide = narrow.to(ssm_dtype=torch.float32)
    x, ids = torch.randn(3, 7, 16, device=device).bfloat16(), random_ids(3, 7, 3)
    with torch.no_grad():
        y, last = layer(x, ids, state=narrow, return_state=True)
        expected, expected_last = layer(x, ids, state=wide, return_state=True)
    assert last.ssm.dtype == torch.float32
    assert torch.equal(y, expected) and torch.equal(last.ssm, expected_last.ssm)


@pytest.mark.parametrize("options", [{}, {"decouple": (*PROJECTIONS, "A_log")}], ids=["one operator", "pairs"])
def test_a_compiled_step(options, device):
    layer = layer_in(torch.bfloat16, device, **options)
    compiled = torch.compile(layer.step, backend="aot_eager", fullgraph=True)
    start = prefilled(layer).to(ssm_dtype=torch.bfloat16)
    x, routing = torch.randn(3, 1, 16).bfloat16(), mom.Routing.from_ids(random_ids(3, 1, 3), 3, device=device)
    x = x.to(device)
    state, expected_state = start.clone(), start.clone()
    y, expected = compiled(x, state, routing), layer.step(x, expected_state, routing)
    assert torch.equal(y, expected)
    assert torch.equal(state.ssm, expected_state.ssm) and not torch.equal(state.ssm, start.ssm)


def test_taken_to_another_dtype():
    layer = layer_in(torch.bfloat16)
    state = prefilled(layer)
    narrow = state.to(ssm_dtype=torch.bfloat16)
    assert torch.equal(narrow.ssm, state.ssm.bfloat16()) and narrow.conv is state.conv
    assert state.to(ssm_dtype=torch.float32).ssm is state.ssm
    both = narrow[[0, 2]].clone()
    assert both.ssm.dtype == torch.bfloat16
    narrow[[0, 2]] = state[[1, 0]]  # sequences that were prefilled, into a batch in 16 bits
    assert torch.equal(narrow[[0, 2]].ssm, state[[1, 0]].ssm.bfloat16())
    narrow[1:] = both
    assert torch.equal(narrow[1:].ssm, both.ssm)
    start = mom.MambaState(state.conv, state.ssm.requires_grad_())
    start.to(ssm_dtype=torch.bfloat16).ssm.float().sum().backward()
    assert torch.equal(state.ssm.grad, torch.ones_like(state.ssm))


def test_in_a_cache(device):
    """A state of 16 bits in the cache stays where it is and as it is: a prefill is rounded into it."""
    layer = layer_in(torch.bfloat16, device, layer_idx=0)
    state = layer.allocate_state(2, ssm_dtype=torch.bfloat16)
    params = SimpleNamespace(key_value_memory_dict={0: state}, seqlen_offset=0)
    x, ids = torch.randn(2, 9, 16, device=device).bfloat16(), random_ids(2, 9, 3)
    conv, ssm = state.conv, state.ssm
    with torch.no_grad():
        _, expected = layer(x[:, :8], ids[:, :8], return_state=True)
        layer(x[:, :8], ids[:, :8], inference_params=params)
        assert params.key_value_memory_dict[0] is state and state.conv is conv and state.ssm is ssm
        assert torch.equal(state.ssm, expected.ssm.bfloat16()) and torch.equal(state.conv, expected.conv)
        params.seqlen_offset = 8
        expected = expected.to(ssm_dtype=torch.bfloat16)
        y = layer(x[:, 8:], ids[:, 8:], inference_params=params)
        assert torch.equal(y, layer.step(x[:, 8:], expected, ids[:, 8:])) and torch.equal(state.ssm, expected.ssm)
        params.seqlen_offset = 0
        layer(x[:1], ids[:1], inference_params=params)  # another batch, in other tensors
    other = params.key_value_memory_dict[0]
    assert other.ssm.shape[0] == 1 and other.ssm.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_drift(dtype, most, device):
    """Of 400 steps from one state: what rounding it every time does, beside doing so once at the end."""
    torch.manual_seed(3)
    layer = layer_in(dtype, device)
    wide = prefilled(layer, batch=4)
    narrow = wide.clone().to(ssm_dtype=dtype)
    for _ in range(400):
        x, ids = torch.randn(4, 1, 16, device=device).to(dtype), random_ids(4, 1, 3, padding=False)
        y, expected = layer.step(x, narrow, ids), layer.step(x, wide, ids)
    error = (narrow.ssm.float() - wide.ssm).norm() / wide.ssm.norm()
    once = (wide.ssm.to(dtype).float() - wide.ssm).norm() / wide.ssm.norm()
    assert 2 * once < error < most, f"drifted by {error:.2e} where rounding once makes {once:.2e}"
    assert (y - expected).norm() < most * expected.norm()
