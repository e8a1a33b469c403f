# SPDX-License-Identifier: Apache-2.0
"""Masks, lists of positions and segments give the routing of the ids that they stand for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from layer_support import make_layer, random_ids

import mixture_of_mamba as mom
from mixture_of_mamba import Routing

SHAPES = [(1, 1), (3, 17), (2, 400), (0, 5), (2, 0)]


def masks_of(ids, modalities):
    return torch.stack([(ids == m).flatten() for m in range(modalities)])


def lists_of(ids, modalities):
    return [(ids.flatten() == m).nonzero().flatten() for m in range(modalities)]


def segments_of(ids, *, text=False):
    """The runs of equal ids in every row, in random order; without those of text unless asked for."""
    rows = []
    for row in ids.tolist():
        starts = [t for t in range(len(row)) if t == 0 or row[t] != row[t - 1]]
        runs = [(row[start], start, end - start) for start, end in pairwise([*starts, len(row)])]
        runs = [run for run in runs if text or run[0] != 0]
        rows.append([runs[i] for i in torch.randperm(len(runs)).tolist()])
    return rows


def assert_same(got: Routing, ids: torch.Tensor, modalities: int) -> None:
    """``got`` is the routing of ``ids``, device by device, and knows the boundaries if the ids were on the CPU."""
    wanted = Routing.from_ids(ids, modalities)
    assert got.shape == wanted.shape and got.num_modalities == modalities
    assert got.has_padding == wanted.has_padding
    for name in ("rows", "order", "offsets"):
        actual, expected = getattr(got, name), getattr(wanted, name)
        assert actual.device == expected.device and actual.dtype == torch.int32, name
        assert torch.equal(actual, expected), name
    assert (got.host_offsets is None) == (ids.device.type != "cpu")
    if got.host_offsets is not None:
        assert torch.equal(got.host_offsets, wanted.host_offsets)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_masks_are_their_ids(device, shape, modalities):
    ids = random_ids(*shape, modalities).to(device)
    masks = masks_of(ids, modalities)
    assert_same(Routing.from_masks(masks, shape), ids, modalities)
    assert_same(Routing.from_masks(masks.view(modalities, *shape), shape), ids, modalities)
    assert_same(Routing.from_masks(list(masks), shape), ids, modalities)
    strided = masks.T.contiguous().T
    assert_same(Routing.from_masks(strided, shape), ids, modalities)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_index_lists_are_their_ids(device, shape, modalities):
    ids = random_ids(*shape, modalities).to(device)
    lists = [p[torch.randperm(len(p), device=device)] for p in lists_of(ids, modalities)]
    assert_same(Routing.from_index_lists(lists, shape), ids, modalities)
    assert_same(Routing.from_index_lists([p.int() for p in lists], shape), ids, modalities)
    as_lists = [lists[0], *(p.tolist() for p in lists[1:])]  # positions without a device follow the tensors
    assert_same(Routing.from_index_lists(as_lists, shape), ids, modalities)
    assert_same(Routing.from_index_lists([p.tolist() for p in lists], shape), ids.cpu(), modalities)
    assert_same(Routing.from_index_lists([p.cpu().numpy() for p in lists], shape), ids.cpu(), modalities)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_segments_are_their_ids(shape, modalities):
    ids = random_ids(*shape, modalities, padding=False)
    for text in (False, True):
        segments = segments_of(ids, text=text)
        as_tensors = [torch.tensor(row, dtype=torch.int64).view(-1, 3) for row in segments]
        assert_same(Routing.from_segments(as_tensors, shape, num_modalities=modalities), ids, modalities)
        assert_same(Routing.from_segments(segments, shape, num_modalities=modalities), ids, modalities)
        shifted = [[(m - 1, offset, length) for m, offset, length in row] for row in segments]
        got = Routing.from_segments(shifted, shape, num_modalities=modalities, first_modality=1)
        assert_same(got, ids, modalities)


def test_types_of_transfusion_count_without_text():
    """The example of transfusion-pytorch's README, in a shorter sequence; rows of zeros pad its tensor form."""
    positions = [[(0, 2, 6), (1, 10, 4)], [(1, 2, 5), (0, 10, 3)]]
    ids = torch.zeros(2, 16, dtype=torch.int64)
    ids[0, 2:8], ids[0, 10:14], ids[1, 2:7], ids[1, 10:13] = 1, 2, 2, 1
    assert_same(Routing.from_segments(positions, (2, 16), num_modalities=3, first_modality=1), ids, 3)
    padded = torch.tensor([[*row, (0, 0, 0)] for row in positions]).tolist()
    assert_same(Routing.from_segments(padded, (2, 16), num_modalities=3, first_modality=1), ids, 3)


