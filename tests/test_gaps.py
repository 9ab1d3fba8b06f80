"""Gaps between domains: zero at home, known where the law is known."""

import numpy as np
import pytest
import torch

from ood_lib.analytic import GaussianLaw, analytic_model
from ood_lib.domains import load_images
from ood_lib.gaps import denoising_gap, feature_gap, power_spectrum, spectrum_gap
from ood_lib.models import load_model


def noise(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_white_noise_has_a_flat_spectrum_of_its_variance():
    found = power_spectrum(3 * noise(400, 1, 16, 16) + 5)
    assert found.shape == (8,)
    assert found == pytest.approx(9, rel=0.1)


def test_one_wave_stands_at_its_frequency():
    across = torch.cos(2 * np.pi * 3 * torch.arange(32) / 32)
    images = torch.randn(50, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * across
    found = power_spectrum(images.expand(50, 1, 32, 32))
    assert found.argmax() == 2
    assert np.delete(found, 2).max() < 1e-10


def test_the_gap_of_spectra_is_symmetric_and_free_of_brightness():
    a, b = noise(60, 1, 16, 16), noise(60, 1, 16, 16, seed=1).cumsum(-1)
    assert spectrum_gap(a, b) == pytest.approx(spectrum_gap(b, a))
    assert spectrum_gap(a + 0.3, b - 0.2) == pytest.approx(spectrum_gap(a, b), abs=1e-6)
    assert spectrum_gap(a, b) > 10 * spectrum_gap(a, noise(60, 1, 16, 16, seed=2)) / 2


def test_features_of_the_same_domain_lie_nearer_than_those_of_another():
    fashion = load_images("fashion", n=120)
    digits = load_images("digits", n=60)
    assert feature_gap(fashion[:60], fashion[60:]) < 0.7 * feature_gap(fashion[:60], digits)


def test_the_denoising_gap_is_that_of_the_optimal_denoiser():
    """A model of N(0, v I) errs by (a m)^2 s^2 / (a^2 v + s^2)^2 more on images of mean m."""
    schedule = load_model("ddpm-fashion-32").schedule
    d, v, mean, sigma = 64, 0.25, 2.0, 1.0
    law = GaussianLaw(torch.zeros(d).double(), torch.eye(d).double(), torch.full((d,), v).double())
    model = analytic_model(law, schedule, sample_shape=(1, 8, 8))
    known = v**0.5 * noise(4000, 1, 8, 8)
    found = denoising_gap(
        model, known, known + mean, sigma=sigma, generator=torch.Generator().manual_seed(3)
    )
    t = float(np.round(schedule.t_of_log_sigma(np.log(sigma))))
    a2 = float(schedule.alpha_bar_at(t))
    s2 = 1 - a2
    at_home = a2 * v / (a2 * v + s2)
    away = at_home + a2 * mean**2 * s2 / (a2 * v + s2) ** 2
    assert found == pytest.approx(np.log(away / at_home), abs=0.02)


def test_as_many_images_of_each_are_needed():
    model = load_model("ddpm-fashion-32")
    with pytest.raises(ValueError, match="as many"):
        denoising_gap(
            model,
            noise(3, 1, 32, 32),
            noise(2, 1, 32, 32),
            sigma=0.1,
            generator=torch.Generator(),
        )
