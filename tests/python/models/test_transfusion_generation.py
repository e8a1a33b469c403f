# SPDX-License-Identifier: Apache-2.0
"""Generation of text and pictures against the whole sequence computed anew for every token and denoising step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from model_support import OPTIONS, config, disturb

from mixture_of_mamba.models import Sampling, Transfusion, TransfusionConfig

BOI, EOI, NULL = 1, 2, 3
GREEDY = Sampling(temperature=0)
GRID = (2, 4)
DECODERS = {
    "causal": {},
    "bidirectional": {"bidirectional": True, "modulated": True},
    "hybrid": {"bidirectional": True, "attention_every": 2, "attention_heads": 2},
    "options": OPTIONS,
    "unet": {"modulated": True, "patches": "unet"},
}
decoders = pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())


def make(decoder=None, prediction="v"):
    decoder = dict(decoder or {})
    patches = {"patches": decoder.pop("patches", "linear"), "unet_channels": 4}
    settings = TransfusionConfig(config(num_modalities=2, **decoder), 9, 3, BOI, EOI, NULL, prediction, **patches)
    return disturb(Transfusion(settings).double(), 0.4).eval()


def prompts():
    """The first has a picture, the second ends with BOI, the third begins with padding."""
    tokens = torch.tensor([[5, BOI, 0, 0, EOI, 6, 7], [8, 4, BOI, -1, -1, -1, -1], [-1, -1, 6, -1, 4, 4, 5]])
    return tokens, torch.randn(1, *GRID, 3).double(), [(0, 2)]


@torch.no_grad()
def slow(model, tokens, latents, new_tokens, noises, steps, guidance, stop=None):
    """One prompt without padding; positions follow from BOI. Pictures take the noises in turn."""
    tokens, latents, noises = list(tokens), list(latents), iter(noises)

    def call(some, pictures, last_time):
        at = [(0, t + 1) for t, token in enumerate(some) if token == BOI][: len(pictures)]
        times = torch.zeros(len(pictures)).double()
        if last_time is not None:
            times[-1] = last_time
        return model(torch.tensor([some]), pictures, at, times)

    def predicted(some, pictures, time):
        group = call([*some, NULL, NULL], pictures, time).predictions
        return group[0][-1]

    left = new_tokens
    while left or tokens[-1] == BOI:
        if tokens[-1] == BOI:
            x, before = next(noises), None
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            without = [token if token in (BOI, EOI) else NULL for token in tokens]
            for time, earlier in pairwise(times):
                c, u = predicted(tokens, [*latents, x], time), predicted(without, [*latents, x], time)
                alpha, sigma = (time * math.pi / 2).cos(), (time * math.pi / 2).sin()
                clean = alpha * x - sigma * (u + guidance * (c - u))
                held = clean if before is None else 1.5 * clean - 0.5 * before
                noise = (x - alpha * held) / sigma
                x, before = (earlier * math.pi / 2).cos() * held + (earlier * math.pi / 2).sin() * noise, clean
            latents.append(x)
            tokens += [NULL, NULL, EOI]
            continue
        out = call(tokens, latents, None)
        logits = model.text_logits(out.routing.unsort(out.hidden)[0, -1])
        logits[[EOI, NULL]] = -torch.inf
        tokens.append(int(logits.argmax()))
        left = 0 if tokens[-1] == stop else left - 1
    return tokens, latents


@decoders
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_pictures_and_text_of_ragged_prompts(decoder, guidance):
    model, (tokens, latents, positions) = make(decoder), prompts()
    options = {"latents": latents, "positions": positions, "sampling": GREEDY, "steps": 3, "guidance": guidance}
    options["generator"] = torch.Generator().manual_seed(1)
    got = model.generate(tokens, 4, GRID, **options)

    noise = torch.Generator().manual_seed(1)
    noises = {row: [] for row in range(3)}  # drawn in the order in which the sequences came to their pictures
    for _, group in sorted(_by_column(got.positions).items()):
        drawn = torch.randn(len(group), *GRID, 3, generator=noise, dtype=torch.float64)
        for row, one in zip(group, drawn, strict=True):
            noises[row].append(one)
    for row in range(3):
        prompt = [token for token in tokens[row].tolist() if token >= 0]
        old = list(latents) if row == 0 else []
        expected, pictures = slow(model, prompt, old, 4, noises[row], 3, guidance)
        written = [token for token in got.tokens[row].tolist() if token >= 0]
        assert written == expected[len(prompt) :]
        mine = [one for one, (r, _) in zip(got.latents, got.positions.tolist(), strict=True) if r == row]
        assert len(mine) == len(pictures) - len(old)
        for one, other in zip(mine, pictures[len(old) :], strict=True):
            torch.testing.assert_close(one, other)
    assert (got.positions[:, 0] == 1).any()  # the prompt that ended with BOI


def _by_column(positions):
    groups = {}
    for row, column in positions.tolist():
        groups.setdefault(column, []).append(row)
    return groups


def test_what_was_generated_is_input():
    """Prompt and continuation together, fed to the model, predict the text that was drawn."""
    model, (tokens, latents, positions) = make(), prompts()
    got = model.generate(tokens, 5, GRID, latents=latents, positions=positions, sampling=GREEDY, steps=2)
    whole = torch.cat((tokens, got.tokens), 1)
    shifted = got.positions + torch.tensor([0, tokens.shape[1]])
    where = torch.cat((torch.tensor(positions), shifted))
    out = model(whole, torch.cat((latents, got.latents)), where)
    logits = model.text_logits(out.routing.unsort(out.hidden))
    logits[..., [EOI, NULL]] = -torch.inf
    modality = out.placement.modality(whole)
    checked = 0
    for row in range(3):
        times = [t for t in range(whole.shape[1]) if modality[row, t] >= 0]
        for before, t in pairwise(times):
            if t >= tokens.shape[1] and modality[row, t] == 0 and whole[row, t] != EOI:
                assert logits[row, before].argmax() == whole[row, t]
                checked += 1
    assert checked == 15


def with_perfect_predictions(model, clean_of):
    """The model, predicting from noisy latents and (alpha, sigma) what ``clean_of`` makes of them."""
    call = model.forward

    def forward(tokens, latents=(), positions=(), times=None, *rest, **options):
        out = call(tokens, latents, positions, times, *rest, **options)
        if len(latents) and float(times[0]) > 0:
            alpha, sigma = model.diffusion.coefficients(times[0])
            clean = clean_of(latents, alpha, sigma)
            noise = (latents - alpha * clean) / sigma
            out.predictions[0] = model.diffusion.target(clean, noise, times)
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v"])
def test_a_perfect_model_draws_the_picture(kind):
    """With predictions that are the target's, sampling ends at the clean latents from any noise."""
    clean = torch.randn(2, *GRID, 3).double()
    model = with_perfect_predictions(make(prediction=kind), lambda *_: clean)
    got = model.generate(torch.full((2, 1), BOI), 0, GRID, steps=5)
    torch.testing.assert_close(got.latents, clean)
    assert got.tokens.tolist() == [[NULL, NULL, EOI]] * 2


