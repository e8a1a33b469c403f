# SPDX-License-Identifier: Apache-2.0
"""Second derivatives: a clear error from the operators, numbers from the reference."""

from __future__ import annotations

import pytest
import torch
from support import block_arguments, conv_arguments, linear_arguments, lower, scan_arguments

import mixture_of_mamba as mom
from mixture_of_mamba import reference

MAKERS = {
    "selective_scan": lambda **options: scan_arguments(1, 4, 3, 2, **options),
    "causal_conv1d": lambda **options: conv_arguments(1, 4, 3, 2, **options),
    "grouped_linear": lambda **options: linear_arguments(1, 4, 3, 2, **options),
    "mamba_block": lambda **options: block_arguments(1, 4, 3, 2, 2, 1, **options),
}
FIRST = {"selective_scan": "u", "causal_conv1d": "x", "grouped_linear": "x", "mamba_block": "x"}
PARAMETER = {"selective_scan": "A", "causal_conv1d": "weight", "grouped_linear": "weight", "mamba_block": "x_weight"}


def first_gradient(function, arguments):
    outputs = function(**arguments)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    leaf = arguments[FIRST[function.__name__]]
    return torch.autograd.grad((out * out).sum(), leaf, create_graph=True)[0]


@pytest.mark.parametrize("name", MAKERS)
def test_double_backward_raises(device, name):
    arguments = MAKERS[name](device=device)
    arguments[FIRST[name]].requires_grad_()
    gradient = first_gradient(getattr(mom, name), arguments)
    with pytest.raises(
        RuntimeError,
        match=rf"mixture_of_mamba::{name}_backward has no derivative: double backward is not supported; "
        r"mixture_of_mamba\.reference has differentiable versions",
    ):
        gradient.sum().backward()


@pytest.mark.parametrize("name", MAKERS)
def test_double_backward_of_parameters_raises(device, name):
    """Also where only a parameter was asked for, as in a gradient penalty on weights."""
    arguments = MAKERS[name](device=device)
    parameter = arguments[PARAMETER[name]]
    parameter = parameter[0] if isinstance(parameter, list) else parameter
    parameter.requires_grad_()
    outputs = getattr(mom, name)(**arguments)
    out = outputs[0] if isinstance(outputs, tuple) else outputs
    gradient = torch.autograd.grad((out * out).sum(), parameter, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", MAKERS)
def test_reference_has_second_derivatives(name):
    arguments = lower(MAKERS[name](dtype=torch.float64), torch.float64)
    leaf = arguments[FIRST[name]]

    def output(leaf):
        outputs = getattr(reference, name)(**{**arguments, FIRST[name]: leaf})
        return outputs[0] if isinstance(outputs, tuple) else outputs

    assert torch.autograd.gradgradcheck(lambda x: output(x) ** 2, leaf.requires_grad_())
