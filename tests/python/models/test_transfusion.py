# SPDX-License-Identifier: Apache-2.0
"""Transfusion: the decoder with pictures, losses and gradients against what is written out."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from model_support import OPTIONS, config, disturb, reference_decoder
from torch.nn import functional as F

from mixture_of_mamba import Routing
from mixture_of_mamba.models import Transfusion, TransfusionConfig
from mixture_of_mamba.models.patches import grid_waves

BOI, EOI, NULL = 1, 2, 3
DECODERS = {
    "causal": {},
    "bidirectional": {"bidirectional": True, "modulated": True},
    "hybrid": {"bidirectional": True, "attention_every": 2, "attention_heads": 2, "modulated": True},
    "options": OPTIONS,
}
decoders = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())


def settings(decoder=None, **changes):
    values = {"text_size": 12, "dim_latent": 3, "boi": BOI, "eoi": EOI, "null": NULL, "unet_channels": 4, **changes}
    return TransfusionConfig(config(num_modalities=2, **(decoder or {})), **values)


def make(decoder=None, **changes):
    return disturb(Transfusion(settings(decoder, **changes)).double(), 0.3)


def batch():
    """Two rows with three pictures of two sizes; the second row's first picture follows another without a gap."""
    tokens = torch.tensor([[-1, 5, BOI, 0, 0, EOI, 6, 7, -1, -1], [BOI, 0, 0, 0, EOI, 8, BOI, 9, 9, EOI]])
    positions = [(1, 7), (0, 3), (1, 1)]
    latents = [torch.randn(4, 2, 3).double(), torch.randn(2, 4, 3).double(), torch.randn(2, 6, 3).double()]
    return tokens, latents, positions, torch.tensor([0.2, 0.7, 0.4]).double()


def slow(model, tokens, latents, positions, times):
    """(hidden states in time order, prediction of each picture) of linear patches, one by one."""
    x = model.embedding.weight[tokens.clamp(min=0)]
    ids = torch.where(tokens < 0, -1, 0)
    spans, condition = [], model.time(times)
    for p, (latent, (row, offset)) in enumerate(zip(latents, positions, strict=True)):
        height, width = latent.shape[0] // 2, latent.shape[1] // 2
        cut = [latent[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten() for i in range(height) for j in range(width)]
        patches = model.patches.encoder(torch.stack(cut)) + grid_waves((height, width), x.shape[-1], x.device)
        if not model.config.decoder.modulated:
            patches = patches + condition[p]
        spans.append((row, offset, offset + len(cut)))
        x[row, offset : offset + len(cut)] = patches
        ids[row, offset : offset + len(cut)] = 1
    hidden = reference_decoder(model.decoder, x, ids, spans, condition)
    predictions = []
    for latent, (row, begin, end) in zip(latents, spans, strict=True):
        out, width = torch.empty_like(latent), latent.shape[1] // 2
        for n, patch in enumerate(model.patches.decoder(hidden[row, begin:end])):
            i, j = 2 * (n // width), 2 * (n % width)
            out[i : i + 2, j : j + 2] = patch.view(2, 2, 3)
        predictions.append(out)
    return hidden, predictions, ids


@decoders
def test_equals_the_loop_over_tokens(decoder):
    model, (tokens, latents, positions, times) = make(decoder), batch()
    hidden, predictions, ids = slow(model, tokens, latents, positions, times)
    out = model(tokens, latents, positions, times)
    torch.testing.assert_close(out.routing.unsort(out.hidden)[ids >= 0], hidden[ids >= 0])
    for group, got in zip(out.placement.groups, out.predictions, strict=True):
        for p, prediction in zip(group.pictures.tolist(), got, strict=True):
            torch.testing.assert_close(prediction, predictions[p])


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "v"])
@pytest.mark.parametrize("tied", [False, True])
def test_losses_are_those_written_out(prediction, tied):
    model = make(DECODERS["bidirectional"], prediction=prediction, tied=tied, diffusion_weight=3.0).eval()
    tokens, latents, positions, times = batch()
    noise = [torch.randn_like(one) for one in latents]
    noisy, targets = [], []
    for x, e, t in zip(latents, noise, times.tolist(), strict=True):
        alpha, sigma = (
            (1 - t, t) if prediction == "velocity" else (math.cos(t * math.pi / 2), math.sin(t * math.pi / 2))
        )
        noisy.append(alpha * x + sigma * e)
        targets.append({"velocity": e - x, "epsilon": e, "v": alpha * e - sigma * x}[prediction])
    hidden, predictions, ids = slow(model, tokens, noisy, positions, times)
    logits = hidden @ (model.embedding.weight if tied else model.head.weight).T
    text = [
        F.cross_entropy(logits[b, t], tokens[b, t + 1])
        for b in range(2)
        for t in range(9)
        if ids[b, t] == 0 and ids[b, t + 1] == 0
    ]
    losses = model.loss(tokens, latents, positions, times=times, noise=noise)
    assert losses.text_count == len(text) == 5
    torch.testing.assert_close(losses.text, sum(text) / len(text))
    diffusion = sum((p - t).square().mean() for p, t in zip(predictions, targets, strict=True)) / 3
    torch.testing.assert_close(losses.diffusion, diffusion)
    torch.testing.assert_close(losses.total(), losses.text + 3 * diffusion)
    on_host = model.loss(tokens, latents, positions, Routing.from_ids(ids, 2), times=times, noise=noise)
    torch.testing.assert_close(on_host.total(), losses.total())