@pytest.mark.parametrize("kind", ["velocity", "epsilon", "v"])
def test_twenty_steps_draw_normal_data(kind):
    """The best prediction for normal latents is known; what is drawn has their mean and deviation to 1.5 %."""
    mean, deviation = 2.0, 0.5

    def best(noisy, alpha, sigma):
        return mean + alpha * deviation**2 * (noisy - alpha * mean) / ((alpha * deviation) ** 2 + sigma**2)

    model, seed = with_perfect_predictions(make(prediction=kind), best), torch.Generator().manual_seed(2)
    got = model.generate(torch.full((40, 1), BOI), 0, GRID, steps=20, generator=seed).latents
    noise = torch.randn(40, *GRID, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    spread = (got - got.mean()).std() / (noise - noise.mean()).std()
    assert spread.item() == pytest.approx(deviation, rel=0.015)
    assert (got.mean() - spread * noise.mean()).item() == pytest.approx(mean, abs=0.015 * deviation)


def test_stops_and_text_alone(device):
    model = make().to(device, torch.float32)
    tokens = torch.tensor([[5, 6], [-1, 7]], device=device)
    free = model.generate(tokens, 6, GRID, sampling=GREEDY, pictures=False)
    assert free.tokens.shape == (2, 6)
    assert len(free.latents) == 0
    assert not set(free.tokens.flatten().tolist()) & {BOI, EOI, NULL, -1}
    stop = int(free.tokens[0, 0])
    got = model.generate(tokens, 6, GRID, sampling=GREEDY, pictures=False, stop=stop)
    assert got.tokens[0].tolist() == [stop] + [-1] * (got.tokens.shape[1] - 1)


def test_wrong_inputs():
    model = make()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        model.generate(torch.tensor([[5]]), 1, GRID, steps=0)
    with pytest.raises(ValueError, match="new_tokens must be an integer of at least 0, got -1"):
        model.generate(torch.tensor([[5]]), -1, GRID)
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got torch.int64 \[1\]"):
        model.generate(torch.tensor([5]), 1, GRID, guidance=2.0)
    with pytest.raises(ValueError, match="tokens must have a token that is no padding in every prompt"):
        model.generate(torch.tensor([[5], [-1]]), 1, GRID)
    with pytest.raises(ValueError, match=r"multiples of patch_size = 2, .*, got \[3, 2, 3\]"):
        model.generate(torch.tensor([[BOI]]), 1, (3, 2), steps=1)
