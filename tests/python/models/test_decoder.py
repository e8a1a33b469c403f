# SPDX-License-Identifier: Apache-2.0
"""The decoder against itself written out, and its identities: chunks, packing, padding, relabelling, one modality."""

from __future__ import annotations

import copy

import pytest
import torch
from model_support import VARIANTS, config, disturb, make_decoder, random_ids, reference_decoder
from torch.utils.flop_counter import FlopCounterMode

from mixture_of_mamba import Routing
from mixture_of_mamba.models import Decoder

variants = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def run(decoder, x, ids, **options):
    """In time order."""
    routing = Routing.from_ids(ids, decoder.config.num_modalities, device=x.device)
    y = decoder(routing.sort(x), routing, **options)
    if not options.get("return_state"):
        return routing.unsort(y)
    return routing.unsort(y[0]), y[1]


@variants
def test_equals_the_loop_over_tokens(settings):
    decoder = make_decoder(**settings)
    ids, x = random_ids(3, 7), torch.randn(3, 7, 8).double()
    ids[2] = -1  # a sequence of nothing
    got = run(decoder, x, ids)[ids >= 0]
    torch.testing.assert_close(got, reference_decoder(decoder, x, ids)[ids >= 0])


@pytest.mark.parametrize("settings", [VARIANTS["mixture"], VARIANTS["hybrid"]], ids=["mixture", "hybrid"])
def test_on_every_device(settings, device, full_precision_matmul):
    decoder = make_decoder(**settings)
    ids, x = random_ids(2, 9), torch.randn(2, 9, 8).double()
    expected = reference_decoder(decoder, x, ids)[ids >= 0]
    decoder = copy.deepcopy(decoder).to(device, torch.float32)
    got = run(decoder, x.to(device, torch.float32), ids)[ids.to(device) >= 0]
    torch.testing.assert_close(got.cpu().double(), expected, atol=1e-4, rtol=1e-4)


@variants
@pytest.mark.parametrize("sizes", [(4, 5), (1,) * 9, (0, 8, 1)], ids=["chunks", "steps", "empty"])
def test_whole_is_chunks(settings, sizes):
    decoder = make_decoder(**settings)
    ids, x = random_ids(3, 9), torch.randn(3, 9, 8).double()
    whole, last = run(decoder, x, ids, return_state=True)
    state, parts = None, []
    for some_x, some_ids in zip(x.split(sizes, 1), ids.split(sizes, 1), strict=True):
        y, state = run(decoder, some_x, some_ids, state=state, return_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1)[ids >= 0], whole[ids >= 0])
    for one, other in zip(last.mamba, state.mamba, strict=True):
        torch.testing.assert_close(one.ssm, other.ssm)
        torch.testing.assert_close(one.conv, other.conv)


@variants
def test_packed_is_separate(settings):
    decoder = make_decoder(**settings)
    lengths = (4, 0, 1, 6, 5)
    ids, x = random_ids(2, 8), torch.randn(2, 8, 8).double()  # documents run over the end of a row
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = run(decoder, x, ids, cu_seqlens=cu_seqlens).flatten(0, 1)
    parts = zip(x.flatten(0, 1).split(lengths), ids.flatten().split(lengths), strict=True)
    separate = torch.cat([run(decoder, some.unsqueeze(0), which.unsqueeze(0)).squeeze(0) for some, which in parts])
    real = ids.flatten() >= 0
    torch.testing.assert_close(packed[real], separate[real])


@variants
def test_padding_is_not_there(settings):
    decoder = make_decoder(**settings)
    ids, x = torch.randint(0, 3, (1, 6)), torch.randn(1, 6, 8).double()
    expected = run(decoder, x, ids)
    at = torch.tensor([1, 2, 5, 7, 8, 9])  # padding before, between and after
    wide_ids = torch.full((2, 12), -1)
    wide_ids[0, at], wide_ids[1, :6] = ids[0], ids[0]
    wide_x = torch.full((2, 12, 8), 1e3).double()
    wide_x[0, at], wide_x[1, :6] = x[0], x[0]
    got = run(decoder, wide_x, wide_ids)
    torch.testing.assert_close(got[0, at], expected[0])
    torch.testing.assert_close(got[1, :6], expected[0])