@decoders
def test_packed_is_separate(decoder):
    model, (tokens, latents, positions, times) = make(decoder).eval(), batch()
    noise = [torch.randn_like(one) for one in latents]
    separate = model.loss(tokens, latents, positions, times=times, noise=noise)
    packed_positions = [(0, 10 * row + offset) for row, offset in positions]
    cu_seqlens = torch.tensor([0, 10, 20], dtype=torch.int32)
    packed = model.loss(tokens.view(1, 20), latents, packed_positions, times=times, noise=noise, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed.text, separate.text)
    torch.testing.assert_close(packed.diffusion, separate.diffusion)
    assert packed.text_count == separate.text_count


@decoders
def test_chunks(decoder):
    """A picture is in one chunk as a whole; everything else may be cut."""
    model, (tokens, latents, positions, times) = make(decoder), batch()
    whole = model(tokens, latents, positions, times)
    state, parts = None, []
    for begin, end in ((0, 1), (1, 6), (6, 7), (7, 9), (9, 10)):
        inside = [p for p, (_, offset) in enumerate(positions) if begin <= offset < end]
        some = [latents[p] for p in inside], [(positions[p][0], positions[p][1] - begin) for p in inside]
        out = model(tokens[:, begin:end], *some, times[inside], state=state, return_state=True)
        state = out.state
        parts.append(out.routing.unsort(out.hidden))
    real = whole.placement.modality(tokens) >= 0
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole.routing.unsort(whole.hidden)[real])


def test_text_is_causal_and_pictures_are_not():
    """What a token changes: nothing before it, but the rest of its own picture where pictures are seen both ways."""
    tokens, latents, positions, times = batch()
    changed = [latents[0], latents[1], latents[2].clone()]
    changed[2][:, 2:4] += 1  # the middle patch of three, at token 2 of row 1
    for name, both_ways in (("causal", False), ("bidirectional", True), ("hybrid", True)):
        model = make(DECODERS[name])
        one, other = (model(tokens, some, positions, times) for some in (latents, changed))
        moved = (one.routing.unsort(one.hidden) - other.routing.unsort(other.hidden)).abs().amax(-1)
        real = one.placement.modality(tokens) >= 0
        assert not moved[0][real[0]].any()
        assert (moved[1] > 0).tolist() == [False, both_ways, *[True] * 8]


def test_modulation_begins_with_pictures_as_they_are():
    """adaLN-zero: before training no layer changes a picture's token, and text is as without."""
    model = Transfusion(settings(DECODERS["bidirectional"])).double()
    tokens, latents, positions, times = batch()
    out = model(tokens, latents, positions, times)
    norm = model.decoder.final_norm
    for group, _ in zip(out.placement.groups, out.predictions, strict=True):
        patches, _ = model.patches.encode(group.latents, model.time(times)[group.pictures])
        expected = norm(patches + grid_waves(group.tokens_grid, 8, patches.device))
        got = out.routing.unsort(out.hidden).flatten(0, 1)[group.places]
        torch.testing.assert_close(got, expected)


