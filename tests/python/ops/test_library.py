# SPDX-License-Identifier: Apache-2.0
"""The loaded libraries: every operator with its backends, meta tensors, and calls from many Python threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import (
    assert_bitwise_equal,
    block_arguments,
    conv_arguments,
    linear_arguments,
    operator_arguments,
    run,
    scan_arguments,
)

import mixture_of_mamba as mom
from mixture_of_mamba import _library

OPS = torch.ops.mixture_of_mamba
MAKERS = {
    "selective_scan": scan_arguments,
    "causal_conv1d": conv_arguments,
    "grouped_linear": linear_arguments,
    "mamba_block": block_arguments,
}


@pytest.mark.parametrize("name", _library.OPERATORS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_operator_has_every_backend(name, key):
    """Without CUDA that backend is the explanation why."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mixture_of_mamba::{name}", key)


@pytest.mark.skipif(_library.cuda_problem() is None, reason="the operators run on CUDA tensors here")
@pytest.mark.parametrize("name", MAKERS)
def test_cuda_tensors_without_cuda_get_the_reason(name):
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    values = operator_arguments(name, MAKERS[name](), checkpoint=False, keep=False)
    with pytest.raises(RuntimeError, match=r"mixture_of_mamba cannot run on CUDA tensors: .*install|rebuild"):
        getattr(OPS, name).default.redispatch(cuda, *values)


def test_loading_again_does_nothing():
    _library.load()
    _library.load()


@pytest.mark.parametrize("name", MAKERS)
def test_meta_tensors_give_shapes(name):
    arguments = MAKERS[name](dtype=torch.bfloat16)
    on_meta = {
        key: [t.to("meta") for t in value]
        if isinstance(value, list)
        else value.to("meta")
        if torch.is_tensor(value) and key != "host_offsets"
        else value
        for key, value in arguments.items()
    }
    real, shapes = getattr(mom, name)(**arguments), getattr(mom, name)(**on_meta)
    pairs = zip(real, shapes, strict=True) if isinstance(real, tuple) else [(real, shapes)]
    for value, shape in pairs:
        assert shape.device.type == "meta"
        assert (shape.shape, shape.dtype, shape.stride()) == (value.shape, value.dtype, value.stride())


@pytest.mark.parametrize("name", MAKERS)
def test_calls_from_many_threads(name):
    function = getattr(mom, name)
    problems = [MAKERS[name](length=60 + i) for i in range(8)]
    expected = [run(function, arguments) for arguments in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for result, wanted in zip(pool.map(lambda a: run(function, a), problems), expected, strict=True):
                assert_bitwise_equal(result, wanted)


def test_deterministic_algorithms_are_what_we_have(device):
    """Nothing here needs to refuse, or to change, under torch.use_deterministic_algorithms."""
    functions = ("selective_scan", "causal_conv1d")
    cases = [(getattr(mom, name), MAKERS[name](packed=True, device=device)) for name in functions]
    expected = [run(function, arguments) for function, arguments in cases]
    torch.use_deterministic_algorithms(True)
    try:
        for (function, arguments), wanted in zip(cases, expected, strict=True):
            assert_bitwise_equal(run(function, arguments), wanted)
    finally:
        torch.use_deterministic_algorithms(False)