def test_relabelled_modalities_with_their_weights():
    decoder, new = make_decoder(**VARIANTS["hybrid"]), [2, 0, 1]
    other = copy.deepcopy(decoder)
    weights = {}
    for name, value in decoder.state_dict().items():
        parts = name.split(".")
        if parts[-2].isdigit() and "proj" in parts[-3]:
            parts[-2] = str(new[int(parts[-2])])
        weights[".".join(parts)] = value
    other.load_state_dict(weights)
    ids, x = random_ids(2, 8), torch.randn(2, 8, 8).double()
    relabelled = torch.where(ids < 0, -1, torch.tensor(new)[ids])
    torch.testing.assert_close(run(other, x, relabelled)[ids >= 0], run(decoder, x, ids)[ids >= 0])


def test_one_modality_is_dense():
    settings = {"layers": 2, "attention_every": 2, "attention_heads": 2}
    dense = make_decoder(decouple=(), **settings)
    mixture = Decoder(config(num_modalities=1, **settings)).double()
    names = {name.replace("_proj.0.", "_proj."): name for name in mixture.state_dict()}
    mixture.load_state_dict({names[name]: value for name, value in dense.state_dict().items()})
    ids, x = random_ids(2, 8), torch.randn(2, 8, 8).double()
    got, expected = run(mixture, x, ids.clamp(max=0)), run(dense, x, ids)
    torch.testing.assert_close(got[ids >= 0], expected[ids >= 0])


