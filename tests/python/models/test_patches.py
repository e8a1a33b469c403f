# SPDX-License-Identifier: Apache-2.0
"""Latents into tokens and back, and where pictures are in a batch."""

from __future__ import annotations

import math

import pytest
import torch
from model_support import disturb
from torch.nn import functional as F

from mixture_of_mamba import MixtureOfMamba, Routing
from mixture_of_mamba.models import Pictures
from mixture_of_mamba.models.patches import LinearPatches, TimeEmbedding, UNetPatches, grid_waves, waves
from mixture_of_mamba.models.pictures import mix_both_ways
from mixture_of_mamba.models.placement import Placement
from mixture_of_mamba.nn import PROJECTIONS

CPU = torch.device("cpu")


@pytest.mark.parametrize("grid", [(6,), (4, 6), (2, 4, 6)])
def test_linear_patches_are_cut_in_order(grid):
    """With identities for maps, a token is its patch, tokens are in row-major order, and decoding is the inverse."""
    k, channels = 2, 3
    size = k ** len(grid) * channels
    patches = LinearPatches(size, channels, k, len(grid))
    with torch.no_grad():
        for linear in (patches.encoder, patches.decoder):
            linear.weight.copy_(torch.eye(size))
            linear.bias.zero_()
    latents = torch.randn(2, *grid, channels)
    tokens, skipped = patches.encode(latents, torch.zeros(2, size))
    assert tokens.shape == (2, math.prod(grid) // k ** len(grid), size)
    places = torch.cartesian_prod(*[torch.arange(side // k) for side in grid]).view(-1, len(grid))
    for token, place in enumerate(places):
        cut = latents[(slice(None), *[slice(k * i, k * i + k) for i in place.tolist()])]
        assert torch.equal(tokens[:, token], cut.reshape(2, -1))
    assert torch.equal(patches.decode(tokens, skipped, grid, torch.zeros(2, size)), latents)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unet(patch_size):
    patches = disturb(UNetPatches(8, 3, patch_size, 4))
    latents, time = torch.randn(2, 4, 8, 3), torch.randn(2, 8)
    tokens, skipped = patches.encode(latents, time)
    assert tokens.shape == (2, 32 // patch_size**2, 8)
    out = patches.decode(tokens, skipped, (4, 8), time)
    assert out.shape == latents.shape
    out.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in patches.parameters())
    alone = patches.decode(*patches.encode(latents[1:], time[1:]), (4, 8), time[1:])
    torch.testing.assert_close(alone, out[1:], atol=1e-5, rtol=1e-5)
    other = patches.decode(tokens, patches.encode(latents, time + 1)[1], (4, 8), time)
    assert (other - out).abs().max() > 1e-3  # the skips carry


def slow_unet(patches, x, time):
    """Encoded and decoded at once, ``[n, channels, height, width]``; from the weights, one operation at a time."""

    def conv(module, x, stride=1):
        columns = F.unfold(x, module.kernel_size, padding=module.padding, stride=stride)
        y = module.weight.flatten(1) @ columns + module.bias[:, None]
        return y.unflatten(2, (x.shape[2] // stride, x.shape[3] // stride))

    def norm(module, x):
        y = x.unflatten(1, (module.num_groups, -1)).flatten(2)
        y = (y - y.mean(2, keepdim=True)) / (y.var(2, keepdim=True, correction=0) + module.eps).sqrt()
        return y.view_as(x) * module.weight[:, None, None] + module.bias[:, None, None]

    def block(module, x):
        scale, shift = (F.silu(time) @ module.time.weight.T + module.time.bias)[..., None, None].chunk(2, 1)
        y = norm(module.norm2, conv(module.conv1, F.silu(norm(module.norm1, x)))) * (1 + scale) + shift
        return conv(module.conv2, F.silu(y)) + (x if x.shape == y.shape else conv(module.skip, x))

    def level(x, depth):
        """What is around all levels from this one down."""
        kept = x = block(patches.down_blocks[depth], x)
        if depth < len(patches.downs):
            x = level(conv(patches.downs[depth], x, 2), depth + 1)
            x = conv(patches.ups[depth], x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        else:
            x = torch.einsum("nchw,dc->ndhw", x, patches.encoder.weight) + patches.encoder.bias[:, None, None]
            x = torch.einsum("ndhw,cd->nchw", x, patches.decoder.weight) + patches.decoder.bias[:, None, None]
        return block(patches.up_blocks[depth], torch.cat((x, kept), 1))

    return conv(patches.conv_out, F.silu(norm(patches.norm_out, level(conv(patches.conv_in, x), 0))))


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unet_is_what_is_written_out(patch_size):
    patches = disturb(UNetPatches(8, 3, patch_size, 8)).double()
    latents, time = torch.randn(2, 4, 8, 3).double(), torch.randn(2, 8).double()
    got = patches.decode(*patches.encode(latents, time), (4, 8), time)
    expected = slow_unet(patches, latents.permute(0, 3, 1, 2), time).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, expected)


def test_unet_places_are_where_they_were():
    """What is at one end of a picture changes the tokens of that end most."""
    patches = UNetPatches(8, 1, 2, 4)
    latents = torch.zeros(1, 32, 4, 1)
    changed = latents.clone()
    changed[0, -1, -1] = 5
    tokens, other = (patches.encode(x, torch.zeros(1, 8))[0] for x in (latents, changed))
    moved = (other - tokens).abs().sum(-1)[0].view(16, 2)
    assert moved.amax(1).argmax() >= 14


def test_waves():
    table = waves(torch.tensor([0.0, 1.0]), 6, longest=100.0)
    angles = [1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)]
    torch.testing.assert_close(table[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    torch.testing.assert_close(table[1], torch.tensor([f(a) for f in (math.cos, math.sin) for a in angles]))
    assert grid_waves((3, 4), 9, CPU).shape == (12, 9)
    assert len(grid_waves((3, 4), 16, CPU).unique(dim=0)) == 12
    time = TimeEmbedding(8)
    assert time(torch.tensor([0.1, 0.9])).shape == (2, 8)
    assert time.to(torch.bfloat16)(torch.tensor([0.1])).dtype == torch.bfloat16


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_pictures_from_spans(order):
    ids = torch.tensor([[0, 1, 1, -1, 1, 1], [1, 1, 1, 0, 0, -1]])
    routing = Routing.from_ids(ids, 2)
    begin, lengths = torch.tensor([1, 4, 6])[order], torch.tensor([2, 2, 3])[order]
    pictures = Pictures.from_spans(begin, lengths, routing)
    numbers = torch.zeros(4, dtype=torch.int64)
    numbers[torch.tensor(order) + 1] = torch.arange(1, 4)
    expected = numbers[torch.tensor([[0, 1, 1, 0, 2, 2], [3, 3, 3, 0, 0, 0]])]
    assert torch.equal(routing.unsort(pictures.index), expected)
    assert pictures.boundaries.tolist() == [0, 1, 3, 4, 6, 6, 9, 12]
    none = Pictures.from_spans(begin[:0], lengths[:0], routing)
    assert not none.index.any()
    assert none.boundaries.tolist() == [0, 12]


def test_both_ways_in_mixers_with_options():
    """Each modality's D is that of its tokens: as if the mixer's one D were this modality's."""
    routing = Routing.from_ids(torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1]]), 2)
    pictures = Pictures.from_spans(torch.tensor([1, 6]), torch.tensor([3, 2]), routing)
    mixer = MixtureOfMamba(16, 2, (*PROJECTIONS, "D"), shared_expert=("in_proj",)).double()
    disturb(mixer)
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    y, state = mix_both_ways(mixer, x, routing, None, None, pictures)
    _, expected_state = mixer(x, routing, sorted=True, return_state=True)
    torch.testing.assert_close(state.ssm, expected_state.ssm)
    for modality, rows in enumerate((slice(0, 3), slice(3, 8))):
        one = MixtureOfMamba(16, 2, shared_expert=("in_proj",)).double()
        one.load_state_dict(mixer.state_dict() | {"D": mixer.D[modality].detach()})
        torch.testing.assert_close(y[:, rows], mix_both_ways(one, x, routing, None, None, pictures)[0][:, rows])


def test_placement():
    tokens = torch.zeros(2, 9, dtype=torch.int64)
    tokens[1, 8] = -1
    latents = [torch.randn(2, 4, 3), torch.randn(2, 2, 3), torch.randn(2, 4, 3)]
    placement = Placement.of(tokens.shape, CPU, latents, [(0, 1), (1, 0), (1, 4)], 3, 2, 2)
    assert placement.begin.tolist() == [1, 9, 13]
    assert placement.lengths.tolist() == [2, 1, 2]
    assert [group.pictures.tolist() for group in placement.groups] == [[0, 2], [1]]
    assert placement.groups[0].places.tolist() == [[1, 2], [13, 14]]
    assert placement.modality(tokens).tolist() == [[0, 1, 1, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 0, 0, -1]]


@pytest.mark.parametrize(
    ("latents", "positions", "message"),
    [
        (torch.zeros(2, 2, 2, 3), [(0, 1)], r"positions must have one \(row, offset\) for each of 2 latents, got 1"),
        (
            torch.zeros(1, 3, 2, 3),
            [(0, 1)],
            r"multiples of patch_size = 2, and dim_latent = 3 channels, got \[3, 2, 3\]",
        ),
        (torch.zeros(1, 2, 2, 4), [(0, 1)], r"dim_latent = 3 channels, got \[2, 2, 4\]"),
        ([torch.zeros(2, 3)], [(0, 1)], r"latents must have 2 dimensions that .*, got \[2, 3\]"),
        (torch.zeros(1, 4, 2, 3), [(0, 8)], r"positions\[0\] must leave room for 2 tokens in tokens of shape \[2, 9\]"),
        (torch.zeros(1, 4, 2, 3), [(2, 0)], r"got row 2, offset 0"),
        (torch.zeros(1, 4, 2, 3), [(0.5, 1.0)], r"positions must be integers \(row, offset\), got torch.float32"),
        (
            torch.zeros(3, 4, 2, 3),
            [(1, 3), (0, 2), (1, 2)],
            r"positions must not overlap, got token 3 of row 1 in pictures 2 and 0",
        ),
    ],
)
def test_wrong_pictures(latents, positions, message):
    with pytest.raises(ValueError, match=message):
        Placement.of(torch.Size((2, 9)), CPU, latents, positions, 3, 2, 2)


@pytest.mark.parametrize("cu_seqlens", [[0, 9, 18], [0, 5, 9, 9, 18]], ids=str)
def test_pictures_lie_in_one_document(cu_seqlens):
    boundaries, latents = torch.tensor(cu_seqlens, dtype=torch.int32), torch.zeros(2, 4, 2, 3)  # of two tokens each
    inside = Placement.of(torch.Size((1, 18)), CPU, latents, [(0, 9), (0, 3)], 3, 2, 2)
    inside.require_in_documents(boundaries)
    inside.require_in_documents(None)
    across = Placement.of(torch.Size((1, 18)), CPU, latents, [(0, 0), (0, 8)], 3, 2, 2)
    message = r"positions\[1\] must lie in one document of cu_seqlens, got tokens 8 .. 9 of batch \* length"
    with pytest.raises(ValueError, match=message):
        across.require_in_documents(boundaries)
