# SPDX-License-Identifier: Apache-2.0
"""A per modality: what it adds to the uses that test_shared_expert.py and test_reverse.py put it to."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from layer_support import is_one_operator, make_layer, random_ids
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba import checkpoints
from mixture_of_mamba.nn import PROJECTIONS

ALL = (*PROJECTIONS, "A_log", "D")
LAYERS = {
    "all": {"decouple": ALL},
    "A": {"decouple": ("A_log",)},
    "A and dt": {"decouple": ("dt_proj", "A_log"), "bcdt_norm": True, "dt_rank": 3},
    "A, limits": {"decouple": ("in_proj", "A_log", "D"), "dt_limit": (0.01, 0.05)},
}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


@each_layer
@pytest.mark.parametrize("reverse", [False, True])
def test_equal_rates_are_the_ordinary_layer(options, reverse, device):
    """Packed, padded, from a state and to a state, with the gradients of all of them."""
    layer = make_layer(**options)
    with torch.no_grad():
        layer.A_log.copy_(layer.A_log[1].clone())
    plain = make_layer(**options | {"decouple": tuple(name for name in options["decouple"] if name != "A_log")})
    plain.load_state_dict(layer.state_dict() | {"A_log": layer.A_log.detach()[0]})
    if device.type == "cuda":  # whose scans have no float64
        layer, plain = layer.float().to(device), plain.float().to(device)
    dtype = layer.conv1d.weight.dtype

    def results(of):
        state = mom.MambaState(conv.clone().requires_grad_(), ssm.clone().requires_grad_())
        leaves = {"x": x.clone().requires_grad_(), "conv": state.conv, "ssm": state.ssm, **dict(of.named_parameters())}
        y, last = of(leaves["x"], routing, cu_seqlens=bounds, state=state, return_state=True, reverse=reverse)
        outputs = {"y": y, "last conv": last.conv, "last ssm": last.ssm}
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [y_grad, conv_grad, ssm_grad])
        return outputs | {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    routing = mom.Routing.from_ids(random_ids(1, 40, 3), 3, device=device)
    bounds = torch.tensor([0, 11, 11, 38, 40], dtype=torch.int32, device=device)
    x, y_grad = torch.randn(2, 1, 40, 16, device=device, dtype=dtype)
    conv, conv_grad = torch.randn(2, 4, 3, 32, device=device, dtype=dtype)
    ssm, ssm_grad = torch.randn(2, 4, 32, 16, device=device, dtype=dtype)
    got, expected = results(layer), results(plain)
    got["gradient of A_log"] = got["gradient of A_log"].sum(0)
    tolerance = {} if dtype == torch.float64 else {"atol": 1e-3, "rtol": 1e-3}
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], **tolerance, msg=lambda m, name=name: f"{name}: {m}")


def test_finite_differences():
    layer = mom.MixtureOfMamba(3, 2, ALL, d_state=2, expand=1, dt_rank=2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    ids = torch.tensor([[1, -1, 0, 1]])
    names, values = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, ids))

    x = torch.randn(1, 4, 3).double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x, *values).square().sum(), layer.A_log)
    assert gradient.abs().amax((1, 2)).min() > 1e-2  # far above gradcheck's tolerance
    assert torch.autograd.gradcheck(function, (x, *values))


def test_what_padding_holds_reaches_no_gradient():
    layer, ids, x = make_layer(decouple=ALL), random_ids(2, 12, 3), torch.randn(2, 12, 16).double()

    def gradients(x):
        return torch.autograd.grad(layer(x, ids).square().sum(), list(layer.parameters()))

    garbage = x.masked_fill((ids < 0).unsqueeze(-1), float("nan"))
    for got, expected in zip(gradients(garbage), gradients(x), strict=True):
        assert torch.equal(got, expected)


def test_one_operator_is_not_used():
    x = torch.randn(1, 2, 16).double()
    assert not is_one_operator(make_layer(decouple=(*PROJECTIONS, "A_log")), x, None)
    assert is_one_operator(make_layer(), x, None)


def test_names_marks_and_initial_values():
    layer = mom.MixtureOfMamba(16, 2, ALL, d_state=3)
    assert layer.A_log.shape == (2, 32, 3) and layer.A_log.dtype == torch.float32
    torch.testing.assert_close(layer.A_log.exp(), torch.tensor([1.0, 2.0, 3.0]).expand(2, 32, 3))
    assert getattr(layer.A_log, "_no_weight_decay", False)
    assert "'A_log'" in repr(layer)
    assert layer.state_dict().keys() == mom.MixtureOfMamba(16, 2, d_state=3).state_dict().keys()


@pytest.mark.parametrize("decouple", [ALL, ("A_log",)], ids="+".join)
def test_upcycling_computes_the_same(decouple):
    dense = mom.Mamba(16).double()
    dense.A_log.requires_grad_(False)
    x, ids = torch.randn(2, 9, 16).double(), random_ids(2, 9, 3)
    layer = checkpoints.upcycle(dense, 2, decouple)
    assert torch.equal(layer.A_log, torch.stack([dense.A_log] * 2)) and not layer.A_log.requires_grad
    torch.testing.assert_close(layer(x, ids.clamp(max=1)), dense(x, ids))
    nn.init.normal_(layer.A_log)
    wider = checkpoints.add_modality(layer, like=0)
    assert torch.equal(wider.A_log, layer.A_log[[0, 1, 0]]) and vars(wider.A_log) == vars(layer.A_log)
    torch.testing.assert_close(wider(x, ids), layer(x, torch.where(ids == 2, 0, ids)))


@pytest.mark.parametrize("target", ["mamba_ssm", "published"])
def test_formats_without_it(target):
    state_dict = make_layer(decouple=("A_log",)).state_dict()
    with pytest.raises(ValueError, match=rf'A_log must be one .* the format "{target}", got \[3, 32, 16\]'):
        checkpoints.convert(state_dict, target=target)


def test_wrong_states_are_named():
    layer, x, ids = mom.MixtureOfMamba(16, 2, ("A_log",)), torch.randn(1, 2, 16), torch.zeros(1, 2, dtype=torch.int64)
    state = layer.allocate_state(1)
    wrong = mom.MambaState(state.conv, state.ssm.view(1, 16, 32))
    for call in (lambda: layer.step(x, wrong, ids), lambda: layer(x, ids, state=wrong)):
        with pytest.raises(ValueError, match=r"ssm must have .* d_inner = 32, d_state = 16\], got \[1, 16, 32\]"):
            call()
    strided = mom.MambaState(state.conv, torch.zeros(1, 16, 32).transpose(1, 2))
    with pytest.raises(ValueError, match=r"state.ssm must be contiguous, got strides \[512, 1, 32\]"):
        layer.step(x, strided, ids)


def test_one_graph_for_all_lengths():
    torch._dynamo.reset()
    layer = make_layer(decouple=ALL).float()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    for length in (150, 129, 200):
        x, routing = torch.randn(2, length, 16), mom.Routing.from_ids(random_ids(2, length, 3), 3)
        torch.testing.assert_close(compiled(x, routing), layer(x, routing), atol=1e-5, rtol=1e-4)
    assert graphs.frame_count == 1
    torch._dynamo.reset()
