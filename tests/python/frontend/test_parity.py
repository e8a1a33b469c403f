# SPDX-License-Identifier: Apache-2.0
"""The C++ modules against the Python ones: initial values, forward, every gradient, states, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import mixture_of_mamba as mom
from mixture_of_mamba import models
from mixture_of_mamba.nn import PROJECTIONS

SUBSETS = [subset for n in range(5) for subset in itertools.combinations(PROJECTIONS, n)]


def pair(cpp: Any, d_model: int = 8, modalities: int = 3, decouple: tuple[str, ...] = PROJECTIONS, **options: Any):
    """A Python layer in float64 with random parameters, and the C++ layer with the same."""
    ours = mom.MixtureOfMamba(d_model, modalities, decouple, **options).double()
    theirs = cpp.MixtureOfMamba(d_model, modalities, list(decouple), **options)
    theirs.double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        parameters = dict(theirs.named_parameters())
        assert set(parameters) == {name for name, _ in ours.named_parameters()}
        for name, parameter in ours.named_parameters():
            parameters[name].copy_(parameter)
    return ours, theirs


# Where the block is one operator all bits agree. Elsewhere the Python layer takes A in float32.
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-6, "atol": 1e-7}


def assert_same(ours: Any, theirs: Any, x: torch.Tensor, modality: Any, cu_seqlens=None, state=None) -> None:
    """Outputs, final states, and gradients of all of them with respect to all parameters, x and the state."""
    one_operator = ours.dt_limit is None and ours.b_layernorm is None and not {"A_log", "D"} & set(ours.decouple)
    tolerance = EXACT if one_operator else CLOSE
    mom_state = None if state is None else mom.MambaState(*state)
    y, new_state = ours(x, modality, cu_seqlens=cu_seqlens, state=mom_state, return_state=True)
    outputs = (y, new_state.conv, new_state.ssm)
    arguments = () if modality is None else (modality,)
    cpp_outputs = theirs.forward(x, *arguments, cu_seqlens=cu_seqlens, state=state)
    for ours_out, theirs_out in zip(outputs, cpp_outputs, strict=True):
        torch.testing.assert_close(theirs_out, ours_out, **tolerance)
    weights = [torch.randn_like(output) for output in outputs]
    names = [name for name, _ in ours.named_parameters()]
    theirs_parameters = dict(theirs.named_parameters())
    more = [x, *(state or ())]
    expected = torch.autograd.grad(outputs, [*ours.parameters(), *more], weights, materialize_grads=True)
    leaves = [*(theirs_parameters[name] for name in names), *more]
    got = torch.autograd.grad(cpp_outputs, leaves, weights, materialize_grads=True)
    for name, a, b in zip([*names, "x", "conv state", "ssm state"], got, expected, strict=False):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("decouple", SUBSETS, ids=lambda n: "+".join(p.removesuffix("_proj") for p in n) or "none")
def test_every_subset(cpp, decouple):
    ours, theirs = pair(cpp, decouple=decouple, bias=len(decouple) % 2 == 0)
    x, ids = torch.randn(2, 9, 8).double().requires_grad_(), torch.randint(-1, 3, (2, 9))
    assert_same(ours, theirs, x, ids)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "lean"},
        {"conv_bias": False, "d_conv": 2},
        {"d_state": 5, "dt_rank": 3},
        {"expand": 1.5},
        {"bcdt_norm": True},
        {"dt_limit": (0.01, 0.1)},
        {"bcdt_norm": True, "dt_limit": (0.0, 0.05), "decouple": ("in_proj", "out_proj")},
        {"decouple": ("D",)},
        {"decouple": (*PROJECTIONS, "A_log")},
        {"decouple": ("dt_proj", "A_log", "D"), "dt_limit": (0.01, 0.1)},
        {"shared_expert": PROJECTIONS, "bias": True},
        {"decouple": ("in_proj", "x_proj", "D"), "shared_expert": ("x_proj",)},
    ],
    ids=str,
)
def test_options(cpp, options):
    ours, theirs = pair(cpp, **options)
    assert_same(ours, theirs, torch.randn(2, 7, 8).double().requires_grad_(), torch.randint(-1, 3, (2, 7)))


@pytest.mark.parametrize("options", [{}, {"shared_expert": PROJECTIONS, "dt_limit": (0.01, 0.1)}, {"decouple": ("D",)}])
def test_one_modality_without_ids(cpp, options):
    ours, theirs = pair(cpp, modalities=1, **options)
    assert_same(ours, theirs, torch.randn(2, 7, 8).double().requires_grad_(), None)


def test_packing_padding_and_states(cpp):
    ours, theirs = pair(cpp)
    x, ids = torch.randn(1, 12, 8).double().requires_grad_(), torch.randint(-1, 3, (1, 12))
    cu_seqlens = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    conv = torch.randn(3, 3, 16).double().requires_grad_()
    ssm = torch.randn(3, 16, 16).double().requires_grad_()
    assert_same(ours, theirs, x, ids, cu_seqlens=cu_seqlens, state=(conv, ssm))
    assert_same(ours, theirs, x, torch.full_like(ids, -1))
    assert_same(ours, theirs, x, 1)


def test_dense(cpp):
    ours, theirs = pair(cpp, modalities=1, decouple=())
    x = torch.randn(2, 5, 8).double().requires_grad_()
    assert_same(ours, theirs, x, None)
    assert_same(ours, theirs, x, torch.randint(-1, 3, (2, 5)))


def test_steps_of_a_scan_state_in_16_bits(cpp):
    ours, theirs = pair(cpp)
    ours.bfloat16(), theirs.bfloat16()
    state, (conv, ssm) = (layer.allocate_state(2, ssm_dtype=torch.bfloat16) for layer in (ours, theirs))
    assert conv.dtype == ssm.dtype == torch.bfloat16
    for _ in range(6):
        x, ids = torch.randn(2, 1, 8).bfloat16(), torch.randint(-1, 3, (2, 1))
        assert torch.equal(theirs.step(x, conv, ssm, ids), ours.step(x, state, ids))
        assert torch.equal(conv, state.conv) and torch.equal(ssm, state.ssm)


@pytest.mark.parametrize(
    "options", [{}, {"decouple": (*PROJECTIONS, "A_log", "D")}, {"shared_expert": PROJECTIONS}], ids=str
)
def test_steps(cpp, options):
    ours, theirs = pair(cpp, **options)
    state, cpp_state = ours.allocate_state(2), ours.allocate_state(2)
    for _ in range(6):
        x, ids = torch.randn(2, 1, 8).double(), torch.randint(-1, 3, (2, 1))
        got = theirs.step(x, cpp_state.conv, cpp_state.ssm, ids)
        torch.testing.assert_close(got, ours.step(x, state, ids), **CLOSE)
        torch.testing.assert_close(cpp_state.conv, state.conv, **CLOSE)
        torch.testing.assert_close(cpp_state.ssm, state.ssm, **CLOSE)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "dt_init": "constant"}, {"bcdt_norm": True}, {"shared_expert": ()}], ids=str
)
@pytest.mark.parametrize("decouple", [(), PROJECTIONS, ("x_proj", "dt_proj", "A_log", "D")], ids=len)
def test_initial_values_seed_for_seed(cpp, decouple, options):
    if "shared_expert" in options:  # of all that may have one
        options = {"shared_expert": [name for name in decouple if name in PROJECTIONS]}
    torch.manual_seed(1)
    expected = dict(mom.MixtureOfMamba(16, 2, decouple, **options).named_parameters())
    after = torch.rand(1)
    torch.manual_seed(1)
    got = dict(cpp.MixtureOfMamba(16, 2, list(decouple), **options).named_parameters())
    assert torch.equal(torch.rand(1), after)
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((8, 0, []), {}),
        ((0, 2, []), {}),
        ((8, 2, ["in_proj", "conv"]), {}),
        ((8, 2, ["D", "D"]), {}),
        ((8, 2, ["x_proj", "D"]), {"shared_expert": ["D"]}),
        ((8, 2, []), {"shared_expert": ["in_proj"]}),
        ((8, 2, ["in_proj"]), {"shared_expert": ["in_proj", "in_proj"]}),
        ((8, 2, []), {"d_state": 0}),
        ((8, 2, []), {"dt_rank": 0}),
        ((8, 2, []), {"expand": 0.1}),
        ((8, 2, []), {"dt_min": 0.2}),
        ((8, 2, []), {"dt_init": "zero"}),
        ((8, 2, []), {"memory": "none"}),
        ((8, 2, []), {"dt_limit": (0.2, 0.1)}),
        ((8, 2, []), {"dt_limit": (-1.0, 0.1)}),
    ],
    ids=str,
)
def test_errors_of_construction(cpp, arguments, options):
    with pytest.raises(ValueError) as expected:
        mom.MixtureOfMamba(*arguments, **options)
    with pytest.raises(ValueError) as got:
        cpp.MixtureOfMamba(*arguments, **options)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2, 3, 5), 0),
        (torch.zeros(3, 8), 0),
        (torch.zeros(2, 3, 8, dtype=torch.int64), 0),
        (torch.zeros(2, 3, 8),),
        (torch.zeros(2, 3, 8), 2),
        (torch.zeros(2, 3, 8), -1),
        (torch.zeros(2, 3, 8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 3, 8), torch.zeros(3, 2, dtype=torch.int64)),
        (torch.zeros(2, 3, 8), torch.full((2, 3), 5)),
        (torch.zeros(2, 3, 8), torch.zeros(2, 3)),
    ],
    ids=lambda a: str([getattr(v, "shape", v) for v in a]),
)
def test_errors_of_calls(cpp, arguments):
    with pytest.raises((ValueError, RuntimeError)) as expected:
        mom.MixtureOfMamba(8, 2)(*arguments)
    with pytest.raises(type(expected.value)) as got:
        cpp.MixtureOfMamba(8, 2, list(PROJECTIONS)).forward(*arguments)
    assert str(got.value) == str(expected.value)


RANGES = [(12, None, None, None), (8, 3, 4, 5), (6, 5, 6, None)]
MODELS = [
    {},
    {"tied": True, "mixers_per_layer": 1, "decouple": ()},
    {"num_modalities": 3, "decouple": ("in_proj", "out_proj"), "d_state": 4, "norm_eps": 1e-3, "memory": "lean"},
    {"decouple": ("in_proj", "dt_proj", "A_log", "D"), "shared_expert": ("in_proj",), "bcdt_norm": True},
    {"dt_limit": (0.01, 0.2), "shared_expert": ("out_proj", "x_proj")},
]


def pair_of_models(cpp: Any, tied: bool = False, **options: Any):
    """A Chameleon of Python and one of C++, made from one seed."""
    modalities = options.get("num_modalities", 2)
    names = ("text", "image", "speech")
    ranges = [models.TokenRange(name, *one) for name, one in zip(names, RANGES[:modalities], strict=False)]
    torch.manual_seed(2)
    ours = models.Chameleon(models.DecoderConfig(16, 2, **options), models.Vocabulary(tuple(ranges)), tied=tied)
    after = torch.rand(1)
    torch.manual_seed(2)
    theirs = cpp.Chameleon(16, 2, RANGES[:modalities], tied=tied, **options)
    assert torch.equal(torch.rand(1), after)
    return ours, theirs


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_models_have_the_names_order_and_initial_values_of_python(cpp, options):
    ours, theirs = pair_of_models(cpp, **options)
    expected, got = list(ours.named_parameters()), theirs.named_parameters()
    assert [name for name, _ in got] == [name for name, _ in expected]
    for (name, value), (_, other) in zip(expected, got, strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=0, msg=name)


@pytest.mark.parametrize("options", MODELS, ids=str)
def test_models_have_the_losses_gradients_and_states_of_python(cpp, options):
    ours, theirs = pair_of_models(cpp, **options)
    with torch.no_grad():
        for parameter, (_, other) in zip(ours.parameters(), theirs.named_parameters(), strict=True):
            other.copy_(parameter.add_(torch.randn_like(parameter) * 0.1))
    tokens = torch.randint(-1, ours.vocabulary.size, (2, 9))
    for cu_seqlens in (None, torch.tensor([0, 5, 5, 18], dtype=torch.int32)):
        expected = ours.loss(tokens, cu_seqlens=cu_seqlens)
        got = theirs.loss(tokens, cu_seqlens=cu_seqlens)
        sums = (expected.cross_entropy, expected.z, expected.count, expected.total(), expected.means())
        torch.testing.assert_close(got, sums)
        grads = torch.autograd.grad(expected.total(), list(ours.parameters()))
        leaves = [parameter for _, parameter in theirs.named_parameters()]
        for (name, _), a, b in zip(ours.named_parameters(), torch.autograd.grad(got[3], leaves), grads, strict=True):
            torch.testing.assert_close(a, b, msg=name)
    real = tokens >= 0
    logits, states = theirs.forward(tokens[:, :5])
    expected_logits, state = ours(tokens[:, :5], return_state=True)
    torch.testing.assert_close(logits[real[:, :5]], expected_logits[real[:, :5]])
    torch.testing.assert_close(states, [(one.conv, one.ssm) for one in state.mamba])
    logits, _ = theirs.forward(tokens[:, 5:], states=states)
    torch.testing.assert_close(logits[real[:, 5:]], ours(tokens)[:, 5:][real[:, 5:]])


@pytest.mark.parametrize(
    "options",
    [
        {"mixers_per_layer": 0},
        {"d_state": -1},
        {"norm_eps": 0.0},
        {"memory": "none"},
        {"decouple": ("in_proj", "A_log", "conv")},
        {"num_modalities": 3},
    ],
    ids=str,
)
def test_errors_of_models(cpp, options):
    with pytest.raises(ValueError) as expected:
        models.Chameleon(
            models.DecoderConfig(16, 2, **options),
            models.Vocabulary((models.TokenRange("text", *RANGES[0]), models.TokenRange("image", *RANGES[1]))),
        )
    with pytest.raises(ValueError) as got:
        cpp.Chameleon(16, 2, RANGES[:2], **options)
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize(
    "ranges",
    [
        [],
        [(0, None, None, None)],
        [(5, 1, None, None)],
        [(5, None, None, None), (3, 5, 1, None)],
        [(5, None, None, None), (3, 1, None, None)],
        [(5, None, None, None), (3, 1, 1, None)],
        [(5, None, None, None), (3, 1, 2, 0)],
    ],
    ids=str,
)
def test_errors_of_vocabularies(cpp, ranges):
    with pytest.raises(ValueError) as expected:
        models.Vocabulary(tuple(models.TokenRange("any", *one) for one in ranges))
    with pytest.raises(ValueError) as got:
        cpp.Chameleon(16, 2, ranges, num_modalities=max(len(ranges), 1))
    assert str(got.value) == str(expected.value)


@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64)], ids=str)
def test_errors_of_a_model_s_calls(cpp, tokens):
    ours, theirs = pair_of_models(cpp)
    with pytest.raises(ValueError) as expected:
        ours.loss(tokens)
    with pytest.raises(ValueError) as got:
        theirs.loss(tokens)
    assert str(got.value) == str(expected.value)