@pytest.mark.parametrize("settings", [VARIANTS["A and D"], VARIANTS["norms and limits"]], ids=["A and D", "norms"])
def test_initialised_anew_with_options(settings):
    decoder = Decoder(config(**settings), device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    decoder.reset_parameters()
    torch.manual_seed(3)
    decoder.reset_parameters()
    weights = {name: value.clone() for name, value in decoder.state_dict().items()}
    assert all(value.isfinite().all() for value in weights.values())
    assert all((value == 0).all() for name, value in weights.items() if ".shared." in name)
    assert all((value == 1).all() for name, value in weights.items() if "layernorm" in name or name.endswith(".D"))
    assert decoder.layers[0].mixers[0].A_log._no_weight_decay


@pytest.mark.parametrize("settings", [{"checkpointing": "full"}, {"checkpointing": "selective"}, {"memory": "lean"}])
def test_saving_memory_changes_no_number(settings):
    plain = disturb(Decoder(config(layers=3, attention_every=3, attention_heads=2)))
    saving = Decoder(config(layers=3, attention_every=3, attention_heads=2, **settings))
    saving.load_state_dict(plain.state_dict())
    ids, x = random_ids(2, 7), torch.randn(2, 7, 8)
    results = []
    for decoder in (plain, saving):
        leaf = x.clone().requires_grad_()
        y = run(decoder, leaf, ids)
        y[ids >= 0].square().sum().backward()
        results.append([y[ids >= 0], leaf.grad, *(p.grad for p in decoder.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_what_checkpointing_computes_again():
    def flops(checkpointing):
        decoder = Decoder(config(checkpointing=checkpointing))
        ids, x = random_ids(2, 7), torch.randn(2, 7, 8)
        runs = []
        decoder.layers[0].residuals[0].norm.register_forward_hook(lambda *_: runs.append(1))
        with FlopCounterMode(display=False) as counter:
            run(decoder, x, ids).sum().backward()
        return counter.get_total_flops(), len(runs)

    (none, once), (full, twice), (selective, again) = (flops(how) for how in ("none", "full", "selective"))
    assert none == selective < full
    assert (once, twice, again) == (1, 2, 2)


def test_options_of_the_layer_cost_no_flops():
    """Forward: a token meets as many weights. With backward: as much as any block of several operators."""

    def flops(grad, **settings):
        decoder, x = Decoder(config(64, layers=1, **settings)), torch.randn(2, 150, 64)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            y = run(decoder, x, torch.randint(0, 3, (2, 150)))
            if grad:
                y.sum().backward()
        return counter.get_total_flops()

    plain, normed = flops(False), flops(True, bcdt_norm=True)
    assert plain > 6 * 2 * 300 * 64**2 * 2
    for settings in (
        {"shared_expert": ("in_proj", "out_proj")},
        {"decouple": ("in_proj", "x_proj", "dt_proj", "out_proj", "A_log", "D")},
        {"dt_limit": (0.005, 0.05)},
        {"bcdt_norm": True, "shared_expert": ("x_proj",)},
    ):
        assert flops(False, **settings) == plain
        if settings.keys() != {"shared_expert"}:
            assert flops(True, **settings) == normed
    assert flops(True, shared_expert=("in_proj",)) == flops(True)


def test_every_parameter_gets_a_gradient_and_an_absent_modality_zeros():
    decoder = disturb(Decoder(config(layers=2, attention_every=2, attention_heads=2)))
    ids, x = torch.randint(0, 2, (2, 7)), torch.randn(2, 7, 8)
    run(decoder, x, ids).pow(3).sum().backward()
    for name, parameter in decoder.named_parameters():
        absent = "_proj.2." in name
        assert (parameter.grad.count_nonzero() == 0) == absent, name


@pytest.mark.parametrize("settings", [{}, {"attention_every": 2, "attention_heads": 2}], ids=["mamba", "hybrid"])
def test_other_precisions(settings, device):
    decoder = disturb(Decoder(config(16, **settings)), 0.05).to(device)
    ids, x = random_ids(2, 9), torch.randn(2, 9, 16, device=device)
    real = ids.to(device) >= 0
    expected = run(decoder, x, ids)[real]
    with torch.autocast(device.type, torch.bfloat16):
        got, state = run(decoder, x, ids, return_state=True)
        step, _ = run(decoder, x[:, :1], ids[:, :1], state=state, return_state=True)
    assert got.dtype == step.dtype == torch.float32  # the residual stream and the norms stay wide
    assert state.mamba[0].ssm.dtype == torch.float32
    torch.testing.assert_close(got[real], expected, atol=0.1, rtol=0.1)
    half = copy.deepcopy(decoder).to(torch.bfloat16)
    torch.testing.assert_close(run(half, x.bfloat16(), ids)[real].float(), expected, atol=0.15, rtol=0.1)


def test_meta_device_and_reset():
    decoder = Decoder(config(layers=2, attention_every=2, attention_heads=2), device="meta").to_empty(device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    torch.manual_seed(3)
    decoder.reset_parameters()
    fresh = Decoder(decoder.config)
    assert all(p.isfinite().all() for p in decoder.parameters())
    torch.testing.assert_close(decoder.layers[0].mixers[0].A_log, fresh.layers[0].mixers[0].A_log)
    scale = decoder.layers[0].mixers[0].out_proj[0].weight.abs().max()
    assert scale <= 16**-0.5 * decoder.config.residuals**-0.5
    assert decoder.layers[0].mixers[1].dt_proj[0].bias._no_weight_decay


def test_one_modality_needs_no_routing():
    decoder, x = make_decoder(num_modalities=1), torch.randn(2, 5, 8).double()
    torch.testing.assert_close(decoder(x, None), run(decoder, x, torch.zeros(2, 5).long()))


@pytest.mark.parametrize(
    ("settings", "routing"),
    [
        ({}, torch.zeros(2, 5).long()),
        ({}, None),
        ({}, 1),
        ({"decouple": ()}, None),
        ({"num_modalities": 1}, torch.zeros(2, 5).long()),
        ({"num_modalities": 1, "attention_every": 2, "attention_heads": 2}, None),
    ],
)
def test_only_a_routing_says_the_order_of_x(settings, routing):
    """Ids would say which modality a token has, but x would be taken for sorted."""
    got = r"torch.int64 \[2, 5\]" if isinstance(routing, torch.Tensor) else type(routing).__name__
    with pytest.raises(
        ValueError, match=rf"routing must be a Routing, whose sorted order x has, or None .*, got {got}"
    ):
        Decoder(config(**settings))(torch.randn(2, 5, 8), routing)


def test_wrong_inputs():
    decoder = Decoder(config(attention_every=2, attention_heads=2))
    routing = Routing.from_ids(random_ids(2, 5), 3)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, length, d_model = 8\], got \[2, 5, 9\]"):
        decoder(torch.randn(2, 5, 9), routing)
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must come without state and return_state where there is att"):
        decoder(torch.randn(2, 5, 8), routing, cu_seqlens=cu_seqlens, return_state=True)
    with pytest.raises(ValueError, match=r"cu_seqlens must be an int32 tensor \[sequences \+ 1\], got list"):
        decoder(torch.randn(2, 5, 8), routing, cu_seqlens=[0, 10])
    with pytest.raises(ValueError, match="modality must be a Routing of 3 modalities, got 2"):
        decoder(torch.randn(2, 5, 8), Routing.from_ids(torch.zeros(2, 5).long(), 2))