def test_a_scan_back_leaves_the_state_alone():
    """In one layer, text after a picture and the state are those of the causal model."""
    causal = make({"layers": 1, "mixers_per_layer": 1})
    both = Transfusion(settings({"layers": 1, "mixers_per_layer": 1, "bidirectional": True})).double()
    both.load_state_dict(causal.state_dict())
    tokens, latents, positions, times = batch()
    one, other = (model(tokens, latents, positions, times, return_state=True) for model in (causal, both))
    texts = one.placement.modality(tokens) == 0
    h, g = one.routing.unsort(one.hidden), other.routing.unsort(other.hidden)
    torch.testing.assert_close(h[texts], g[texts])
    assert (h - g)[one.placement.modality(tokens) == 1].abs().max() > 1e-3
    torch.testing.assert_close(one.state.mamba[0].ssm, other.state.mamba[0].ssm)
    torch.testing.assert_close(one.state.mamba[0].conv, other.state.mamba[0].conv)


@pytest.mark.parametrize("patches", ["linear", "unet"])
@decoders
def test_gradients(decoder, patches):
    model, (tokens, latents, positions, _) = make(decoder, patches=patches), batch()
    model.loss(tokens, latents, positions).total().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()
    model.loss(tokens).total().backward()  # text alone
    for name, parameter in model.named_parameters():
        absent = name.startswith(("patches", "time")) or "_proj.1." in name or "modulation" in name
        assert (parameter.grad.abs().sum() == 0) == absent, name


def test_dropped_text():
    model, (tokens, latents, positions, times) = make(), batch()
    model.eval()
    noise = [torch.randn_like(one) for one in latents]
    arguments = {"times": times, "noise": noise}
    got = model.loss(tokens, latents, positions, dropped=torch.tensor([True, False]), **arguments)
    null = tokens.clone()
    null[0] = torch.tensor([-1, NULL, BOI, 0, 0, EOI, NULL, NULL, -1, -1])
    expected = model.loss(null, latents, positions, dropped=torch.tensor([False, False]), **arguments)
    torch.testing.assert_close(got.diffusion, expected.diffusion)
    assert got.text_count == 2  # the labels of row 1
    model.train()
    always = Transfusion(settings(condition_dropout=1.0)).double()
    always.load_state_dict(model.state_dict())
    tokens[0, 2:6] = 7  # now row 0 has no picture, and keeps its text
    dropped = always.loss(tokens, [latents[0], latents[2]], [positions[0], positions[2]])
    assert dropped.text_count == 6
    assert always.eval().loss(tokens, [latents[0], latents[2]], [positions[0], positions[2]]).text_count == 8


@decoders
def test_other_precisions(decoder, device):
    model = disturb(Transfusion(settings(decoder, patches="unet")), 0.05).to(device).eval()
    tokens, latents, positions, times = batch()
    tokens, latents, times = tokens.to(device), [x.float().to(device) for x in latents], times.float().to(device)
    arguments = {"times": times, "noise": [torch.randn_like(one) for one in latents]}
    expected = model.loss(tokens, latents, positions, **arguments).total()
    with torch.autocast(device.type, torch.bfloat16):
        got = model.loss(tokens, latents, positions, **arguments).total()
    torch.testing.assert_close(got, expected, atol=0.1, rtol=0.05)
    half = copy.deepcopy(model).to(torch.bfloat16)
    torch.testing.assert_close(
        half.loss(tokens, latents, positions, **arguments).total(), expected, atol=0.1, rtol=0.05
    )