def test_adjacent_segments_and_empty_ones_inside_others():
    segments = [[(2, 3, 2), (1, 0, 3), (1, 1, 0), (2, 5, 0)], []]
    ids = torch.tensor([[1, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    assert_same(Routing.from_segments(segments, (2, 5), num_modalities=3), ids, 3)


@pytest.mark.parametrize("modalities", [2, 4])
def test_the_lowest_of_overlapping_masks_wins(device, modalities):
    masks = torch.rand(modalities, 3 * 50, device=device) < 0.5
    ids = torch.full((150,), -1)
    for token, column in enumerate(masks.T.tolist()):
        ids[token] = column.index(True) if any(column) else -1
    assert_same(Routing.from_masks(masks, (3, 50)), ids.view(3, 50).to(device), modalities)


def test_modalities_without_tokens(device):
    ids = torch.tensor([[1, -1, 1, 3]], device=device)
    assert_same(Routing.from_masks(masks_of(ids, 5), (1, 4)), ids, 5)
    assert_same(Routing.from_index_lists(lists_of(ids, 5), (1, 4)), ids, 5)
    assert_same(Routing.from_index_lists([[], [0, 2], [], [3], []], (1, 4)), ids.cpu(), 5)
    assert_same(Routing.from_segments([[(3, 1, 2)]], (1, 4), num_modalities=5), torch.tensor([[0, 3, 3, 0]]), 5)
    nothing = torch.full((1, 4), -1, device=device)
    assert_same(Routing.from_masks(masks_of(nothing, 2), (1, 4)), nothing, 2)
    assert_same(Routing.from_index_lists(lists_of(nothing, 2), (1, 4)), nothing, 2)


def test_checked_accepts_what_is_covered(device):
    ids = random_ids(2, 30, 3, padding=False).to(device)
    assert_same(Routing.from_masks(masks_of(ids, 3), (2, 30), checked=True), ids, 3)
    assert_same(Routing.from_index_lists(lists_of(ids, 3), (2, 30), checked=True), ids, 3)


def test_routing_for_another_device(device):
    """From the CPU to where the layers run, the boundaries staying behind."""
    ids = random_ids(2, 9, 3, padding=False)
    wanted = Routing.from_ids(ids, 3, device=device)
    for got in (
        Routing.from_masks(masks_of(ids, 3), (2, 9), device=device),
        Routing.from_index_lists(lists_of(ids, 3), (2, 9), device=device),
        Routing.from_segments(segments_of(ids), (2, 9), num_modalities=3, device=device),
    ):
        assert got.rows.device == got.order.device == got.offsets.device == wanted.rows.device
        assert torch.equal(got.rows, wanted.rows) and torch.equal(got.order, wanted.order)
        assert torch.equal(got.host_offsets, wanted.host_offsets)


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu():
    """Values on a GPU are not read: not even checked forms wait, and what would be an error is what is documented."""
    masks = torch.tensor([[True, False, True, False], [True, True, False, False]], device="cuda")
    lists = [torch.tensor([0, 2, 2, -1], device="cuda"), torch.tensor([0, 1, 4, 2**40], device="cuda")]
    layer, x = mom.MixtureOfMamba(8, 2).cuda(), torch.randn(1, 4, 8, device="cuda")
    layer(x, modality_masks=masks)  # the first call may set libraries up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        from_masks = Routing.from_masks(masks, (1, 4), checked=True)
        from_lists = Routing.from_index_lists(lists, (1, 4), checked=True)
        layer(x, modality_masks=masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ids = torch.tensor([[0, 1, 0, -1]], device="cuda")
    assert_same(from_masks, ids, 2)
    assert_same(from_lists, ids, 2)


def test_layer_takes_one_modality_for_all_tokens(device):
    layer = make_layer().float().to(device)
    x = torch.randn(2, 7, 16, device=device)
    for modality in (0, 1, 2, True, False):
        ids = torch.full((2, 7), int(modality))
        assert torch.equal(layer(x, modality), layer(x, ids))
        states = layer.allocate_state(2), layer.allocate_state(2)
        y = layer.step(x[:, :1], states[0], modality)
        assert torch.equal(y, layer.step(x[:, :1], states[1], ids[:, :1]))
        assert torch.equal(states[0].ssm, states[1].ssm) and torch.equal(states[0].conv, states[1].conv)


@pytest.mark.parametrize("decouple", [mom.nn.mixture_of_mamba.PROJECTIONS, ("x_proj",), ()], ids=str)
def test_layer_takes_masks(device, decouple):
    layer = make_layer(decouple=decouple).float().to(device)
    ids, x = random_ids(2, 19, 3).to(device), torch.randn(2, 19, 16, device=device)
    masks, wanted = masks_of(ids, 3), layer(x, ids)
    torch.testing.assert_close(layer(x, modality_masks=masks), wanted, atol=0, rtol=0)
    torch.testing.assert_close(layer(x, modality_masks=list(masks.view(3, 2, 19))), wanted, atol=0, rtol=0)
    torch.testing.assert_close(layer(x, 2), layer(x, torch.full((2, 19), 2)), atol=1e-5, rtol=1e-4)
    states = layer.allocate_state(2), layer.allocate_state(2)
    y = layer.step(x[:, :2], states[0], modality_masks=masks.view(3, 2, 19)[..., :2])
    assert torch.equal(y, layer.step(x[:, :2], states[1], ids[:, :2]))


@pytest.mark.parametrize("layer", [mom.Mamba(16), mom.MixtureOfMamba(16, 1)], ids=["dense", "one modality"])
def test_a_layer_of_one_modality_takes_the_forms_of_many(layer):
    """So that it may stand in for a mixture: as with ids, only padding makes a difference."""
    ids, x = random_ids(2, 9, 3), torch.randn(2, 9, 16)
    assert torch.equal(layer(x, modality_masks=masks_of(ids, 3)), layer(x, ids))
    for modality in (0, 2, True):
        torch.testing.assert_close(layer(x, modality), layer(x))


def test_masks_and_ints_compile_to_one_graph():
    layer = mom.MixtureOfMamba(16, 2)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    for length in (11, 25):
        ids, x = random_ids(2, length, 2), torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(x, modality_masks=masks_of(ids, 2)), layer(x, ids))
        torch.testing.assert_close(compiled(x, 1), layer(x, 1))


def masks(*shape):
    return torch.zeros(*shape, dtype=torch.bool)


ERRORS = {
    "masks of floats": (
        lambda: Routing.from_masks(torch.zeros(2, 6), (2, 3)),
        r"masks\[0\] must be a bool tensor, got torch.float32",
    ),
    "a mask that is a list": (
        lambda: Routing.from_masks([masks(6), [True] * 6], (2, 3)),
        r"masks\[1\] must be a bool tensor, got list",
    ),
    "no masks": (lambda: Routing.from_masks([], (2, 3)), r"masks must have one entry per modality, at least 1, got 0"),
    "masks that are None": (lambda: Routing.from_masks(None, (2, 3)), r"masks must be a tensor or a list.* NoneType"),
    "one bool": (
        lambda: Routing.from_masks(torch.tensor(True), (2, 3)),
        r"masks must be a tensor or a list .* torch.bool \[\]",
    ),
    "a mask of another length": (
        lambda: Routing.from_masks([masks(6), masks(2, 4)], (2, 3)),
        r"masks\[1\] must have shape .* = \[6\] or .* = \[2, 3\], got \[2, 4\]",
    ),
    "masks on two devices": (
        lambda: Routing.from_masks([masks(6), masks(6).to("meta")], (2, 3)),
        r"masks\[1\] must be on cpu as masks\[0\] is, got meta",
    ),
    "a token in no mask": (
        lambda: Routing.from_masks(torch.tensor([[1, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool(), (2, 3), checked=True),
        r"masks must cover every token when checked, got no modality for token 4 \(batch 1, position 1\)",
    ),
    "another shape": (lambda: Routing.from_masks(masks(2, 6), (6,)), r"shape must be \(batch, length\).* got \(6,\)"),
    "a negative shape": (
        lambda: Routing.from_masks(masks(2, 6), (-2, -3)),
        r"shape must be .* negative, got \(-2, -3\)",
    ),
    "a number as shape": (lambda: Routing.from_index_lists([[0]], 6), r"shape must be \(batch, length\).* got 6"),
    "no lists": (lambda: Routing.from_index_lists([], (2, 3)), r"lists must have one entry per modality.* got 0"),
    "a position too large": (
        lambda: Routing.from_index_lists([[0, 1], [2, 6]], (2, 3)),
        r"lists\[1\] must hold positions in 0 .. batch \* length - 1 = 5, got 6",
    ),
    "a negative position": (
        lambda: Routing.from_index_lists([torch.tensor([0, -1]), [2]], (2, 3)),
        r"lists\[0\] must hold positions in 0 .. batch \* length - 1 = 5, got -1",
    ),
    "a position in two lists": (
        lambda: Routing.from_index_lists([[0, 5], [1], [5, 2]], (2, 3)),
        r"lists must hold every position at most once, got position 5 in lists \[0, 2\]",
    ),
    "a position twice in one list": (
        lambda: Routing.from_index_lists([[0], [4, 1, 4]], (2, 3)),
        r"lists must hold every position at most once, got position 4 in lists \[1, 1\]",
    ),
    "a token in no list": (
        lambda: Routing.from_index_lists([[0, 1], [2, 4, 5]], (2, 3), checked=True),
        r"lists must cover every token when checked, got no modality for token 3 \(batch 1, position 0\)",
    ),
    "masks as lists": (
        lambda: Routing.from_index_lists(masks(2, 6), (2, 3)),
        r"lists\[0\] must hold integers \[positions\], got torch.bool \[6\]",
    ),
    "fractional positions": (
        lambda: Routing.from_index_lists([[0], [1.5]], (2, 3)),
        r"lists\[1\] must hold integers \[positions\], got torch.float32 \[1\]",
    ),
    "positions that are a word": (
        lambda: Routing.from_index_lists([[0], "text"], (2, 3)),
        r"lists\[1\] must be an integer tensor or a list of integers, got str",
    ),
    "positions that are None": (
        lambda: Routing.from_index_lists([[0], None], (2, 3)),
        r"lists\[1\] must be an integer tensor or a list of integers, got NoneType",
    ),
    "positions in two dimensions": (
        lambda: Routing.from_index_lists([torch.zeros(1, 2, dtype=torch.int64)], (2, 3)),
        r"lists\[0\] must hold integers \[positions\], got torch.int64 \[1, 2\]",
    ),
    "lists on two devices": (
        lambda: Routing.from_index_lists([torch.tensor([0]), torch.tensor([1], device="meta")], (2, 3)),
        r"lists\[1\] must be on cpu as the lists before it are, got meta",
    ),
    "rows of another batch": (
        lambda: Routing.from_segments([[]], (2, 9), num_modalities=2),
        r"segments must be a list with one list per row of the batch, 2, got 1",
    ),
    "segments that are None": (
        lambda: Routing.from_segments(None, (2, 9), num_modalities=2),
        r"segments must be a list with one list per row of the batch, 2, got NoneType",
    ),
    "a row that is None": (
        lambda: Routing.from_segments([[], None], (2, 9), num_modalities=2),
        r"segments\[1\] must be a list of triples \(modality, offset, length\), got NoneType",
    ),
    "a pair": (
        lambda: Routing.from_segments([[], [(2, 3)]], (2, 9), num_modalities=2),
        r"segments\[1\]\[0\] must be a triple of integers \(modality, offset, length\), got \(2, 3\)",
    ),
    "triples without rows": (
        lambda: Routing.from_segments([(1, 2, 3)], (1, 9), num_modalities=2),
        r"segments\[0\]\[0\] must be a triple of integers .*, got 1",
    ),
    "a fractional triple": (
        lambda: Routing.from_segments([[(1, 2, 3.0)]], (1, 9), num_modalities=2),
        r"segments\[0\]\[0\] must be a triple of integers .*, got \(1, 2, 3.0\)",
    ),
    "a modality out of range": (
        lambda: Routing.from_segments([[(1, 0, 1), (2, 2, 3)]], (1, 9), num_modalities=2),
        r"segments\[0\]\[1\] must have its modality in 0 .. num_modalities - 1 = 1, got 2",
    ),
    "a type out of range": (
        lambda: Routing.from_segments([[(1, 2, 3)]], (1, 9), num_modalities=2, first_modality=1),
        r"segments\[0\]\[0\] must have its modality \+ 1 in 0 .. num_modalities - 1 = 1, got 1 \+ 1",
    ),
    "a segment past the end": (
        lambda: Routing.from_segments([[(1, 7, 3)]], (1, 9), num_modalities=2),
        r"segments\[0\]\[0\] must lie in 0 .. length = 9 .*, got offset 7 and length 3",
    ),
    "a segment before the beginning": (
        lambda: Routing.from_segments([[(1, -1, 3)]], (1, 9), num_modalities=2),
        r"segments\[0\]\[0\] must lie in 0 .. length = 9 .*, got offset -1 and length 3",
    ),
    "a negative length": (
        lambda: Routing.from_segments([[(1, 4, -1)]], (1, 9), num_modalities=2),
        r"segments\[0\]\[0\] must lie in .* a length of at least 0, got offset 4 and length -1",
    ),
    "segments that overlap": (
        lambda: Routing.from_segments([[], [(1, 5, 2), (0, 8, 1), (1, 2, 4)]], (2, 9), num_modalities=2),
        r"segments\[1\] must not overlap, got token 5 in segments\[1\]\[2\] and segments\[1\]\[0\]",
    ),
    "no modality": (lambda: Routing.from_segments([[]], (1, 9), num_modalities=0), r"num_modalities must .* got 0"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


LAYER_ERRORS = {
    "both": (
        {"modality": torch.zeros(2, 3, dtype=torch.int64), "modality_masks": masks(2, 6)},
        r"modality_masks must come without modality, got both \(Tensor\)",
    ),
    "both, an int": ({"modality": 0, "modality_masks": masks(2, 6)}, r"modality_masks must .* got both \(int\)"),
    "an int too large": ({"modality": 2}, r"modality must lie in 0 .. num_modalities - 1 = 1 .*, got 2"),
    "a negative int": ({"modality": -1}, r"modality must lie in 0 .. num_modalities - 1 = 1 .*, got -1"),
    "a word": ({"modality": "text"}, r"modality must be ids .*, a Routing, an int or a bool, got str"),
    "another number of masks": ({"modality_masks": masks(3, 6)}, r"modality_masks must hold 2 masks, got 3"),
    "masks of another length": ({"modality_masks": masks(2, 5)}, r"modality_masks\[0\] must have shape .* got \[5\]"),
    "masks of bytes": (
        {"modality_masks": masks(2, 6).byte()},
        r"modality_masks\[0\] must be a bool .* got torch.uint8",
    ),
}


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_layer_errors(case):
    arguments, message = LAYER_ERRORS[case]
    with pytest.raises(ValueError, match=message):
        mom.MixtureOfMamba(8, 2)(torch.randn(2, 3, 8), **arguments)


def test_a_layer_of_one_modality_refuses_a_negative_int():
    with pytest.raises(ValueError, match=r"modality must lie in 0 .. num_modalities - 1 = 0 .*, got -1"):
        mom.Mamba(8)(torch.randn(2, 3, 8), -1)
