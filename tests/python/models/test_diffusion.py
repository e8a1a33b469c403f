# SPDX-License-Identifier: Apache-2.0
"""Identities of the schedules, and that a perfect prediction leads back to the clean latents."""

from __future__ import annotations

import math

import pytest
import torch

from mixture_of_mamba.models import Diffusion

KINDS = ("velocity", "epsilon", "v")
all_kinds = pytest.mark.parametrize("kind", KINDS)


def sample():
    times = torch.tensor([0.0, 0.3, 0.8, 0.97]).double()
    return torch.randn(4, 3, 2).double(), torch.randn(4, 3, 2).double(), times


@all_kinds
def test_ends(kind):
    diffusion, (x, noise, _) = Diffusion(kind), sample()
    torch.testing.assert_close(diffusion.add_noise(x, noise, torch.zeros(4).double()), x)
    torch.testing.assert_close(diffusion.add_noise(x, noise, torch.ones(4).double()), noise)
    assert 0.9 < diffusion.last_time <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_cosine_keeps_the_variance(kind):
    alpha, sigma = Diffusion(kind).coefficients(torch.linspace(0, 1, 11).double())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(11).double())
    assert alpha[5].item() == pytest.approx(math.cos(math.pi / 4))
    assert (alpha.diff() < 0).all()


def test_velocity_is_the_slope():
    diffusion, (x, noise, times) = Diffusion("velocity"), sample()
    small = 1e-6
    slope = (diffusion.add_noise(x, noise, times + small) - diffusion.add_noise(x, noise, times - small)) / (2 * small)
    torch.testing.assert_close(diffusion.target(x, noise, times), slope)


def test_v_is_the_slope_in_angle():
    diffusion, (x, noise, times) = Diffusion("v"), sample()
    small = 1e-6
    slope = (diffusion.add_noise(x, noise, times + small) - diffusion.add_noise(x, noise, times - small)) / (2 * small)
    torch.testing.assert_close(diffusion.target(x, noise, times), slope / (math.pi / 2))


@all_kinds
def test_a_prediction_says_both(kind):
    diffusion, (x, noise, times) = Diffusion(kind), sample()
    noisy = diffusion.add_noise(x, noise, times)
    got = diffusion.clean_and_noise(noisy, diffusion.target(x, noise, times), times)
    torch.testing.assert_close(got, (x, noise))


def ideal(diffusion, x, time, parts):
    """What a perfect model predicts from x when the data is a mixture of normals, parts (share, mean, deviation)."""
    alpha, sigma = diffusion.coefficients(time)
    scores, cleans = [], []
    for share, mean, deviation in parts:
        variance = (alpha * deviation) ** 2 + sigma**2
        away = x - alpha * mean
        scores.append(math.log(share) - variance.log() / 2 - away.square() / (2 * variance))
        cleans.append(mean + alpha * deviation**2 * away / variance)
    clean = (torch.stack(scores).softmax(0) * torch.stack(cleans)).sum(0)
    return diffusion.target(clean, (x - alpha * clean) / sigma, time)


def drawn_from(diffusion, noise, steps, parts):
    return diffusion.denoise(noise, steps, lambda x, time: ideal(diffusion, x, time, parts))


def mean_and_deviation(diffusion, steps, mean, deviation):
    """Of what is drawn for normal data: sampling is a straight line in the noise, so three points say it exactly."""
    low, middle, high = drawn_from(diffusion, torch.tensor([-1.0, 0, 1]).double(), steps, [(1, mean, deviation)])
    torch.testing.assert_close(high - middle, middle - low)
    return middle.item(), (high - middle).item()


@all_kinds
@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (1, 1), (2, 0.5), (-1, 2)])
def test_twenty_steps_keep_mean_and_deviation(kind, mean, deviation):
    """The mean to 1 % of the deviation, or 0.01, and the deviation to 1.5 %, of which first order loses 6 to 8 %."""
    got = mean_and_deviation(Diffusion(kind), 20, mean, deviation)
    assert got[0] == pytest.approx(mean, abs=0.01 * max(deviation, 1))
    assert got[1] == pytest.approx(deviation, rel=0.015)


@pytest.mark.parametrize("kind", ["velocity", "v"])
def test_errors_are_of_second_order(kind):
    errors = [abs(mean_and_deviation(Diffusion(kind), steps, -1, 2)[1] - 2) for steps in (40, 80, 160)]
    assert errors[0] > 3.5 * errors[1] > 3.5**2 * errors[2] > 0


@all_kinds
def test_twenty_steps_of_a_mixture(kind):
    """Two narrow peaks: how many samples come to each, and what each looks like."""
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).double()
    got = drawn_from(Diffusion(kind), noise, 20, [(0.3, -1.2, 0.1), (0.7, 0.6, 0.3)])
    left = got < -0.6
    assert left.double().mean().item() == pytest.approx(0.3, abs=0.015)
    for peak, mean, deviation in ((got[left], -1.2, 0.1), (got[~left], 0.6, 0.3)):
        assert peak.mean().item() == pytest.approx(mean, abs=0.02)
        assert peak.std().item() == pytest.approx(deviation, abs=0.03)


@all_kinds
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_perfect_prediction_leads_to_the_clean_latents(kind, steps):
    diffusion, (x, noise, _) = Diffusion(kind), sample()
    seen = []

    def predict(noisy, time):
        seen.append(time.item())
        alpha, sigma = diffusion.coefficients(time)
        return diffusion.target(x, (noisy - alpha * x) / sigma, time)

    torch.testing.assert_close(diffusion.denoise(noise, steps, predict), x)
    assert len(seen) == steps
    assert max(seen) == diffusion.last_time


def test_one_step_with_velocities_is_eulers():
    noise = torch.randn(3).double()
    got = Diffusion("velocity").denoise(noise, 1, lambda x, time: 3 * x)
    torch.testing.assert_close(got, noise - 3 * noise)


@pytest.mark.parametrize(
    ("kind", "times"), [("v", [1, 0.75, 0.5, 0.25, 0]), ("epsilon", [1, 0.95, 0.95 * 2 / 3, 0.95 / 3, 0])]
)
def test_times_of_sampling(kind, times):
    assert Diffusion(kind).sampling_times(4) == pytest.approx(times)
    assert Diffusion(kind).sampling_times(1) == [1, 0]


def test_wrong_prediction():
    with pytest.raises(ValueError, match='prediction must be "velocity", "epsilon" or "v", got \'x\''):
        Diffusion("x")