def test_meta_device_and_plain_values():
    values = json.loads(json.dumps(settings(DECODERS["hybrid"], patches="unet").to_dict()))
    model = Transfusion(TransfusionConfig.from_dict(values), device="meta").to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    model.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boi": 12}, r"boi, eoi and null must be three text tokens in 0 .. text_size - 1 = 11, got \(12, 2, 3\)"),
        ({"eoi": BOI}, r"three text tokens .*, got \(1, 1, 3\)"),
        ({"patches": "conv"}, 'patches must be "linear" or "unet", got \'conv\''),
        ({"patches": "unet", "patch_size": 3}, "patch_size must be a power of two .* got 3 and 2"),
        ({"patches": "unet", "grid_dimensions": 1}, 'grid_dimensions 2 when patches is "unet", got 2 and 1'),
        ({"condition_dropout": 1.5}, "condition_dropout must lie in 0 .. 1, got 1.5"),
        ({"dim_latent": 0}, "dim_latent must be at least 1, got 0"),
        ({"prediction": "x"}, "prediction must be .*, got 'x'"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
    with pytest.raises(ValueError, match=r"decoder.num_modalities must be 2, text and pictures, got 3"):
        TransfusionConfig(config(), 12, 3, 1, 2, 3)


def test_wrong_inputs():
    model, (tokens, latents, positions, times) = make(), batch()
    with pytest.raises(ValueError, match=r"times must have shape \[pictures = 3\], got \[2\]"):
        model(tokens, latents, positions, times[:2])
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got torch.float64 \[3\]"):
        model(times)
    with pytest.raises(ValueError, match=r"dropped must have shape \[sequences = 2\], got \[3\]"):
        model.loss(tokens, latents, positions, dropped=torch.ones(3) > 0)
    with pytest.raises(ValueError, match=r"modality must have the shape of tokens, \[2, 10\], got \[2, 9\]"):
        model.loss(tokens, latents, positions, tokens[:, 1:])
    with pytest.raises(ValueError, match=r"times must have shape \[pictures = 3\], got list"):
        model(tokens, latents, positions, [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"cu_seqlens must be an int32 tensor \[sequences \+ 1\], got list"):
        model.loss(tokens, latents, positions, cu_seqlens=[0, 10, 20])


@pytest.mark.parametrize("wrong", [-0.1, 1.25, math.nan, math.inf])
def test_times_outside_of_diffusion(wrong):
    model, (tokens, latents, positions, times) = make(), batch()
    model(tokens, latents, positions, torch.tensor([0.0, 1.0, 0.5]).double())  # both ends are times
    times[1] = wrong
    for call in (lambda: model(tokens, latents, positions, times), lambda: model.loss(*batch()[:3], times=times)):
        with pytest.raises(
            ValueError, match=rf"times must lie in 0 \(clean\) .. 1 \(noise\), got {wrong} for picture 1"
        ):
            call()


def test_latents_are_floating():
    """An image of bytes is no latent, and noise has the form of the latents, also where it could be expanded."""
    model, (tokens, latents, positions, _) = make(), batch()
    alike = torch.zeros(2, 2, 4, 3)
    for call in (model, model.loss):
        with pytest.raises(
            ValueError, match=r"latents must be a tensor of a floating type, got torch.uint8 \[2, 2, 4, 3"
        ):
            call(tokens, alike.byte(), positions[1:])
        with pytest.raises(
            ValueError, match=r"latents\[1\] must be a tensor of a floating type, got torch.int64 \[2, 4"
        ):
            call(tokens, [latents[0], latents[1].long(), latents[2]], positions)
    with pytest.raises(ValueError, match=r"noise must be a tensor of a floating type, got torch.uint8 \[2, 2, 4, 3\]"):
        model.loss(tokens, alike, positions[1:], noise=alike.byte())
    one = make(patch_size=1)
    with pytest.raises(
        ValueError, match=r"noise must have the form of latents, \[\[1, 2, 2, 3\]\], got \[\[1, 1, 2, 3\]\]"
    ):
        one.loss(tokens, torch.zeros(1, 2, 2, 3), [(1, 1)], noise=torch.zeros(1, 1, 2, 3))


@pytest.mark.parametrize(("token", "at"), [(12, 16), (-2, 1)])
def test_tokens_outside_of_the_vocabulary(token, at):
    """Are errors in text. In pictures ids do not matter, and may be anything."""
    model, (tokens, latents, positions, times) = make().eval(), batch()
    expected = model(tokens, latents, positions, times).hidden
    for row, offset in positions:
        tokens[row, offset : offset + 2] = 10 * token
    torch.testing.assert_close(model(tokens, latents, positions, times).hidden, expected, rtol=0, atol=0)
    tokens.view(-1)[at] = token
    message = rf"tokens must lie in -1 .. text_size - 1 = 11 \(-1 is padding\), got {token} at flat position {at}"
    for call in (model, model.loss):
        with pytest.raises(ValueError, match=message):
            call(tokens, latents, positions)
    with pytest.raises(ValueError, match=message):
        model.generate(tokens, 1, (2, 2), latents=latents, positions=positions, steps=1)


@decoders
def test_a_batch_of_nothing_has_no_loss(decoder):
    model = make(decoder)
    losses = model.loss(torch.zeros(0, 5, dtype=torch.int64))
    losses.total().backward()
    assert losses.total().item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() == 0, name
