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


@all_kinds
def test_a_step_goes_along_the_path(kind):
    diffusion, (x, noise, times) = Diffusion(kind), sample()
    noisy, earlier = diffusion.add_noise(x, noise, times), times * 0.6
    got = diffusion.step(noisy, diffusion.target(x, noise, times), times, earlier)
    torch.testing.assert_close(got, diffusion.add_noise(x, noise, earlier))


def test_a_step_with_velocities_is_eulers():
    diffusion, (x, noise, times) = Diffusion("velocity"), sample()
    got = diffusion.step(x, noise, times, times / 2)
    torch.testing.assert_close(got, x + (times / 2 - times)[:, None, None] * noise)


def test_wrong_prediction():
    with pytest.raises(ValueError, match='prediction must be "velocity", "epsilon" or "v", got \'x\''):
        Diffusion("x")
