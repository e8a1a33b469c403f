# SPDX-License-Identifier: Apache-2.0
"""Wrong arguments are named, with what was required and what came: one table for layers, routings and checkpoints.

The operators' own checks have a table each in ``tests/python/ops``; here they are met through what is above them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mixture_of_mamba as mom
from mixture_of_mamba import Routing, checkpoints


def make(**options):
    return mom.MixtureOfMamba(**({"d_model": 8, "num_modalities": 2} | options))


X, IDS = torch.randn(2, 5, 8), torch.zeros(2, 5, dtype=torch.int64)
ROUTING = Routing.from_ids(IDS, 2)
MASKS = torch.tensor([[True, False] * 5, [False, True] * 5])
STATE = make().allocate_state(2)
OPEN = make().state_dict()


def call(**changes):
    return make()(**({"x": X, "modality": IDS} | changes))


def step(**changes):
    arguments = {"x": X[:, :1], "state": make().allocate_state(2), "modality": IDS[:, :1]}
    return make().step(**(arguments | changes))


def cached(params, **others):
    return make(layer_idx=others.pop("layer_idx", 5))(X, 0, inference_params=params, **others)


def cache(seqlen_offset=0):
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=seqlen_offset)


def state(conv=None, ssm=None):
    return mom.MambaState(STATE.conv if conv is None else conv, STATE.ssm if ssm is None else ssm)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def segments(*triples, **options):
    return Routing.from_segments([list(triples)], (1, 5), **({"num_modalities": 2} | options))


CONSTRUCTION = [
    (lambda: make(d_model=0), r"d_model must be at least 1, got 0"),
    (lambda: make(d_model=8.0), r"d_model must be an integer, got 8.0"),
    (lambda: make(num_modalities=0), r"num_modalities must be at least 1, got 0"),
    (lambda: make(num_modalities="2"), r"num_modalities must be an integer, got '2'"),
    (lambda: make(d_state=0), r"d_state must be at least 1, got 0"),
    (lambda: make(d_conv=-1), r"d_conv must be at least 1, got -1"),
    (lambda: make(expand=0), r"expand must make d_inner = expand \* d_model at least 1, got 0"),
    (lambda: make(expand="2"), r"expand must make d_inner .* got '2'"),
    (lambda: make(dt_rank=0), r"dt_rank must be at least 1, got 0"),
    (lambda: make(dt_rank="full"), r"dt_rank must be an integer or \"auto\", got 'full'"),
    (lambda: make(dt_min=0.2), r"dt_min and dt_max must have 0 < dt_min <= dt_max, got 0.2 and 0.1"),
    (lambda: make(dt_min=0.0), r"dt_min and dt_max must have 0 < dt_min <= dt_max, got 0.0 and 0.1"),
    (lambda: make(dt_init="uniform"), r"dt_init must be \"random\" or \"constant\", got 'uniform'"),
    (lambda: make(dt_limit=(0.1, 0.01)), r"dt_limit must have 0 <= low < high, got \(0.1, 0.01\)"),
    (lambda: make(memory="low"), r"memory must be \"default\" or \"lean\", got 'low'"),
    (lambda: mom.Mamba(8, memory=None), r"memory must be \"default\" or \"lean\", got None"),
    (lambda: make(dtype=torch.int32), r"dtype must be a floating type, got torch.int32"),
    (lambda: make(dtype="bfloat16"), r"dtype must be a floating type, got 'bfloat16'"),
    (lambda: make(dtype=torch.float8_e5m2), r"dtype must have at least 16 bits, got torch.float8_e5m2"),
    (lambda: make(decouple=("in_proj", "conv")), r"decouple must name projections among .* got \['conv'\]"),
    (lambda: make(decouple="in_proj"), r"decouple must be a list of names among .* got 'in_proj'"),
    (lambda: make(decouple=["in_proj"] * 2), r"decouple must name each projection at most once, got \['in_proj', 'in_"),
    (lambda: make(shared_expert=True), r"shared_expert must be a list of names among .* got True"),
    (
        lambda: make(decouple=("in_proj", "D"), shared_expert=("D",)),
        r"shared_expert must name projections among \('in_proj',\), got \['D'\]",
    ),
    (lambda: mom.ModalityLinear(3, 4, 0), r"num_modalities must be at least 1, got 0"),
    (lambda: make().allocate_state(-1), r"batch must be an integer of at least 0, got -1"),
    (lambda: make().allocate_state(2.0), r"batch must be an integer of at least 0, got 2.0"),
    (lambda: make().allocate_state(2, dtype=torch.int8), r"dtype must be a floating type, got torch.int8"),
]

CALLS = [
    (lambda: call(x=[1.0]), r"x must be a tensor of a floating type, got list"),
    (lambda: call(x=X.long()), r"x must be a tensor of a floating type, got torch.int64 \[2, 5, 8\]"),
    (lambda: call(x=X[..., :7]), r"x must have shape \[batch, length, d_model = 8\], got \[2, 5, 7\]"),
    (lambda: call(x=X[0]), r"x must have shape \[batch, length, d_model = 8\], got \[5, 8\]"),
    (lambda: call(modality=None), r"modality must be ids \[batch, length\] or a Routing.* 2 modalities, got None"),
    (lambda: call(modality=[0, 1]), r"modality must be ids .*, a Routing, an int or a bool, got list"),
    (lambda: call(modality=IDS[:, :4]), r"modality must have the batch and length of x, \[2, 5\], got \[2, 4\]"),
    (lambda: call(modality=IDS.unsqueeze(-1)), r"ids must be a tensor of shape \[batch, length\], got .*\[2, 5, 1\]"),
    (lambda: call(modality=IDS.float()), r"ids must be an integer tensor, got float32"),
    (lambda: call(modality=IDS.bool()), r"ids must be an integer tensor, got bool"),
    (lambda: call(modality=IDS + 2), r"ids must lie in -1 .. num_modalities - 1 = 1 .* got 2"),
    (lambda: call(modality=2), r"modality must lie in 0 .. num_modalities - 1 = 1 when it is an int, got 2"),
    (lambda: call(modality=-1), r"modality must lie in 0 .. num_modalities - 1 = 1 when it is an int, got -1"),
    (lambda: call(modality=Routing.from_ids(IDS, 3)), r"modality must be a Routing of 2 modalities, got 3"),
    (
        lambda: call(modality=Routing.from_ids(IDS[:1], 2)),
        r"modality must have the batch and length of x.*got \[1, 5\]",
    ),
    (lambda: call(modality_masks=MASKS), r"modality_masks must come without modality, got both \(Tensor\)"),
    (lambda: make()(X, modality_masks=MASKS[[0, 1, 1]]), r"modality_masks must hold 2 masks, got 3"),
    (
        lambda: make()(X, modality_masks=MASKS.int()),
        r"modality_masks\[0\] must be a bool tensor, got torch.int32 \[10\]",
    ),
    (lambda: make()(X, modality_masks=MASKS[:, 1:]), r"modality_masks\[0\] must have shape \[batch .* got \[9\]"),
    (lambda: call(cu_seqlens=torch.tensor([0.0, 10.0])), r"cu_seqlens must be int32.* got float32"),
    (lambda: call(cu_seqlens=[0, 10]), r"cu_seqlens must be an int32 tensor \[sequences \+ 1\], got list"),
    (lambda: ROUTING.reversed([0, 10]), r"cu_seqlens must be a tensor of shape .* got list"),
    (lambda: call(x=torch.nested.nested_tensor([X[0], X[1, :3]])), r"x must not be a nested tensor: .* cu_seqlens"),
    (lambda: call(cu_seqlens=int32(0, 9)), r"cu_seqlens must end with 10 \(batch \* length\), got 9"),
    (lambda: call(cu_seqlens=int32(1, 10)), r"cu_seqlens must begin with 0, got 1"),
    (lambda: call(cu_seqlens=int32(0, 7, 3, 10)), r"cu_seqlens must not decrease, got 7 before 3 at position 2"),
    (lambda: call(cu_seqlens=int32(0, 10).view(1, 2)), r"cu_seqlens must have one dimension, got shape \[1, 2\]"),
    (lambda: call(state=(STATE.conv, STATE.ssm)), r"state must be a MambaState .* got tuple"),
    (lambda: call(state=make().allocate_state(3)), r"conv_state must have shape .* \[2, 3, 16\], got \[3, 3, 16\]"),
    (
        lambda: call(state=STATE, cu_seqlens=int32(0, 3, 5, 10)),
        r"conv_state must have shape .*\[3, 3, 16\], got \[2, 3",
    ),
    (lambda: call(state=state(ssm=STATE.ssm[..., :3])), r"ssm_state must have shape .*\[2, 16, 16\], got \[2, 16, 3\]"),
    (lambda: call(state=state(conv=STATE.conv.int())), r"conv_state must be float32, .* got int32"),
    (lambda: step(state=None), r"state must be a MambaState .* got NoneType"),
    (lambda: make().step(X[:, :1], STATE.conv, STATE.ssm), r"state must be a MambaState .* got Tensor"),
    (lambda: step(x=X[:, 0]), r"x must have shape \[batch, length, d_model = 8\], got \[2, 8\]"),
    (lambda: step(state=make().allocate_state(1)), r"state must have shape .* \[2, 3, 16\], got \[1, 3, 16\]"),
    (lambda: step(state=state(ssm=STATE.ssm.bfloat16())), r"state .* must be contiguous float32, got .* bfloat16"),
    (
        lambda: step(state=state(conv=STATE.conv.double())),
        r"state.conv must have the dtype of the activations .*float32, got torch.float64: allocate_state\(",
    ),
    (lambda: step(state=state(conv=STATE.conv.mT.contiguous().mT)), r"state .* must be contiguous .* got strided"),
    (lambda: cached(cache(), layer_idx=None), r"inference_params must come to a layer made with layer_idx.* got None"),
    (lambda: cached(cache(3)), r"must hold the MambaState of layer 5 when seqlen_offset is 3, got NoneType"),
    (lambda: cached({}), r"inference_params must have key_value_memory_dict and seqlen_offset, got dict"),
    (lambda: cached(cache(), reverse=True), r"inference_params must come without sorted, .* or reverse"),
    (lambda: mom.ModalityLinear(8, 4, 3)(X, ROUTING), r"routing must be a Routing of 3 modalities, got 2"),
    (lambda: mom.ModalityLinear(8, 4, 2)(X, IDS), r"routing must be a Routing of 2 modalities, got Tensor"),
    (lambda: mom.ModalityLinear(7, 4, 2)(X, ROUTING), r"weight\[0\] must have shape .* = \[4, 8\], got \[4, 7\]"),
]

ROUTINGS = [
    (lambda: Routing.from_ids(IDS[0], 2), r"ids must be a tensor of shape \[batch, length\], got torch.int64 \[5\]"),
    (lambda: Routing.from_ids([[0, 1]], 2), r"ids must be a tensor of shape \[batch, length\], got list"),
    (
        lambda: Routing.from_ids(IDS - 2, 2),
        r"ids must lie in -1 .. num_modalities - 1 = 1 .* got -2 at flat position 0",
    ),
    (lambda: Routing.from_ids(IDS, 0), r"num_modalities must be in 1 .. 1024, got 0"),
    (lambda: Routing.from_ids(IDS, 5000), r"num_modalities must be in 1 .. 1024, got 5000"),
    (
        lambda: Routing.from_masks(~MASKS & MASKS, (2, 5), checked=True),
        r"masks must cover every token when checked, got no",
    ),
    (lambda: Routing.from_masks(MASKS, (10,)), r"shape must be \(batch, length\), .* got \(10,\)"),
    (lambda: Routing.from_index_lists([[0, 1], [1]], (1, 2)), r"lists must hold every position at most once, got .* 1"),
    (lambda: Routing.from_index_lists([[0, 5]], (1, 2)), r"lists\[0\] must hold positions in 0 .* = 1, got 5"),
    (lambda: Routing.from_index_lists([[0]], (1, 2), checked=True), r"lists must cover every token .* for token 1"),
    (lambda: Routing.from_index_lists([[0.5]], (1, 2)), r"lists\[0\] must hold integers .* got torch.float32 \[1\]"),
    (lambda: segments((0, 1)), r"segments\[0\]\[0\] must be a triple of integers .* got \(0, 1\)"),
    (lambda: segments((0, 3, 4)), r"segments\[0\]\[0\] must lie in 0 .. length = 5 .* got offset 3 and length 4"),
    (lambda: segments((0, 0, 4), (1, 3, 1)), r"segments\[0\] must not overlap, got token 3 in"),
    (lambda: segments((1, 0, 4), first_modality=1), r"must have its modality \+ 1 in 0 .* = 1, got 1 \+ 1"),
    (lambda: ROUTING.sort(X[:1]), r"x must have shape \[batch, length, ...\] = \[2, 5\], got \[1, 5, 8\]"),
    (lambda: ROUTING.unsort([1.0]), r"x must have shape \[batch, length, ...\] = \[2, 5\], got list"),
    (
        lambda: ROUTING.reversed(int32(0, 10).view(1, 2)),
        r"cu_seqlens must be a tensor of shape .* got torch.int32 \[1, 2\]",
    ),
    (lambda: mom.modality_routing(IDS, 2000), r"num_modalities must be in 1 .. 1024, got 2000"),
    (lambda: mom.permute_rows(X, ROUTING.order, ROUTING.rows[:3]), r"inverse must be int32 with one element per row"),
]

CHECKPOINTS = [
    (lambda: checkpoints.load(make(), OPEN, "gguf"), r"a format must be one of \(.*\), got 'gguf'"),
    (lambda: checkpoints.load(make(), {}), r"does not fit the layer .*\n  missing: A_log, D, in_proj.0.weight"),
    (lambda: checkpoints.load(make(), None), r"state_dict must map names to tensors, got NoneType"),
    (lambda: checkpoints.load(make(), OPEN | {"D": 1.0}), r"state_dict must map names to tensors, got float for D"),
    (lambda: checkpoints.load(nn.Linear(2, 2), OPEN), r"layer must be a MixtureOfMamba or a Mamba, got Linear"),
    (lambda: checkpoints.load(make(d_state=3), OPEN), r"A_log must have shape \[16, 3\], got \[16, 16\]"),
    (
        lambda: checkpoints.load(make(decouple=("D",)), make(decouple=()).state_dict()),
        r"D must have shape \[2, 16\], got",
    ),
    (lambda: checkpoints.convert({"foo": X}), r'not a layer in the format "mixture_of_mamba"\n  unexpected: foo'),
    (
        lambda: checkpoints.convert(OPEN, target="mamba_ssm"),
        r'"mamba_ssm" has one weight per projection, but state_dict',
    ),
    (lambda: checkpoints.upcycle(make(), 2), r"dense must have no projection per modality, got decouple="),
    (lambda: checkpoints.upcycle(mom.Mamba(8), 0), r"num_modalities must be at least 1, got 0"),
    (lambda: checkpoints.upcycle(nn.Linear(2, 2), 2), r"dense must be a Mamba or a MixtureOfMamba, got Linear"),
    (lambda: checkpoints.add_modality(make(), 5), r"like must be a modality of the layer, 0 .. 1, got 5"),
    (lambda: checkpoints.add_modality(nn.Linear(2, 2)), r"layer must be a MixtureOfMamba, got Linear"),
]

MATRICES = [torch.randn(4, 8)] * 2
A, B = -torch.rand(8, 3), torch.randn(2, 5, 3)

FUNCTIONS = [
    (
        lambda: mom.grouped_linear(X, MATRICES[:1], None, ROUTING.offsets),
        r"offsets must have num_modalities \+ 1 = 2 elements, got \[3\]",
    ),
    (
        lambda: mom.grouped_linear(X, MATRICES, [torch.randn(4)], ROUTING.offsets),
        r"bias must be empty or hold one vector per weight \(2\), got 1",
    ),
    (lambda: mom.causal_conv1d(X, torch.randn(7, 4)), r"weight must have shape .* = \[8, >= 1\], got \[7, 4\]"),
    (lambda: mom.selective_scan(X, X, A[1:], B, B), r"A must have shape \[channels, states\] = \[8, 3\], got \[7, 3\]"),
    (lambda: mom.selective_scan(X, X, A, B[..., :2], B), r"B must have shape .* = \[2, 5, 3\], got \[2, 5, 2\]"),
    (
        lambda: mom.selective_scan(X, X, A, B, B, dt_bias=torch.randn(2, 8)),
        r"offsets must be given with a per-modality dt_bias of shape \[2, 8\], got None",
    ),
    (
        lambda: mom.causal_conv1d_fn(X[0], torch.randn(5, 4)),
        r"x must have shape \[batch, channels, length\], got \[5, 8\]",
    ),
    (
        lambda: mom.causal_conv1d_fn(X, torch.randn(8, 4)),
        r"weight must have shape \[channels, width\] = \[5, width\] beside x \[batch, channels, length\], got \[8, 4\]",
    ),
]

TABLE = {
    f"{kind} {number}": row
    for kind, rows in {
        "construction": CONSTRUCTION,
        "call": CALLS,
        "routing": ROUTINGS,
        "checkpoint": CHECKPOINTS,
        "function": FUNCTIONS,
    }.items()
    for number, row in enumerate(rows)
}


@pytest.mark.parametrize("case", TABLE)
def test_messages(case):
    action, message = TABLE[case]
    with pytest.raises((ValueError, RuntimeError), match=message):
        action()


def test_steps_do_not_pretend_to_be_differentiable():
    layer = make()
    assert not layer.step(X[:, :1], layer.allocate_state(2), IDS[:, :1]).requires_grad
