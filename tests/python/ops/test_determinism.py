# SPDX-License-Identifier: Apache-2.0
"""The same bits from every run, whatever the number of threads and the neighbours in the batch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from block_support import composed_block
from support import assert_bitwise_equal, block_arguments, conv_arguments, linear_arguments, run, scan_arguments

import mixture_of_mamba as mom

RUNS = 3
CASES = {
    "scan": (mom.selective_scan, lambda **more: scan_arguments(3, 150, 70, 16, modalities=3, **more)),
    "scan, packed": (mom.selective_scan, lambda **more: scan_arguments(3, 150, 70, 16, packed=True, **more)),
    "scan, one long sequence": (mom.selective_scan, lambda **more: scan_arguments(1, 1500, 20, 5, **more)),
    "conv": (mom.causal_conv1d, lambda **more: conv_arguments(3, 400, 70, 4, modalities=3, **more)),
    "conv, packed": (mom.causal_conv1d, lambda **more: conv_arguments(3, 400, 70, 9, packed=True, **more)),
    "linear": (mom.grouped_linear, lambda **more: linear_arguments(3, 300, 48, 56, modalities=3, **more)),
    "block": (mom.mamba_block, lambda **more: block_arguments(3, 150, 40, 70, 16, 5, modalities=3, **more)),
    "block, packed, lean": (
        mom.mamba_block,
        lambda **more: block_arguments(3, 150, 40, 70, 16, 5, packed=True, lean=True, **more),
    ),
    "linear, device offsets": (
        mom.grouped_linear,
        lambda **more: linear_arguments(3, 300, 48, 56, modalities=3, host=False, **more),
    ),
}


@pytest.fixture
def restored_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_are_bitwise_equal(device, dtype, case):
    function, make = case
    arguments = make(dtype=dtype, device=device)
    expected = run(function, arguments)
    for _ in range(RUNS - 1):
        assert_bitwise_equal(run(function, arguments), expected)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith(("linear", "block"))])
def test_number_of_threads_changes_nothing(dtype, case):
    """Our kernels only: how a BLAS library cuts a product is its own affair, so the others are not here."""
    function, make = CASES[case]
    arguments = make(dtype=dtype)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(function, arguments))
    for other in results[1:]:
        assert_bitwise_equal(other, results[0])


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["block", "block, packed, lean"])
def test_number_of_threads_changes_no_block_where_it_changes_no_product(dtype, case):
    """A BLAS library may cut products by the number of threads. Where it does not, neither does the block."""
    function, make = CASES[case]
    arguments = make(dtype=dtype)
    products, blocks = [], []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        products.append(run(composed_block, arguments))
        blocks.append(run(function, arguments))
    if not all(torch.equal(products[1][name], value) for name, value in products[0].items()):
        pytest.skip("products of this BLAS library depend on the number of threads")
    assert_bitwise_equal(blocks[1], blocks[0])


@pytest.mark.parametrize("case", ["scan", "conv", "block"])
def test_strides_change_nothing(device, case):
    function, make = CASES[case]
    dense = make(device=device)
    wide = {}
    for name, value in dense.items():
        if name in ("u", "dt", "z", "x") and value is not None:
            value = torch.cat((torch.zeros_like(value), value), -1)[..., value.shape[-1] :]
        wide[name] = value
    assert_bitwise_equal(run(function, wide), run(function, dense))


@pytest.mark.parametrize("case", ["scan", "conv", "block"])
def test_inputs_are_not_written(device, case):
    function, make = CASES[case]
    arguments = make(device=device)

    def tensors():
        pairs = [(name, v) for name, v in arguments.items() if torch.is_tensor(v)]
        lists = [
            (f"{name}[{i}]", v) for name, vs in arguments.items() if isinstance(vs, list) for i, v in enumerate(vs)
        ]
        return dict(pairs + lists)

    before = {name: value.clone() for name, value in tensors().items()}
    run(function, arguments)
    assert_bitwise_equal(tensors(), before)


def test_routing_and_permutation(device):
    ids = torch.randint(-1, 5, (7, 4321), device=device)
    first, second = (mom.modality_routing(ids, 5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("case", [name for name in CASES if name != "linear"])
def test_streams_do_not_disturb_each_other(case):
    """Two calls at once on two streams give what one call alone gives."""
    function, make = CASES[case]
    arguments = make(device="cuda")
    expected = run(function, arguments, backward=False)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            results.append(run(function, arguments, backward=False))
    torch.cuda.synchronize()
    for result in results:
        assert_bitwise_equal(result, expected)
