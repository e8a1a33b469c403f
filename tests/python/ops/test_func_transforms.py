# SPDX-License-Identifier: Apache-2.0
"""torch.func: gradients of one level, per sample and of ensembles; what there is none of is an error, never zero."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import mixture_of_mamba as mom

LAYERS = {"one operator": {}, "step by step": {"bcdt_norm": True}}
each_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
SAMPLES = 3


def make(options):
    layer = mom.MixtureOfMamba(8, 2, **options).double()
    ids = torch.randint(-1, 2, (SAMPLES, 6))
    return layer, torch.randn(SAMPLES, 6, 8).double(), ids


def loss_of(layer):
    def loss(parameters, x, ids):
        return functional_call(layer, parameters, (x[None], ids[None])).square().sum()

    return loss


def assert_all_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def conv_problem():
    x, weight = torch.randn(2, 6, 8).double(), torch.randn(8, 4).double()
    return x, lambda w: mom.causal_conv1d(x, w)[0].square().sum(), weight


@each_layer
def test_per_sample_gradients(options):
    layer, x, ids = make(options)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    got = vmap(grad(loss_of(layer)), in_dims=(None, 0, 0))(parameters, x, ids)
    for s in range(SAMPLES):
        y = layer(x[s : s + 1], ids[s : s + 1])
        expected = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
        assert_all_close([gradient[s] for gradient in got.values()], expected)


@each_layer
def test_jacobian(options):
    layer, x, ids = make(options)
    expected = torch.autograd.functional.jacobian(lambda x: layer(x, ids), x)
    torch.testing.assert_close(jacrev(lambda x: layer(x, ids))(x), expected)


@each_layer
def test_an_ensemble_trains(options):
    """Parameters that are stacked and vmapped, with a backward pass outside."""
    layers = [make(options)[0] for _ in range(2)]
    _, x, ids = make(options)
    parameters, _ = stack_module_state(layers)
    y = vmap(lambda p: functional_call(layers[0], p, (x, ids)))(parameters)
    y.square().sum().backward()
    for i, layer in enumerate(layers):
        expected = layer(x, ids)
        torch.testing.assert_close(y[i], expected)
        grads = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
        assert_all_close([p.grad[i] for p in parameters.values()], grads)


def test_a_gradient_around_a_transform():
    """Of what a transform returns beside its gradient, with respect to a tensor outside."""
    x, loss, weight = conv_problem()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    _, value = grad_and_value(lambda w: loss(w * scale))(weight)
    (got,) = torch.autograd.grad(value, scale)
    (expected,) = torch.autograd.grad(loss(weight * scale), scale)
    torch.testing.assert_close(got, expected)
    # Nested, where each level needs the operator's first derivative only.
    inner = grad(lambda s, w: (mom.causal_conv1d(x, w)[0] * s).sum())
    got = grad(lambda w: inner(torch.ones((), dtype=torch.float64), w))(weight)
    torch.testing.assert_close(got, grad(lambda w: mom.causal_conv1d(x, w)[0].sum())(weight))


@pytest.mark.parametrize("second", [lambda f: grad(lambda w: grad(f)(w).sum()), lambda f: jacrev(jacrev(f))])
def test_second_derivatives_are_errors(second):
    _, loss, weight = conv_problem()
    with pytest.raises(RuntimeError, match="causal_conv1d_backward has no derivative: double backward"):
        second(loss)(weight)


def jvp_of(f):
    return lambda x: jvp(f, (x,), (torch.ones_like(x),))


def functions_of_x():
    """Each operator with a derivative, and layers: scalars of ``x [3, 6, 8]``."""
    index, dt = torch.randperm(18).int(), torch.rand(SAMPLES, 6, 8).double()
    A, B = -torch.rand(8, 4).double(), torch.randn(SAMPLES, 6, 4).double()
    offsets, weights = torch.tensor([0, 7, 18], dtype=torch.int32), [torch.randn(5, 8).double() for _ in range(2)]
    functions = {
        "permute_rows": lambda x: mom.permute_rows(x, index, index.argsort().int()),
        "grouped_linear": lambda x: mom.grouped_linear(x, weights, None, offsets),
        "causal_conv1d": lambda x: mom.causal_conv1d(x, torch.ones(8, 4).double())[0],
        "selective_scan": lambda x: mom.selective_scan(x, dt, A, B, B)[0],
    }
    for name, options in LAYERS.items():
        layer, _, ids = make(options)
        routing = mom.Routing.from_ids(ids, 2)
        functions[f"layer, {name}"] = lambda x, layer=layer, routing=routing: layer(x, routing, sorted=True)
    return {name: lambda x, f=f: f(x).square().sum() for name, f in functions.items()}


@pytest.mark.parametrize("name", functions_of_x())
def test_forward_mode_is_an_error(name):
    """Alone and over reverse mode, in whatever order they are nested."""
    f, x = functions_of_x()[name], torch.randn(SAMPLES, 6, 8).double()
    for transform in (jvp_of, jacfwd, lambda f: jvp_of(grad(f)), lambda f: jacfwd(grad(f)), hessian):
        with pytest.raises(RuntimeError, match=r"mixture_of_mamba::\w+ has no forward-mode derivative"):
            transform(f)(x)


def test_a_dual_gradient_is_an_error():
    layer, x, ids = make({})
    y = layer(x.requires_grad_(), ids)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y)))


def test_steps_refuse_dual_tensors():
    x, weight, state = torch.randn(1, 1, 4), torch.randn(4, 4), torch.zeros(1, 3, 4)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="causal_conv1d_step is for inference"):
        mom.causal_conv1d_step(forward_ad.make_dual(x, torch.ones_like(x)), state, weight)


def test_dual_tensors_are_an_error_in_lists_too():
    x, offsets = torch.randn(1, 5, 4), torch.tensor([0, 2, 5], dtype=torch.int32)
    weights = [torch.randn(3, 4), torch.randn(3, 4)]
    with forward_ad.dual_level():
        expected = mom.grouped_linear(x, weights, None, offsets)  # no tangent, no error
        weights[1] = forward_ad.make_dual(weights[1], torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="grouped_linear has no forward-mode derivative"):
            mom.grouped_linear(x, weights, None, offsets)
    assert expected.shape == (1, 5, 3)


def test_nothing_to_map_over():
    _, loss, weight = conv_problem()
    with pytest.raises(RuntimeError, match="must have a mapped dimension of at least 1, got 0"):
        vmap(loss)(weight.new_empty(0, *weight.shape))


def test_exported_without_gradients_then_trained():
    layer, x, ids = make({})
    with torch.no_grad():
        program = torch.export.export(layer, (x, ids), strict=False)
    leaf = x.clone().requires_grad_()
    program.module()(leaf, ids).square().sum().backward()
    other = x.clone().requires_grad_()
    layer(other, ids).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@each_layer
def test_compiled(options):
    """A graph is made for all that may be wanted of it, so its parameters must not want second derivatives."""
    layer, x, ids = make(options)
    layer.requires_grad_(False)
    function = grad(lambda x: layer(x, ids).square().sum())
    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x), function(x))


@each_layer
def test_compiled_autograd(options):
    layer, x, ids = make(options)
    leaves = [x.requires_grad_(), *layer.parameters()]
    expected = torch.autograd.grad(layer(x, ids).square().sum(), leaves)
    loss = layer(x, ids).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    assert_all_close([leaf.grad for leaf in leaves], expected)


def test_names_of_nodes():
    x, _, weight = conv_problem()
    assert mom.causal_conv1d(x, weight.requires_grad_())[0].grad_fn.name() == "causal_conv1dBackward"
