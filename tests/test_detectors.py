"""Detectors against closed forms of Gaussian and mixture models, and as scikit-learn estimators."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binom, multivariate_normal, norm
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import NotFittedError

from ood_lib.analytic import GaussianLaw, MixtureLaw, analytic_model, exact_latent
from ood_lib.detectors import (
    STATISTICS,
    NegativeLogLikelihood,
    OODDetector,
    PathStatistics,
    Reconstruction,
    compare,
)
from ood_lib.models import zero_model

SHAPE = (1, 4, 4)
LAMBDAS = np.geomspace(2e-3, 3e-2, 16)
MEAN = np.linspace(-0.2, 0.3, 16)


def law_of(*, scale=1.0, shift=0.0, rotated=False):
    basis = torch.eye(16, dtype=torch.float64)
    if rotated:
        numbers = torch.randn(16, 16, generator=torch.Generator().manual_seed(5)).double()
        basis = torch.linalg.qr(numbers).Q
    return GaussianLaw(torch.from_numpy(MEAN + shift), basis, torch.from_numpy(scale * LAMBDAS))


def images_of(law, n, seed=0):
    return law.sample(n, torch.Generator().manual_seed(seed)).view(n, *SHAPE).clamp(-1, 1)


@pytest.fixture(scope="module")
def model(schedule):
    """The exact model of the domain."""
    return analytic_model(law_of(), schedule, sample_shape=SHAPE)


MAKERS = {
    **{name: lambda m, s=name: OODDetector(m, statistic=s) for name in STATISTICS},
    "noise start": lambda m: OODDetector(m, start="noise", seed=4),
    "reconstruction": lambda m: Reconstruction(m, seed=0, starts=3),
    "likelihood": lambda m: NegativeLogLikelihood(m, seed=0),
    "path": lambda m: PathStatistics(m),
}


@pytest.fixture(params=MAKERS)
def detector(request, model):
    """Each detector, fitted to 60 images of the domain."""
    return MAKERS[request.param](model).fit(images_of(law_of(), 60))


def test_one_image_at_a_time_scores_as_in_a_batch(detector):
    images = torch.cat([images_of(law_of(), 4, 1), images_of(law_of(scale=4), 3, 2)])
    alone = np.concatenate([detector.ood_score(image[None]) for image in images])
    np.testing.assert_allclose(detector.ood_score(images), alone, rtol=1e-6)
    batches = clone(detector).set_params(batch_size=2).fit(images_of(law_of(), 60))
    np.testing.assert_allclose(batches.ood_score(images), alone, rtol=1e-6)


def test_detectors_are_outlier_detectors_of_sklearn(detector):
    images = torch.cat([images_of(law_of(), 5, 1), images_of(law_of(scale=6), 5, 2)])
    scores = detector.ood_score(images)
    assert scores.shape == (10,)
    np.testing.assert_array_equal(detector.score(images), scores)
    np.testing.assert_array_equal(detector.score_samples(images), -scores)
    np.testing.assert_allclose(detector.decision_function(images), -scores - detector.offset_)
    inside = np.where(-scores >= detector.offset_, 1, -1)
    np.testing.assert_array_equal(detector.predict(images), inside)
    np.testing.assert_array_equal(
        clone(detector).fit_predict(images), clone(detector).fit(images).predict(images)
    )
    with pytest.raises(NotFittedError):
        clone(detector).ood_score(images)


@pytest.mark.parametrize("name", MAKERS)
def test_share_of_new_images_called_outliers_is_the_contamination(name, model):
    fitted = MAKERS[name](model).set_params(contamination=0.2).fit(images_of(law_of(), 200))
    flagged = (fitted.predict(images_of(law_of(), 400, 1)) == -1).sum()
    # the threshold itself varies as a share of 200 does
    assert binom.ppf(0.001, 200, 0.2) <= flagged / 2 <= binom.ppf(0.999, 200, 0.2)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_threshold_holds_with_fewer_images_than_numbers(statistic, schedule):
    d, n = 144, 40
    generator = torch.Generator().manual_seed(0)
    law = GaussianLaw(*(x.double() for x in (torch.zeros(d), torch.eye(d), torch.full((d,), 0.02))))
    images = law.sample(n + 400, generator).view(-1, 1, 12, 12)
    model = analytic_model(law, schedule, sample_shape=(1, 12, 12))
    detector = OODDetector(model, statistic=statistic, contamination=0.25).fit(images[:n])
    assert 0.05 < (detector.predict(images[n:]) == -1).mean() < 0.5


@pytest.mark.parametrize("name", [*STATISTICS[:3], "reconstruction"])
def test_threshold_takes_each_image_as_if_new(name, model):
    images = images_of(law_of(), 8)
    features = MAKERS[name](model)._features(images)
    whole = MAKERS[name](model).fit(images)._own_scores(features)
    rest = [torch.cat([images[:i], images[i + 1 :]]) for i in range(8)]
    alone = [
        MAKERS[name](model).fit(others).ood_score(images[i : i + 1])[0]
        for i, others in enumerate(rest)
    ]
    np.testing.assert_allclose(whole, alone, rtol=1e-6)


def test_statistics_are_those_of_the_latents(model, schedule):
    own, new = images_of(law_of(), 30), images_of(law_of(scale=2), 5, 1)
    z, fitted = (exact_latent(law_of(), schedule, x).flatten(1).numpy() for x in (new, own))
    exact = {
        "norm": np.linalg.norm(z, axis=1),
        "distance": np.linalg.norm(z - fitted.mean(0), axis=1),
        "typicality": np.abs((z**2).sum(1) - (fitted**2).sum(1).mean()),
        "mahalanobis": LedoitWolf().fit(fitted).mahalanobis(z),
    }
    for statistic, truth in exact.items():
        found = OODDetector(model, statistic=statistic).fit(own).ood_score(new)
        np.testing.assert_allclose(found, truth, rtol=0.03, atol=0.1)


def level0_density(schedule, images, means, covariances, weights):
    """Density of noise-free images at level 0, whose law has the noise of that level."""
    a, noise = np.sqrt(schedule.alpha_bar[0]), 1 - schedule.alpha_bar[0]
    x = images.flatten(1).numpy()
    return sum(
        w * multivariate_normal(a * m, a**2 * c + noise * np.eye(len(m))).pdf(x)
        for m, c, w in zip(means, covariances, weights, strict=True)
    )


@pytest.mark.parametrize("derivative", ["gradient", "difference"])
def test_likelihood_is_that_of_the_gaussian(model, schedule, derivative):
    images = torch.cat([images_of(law_of(), 5), images_of(law_of(scale=4, shift=0.1), 5, 1)])
    detector = NegativeLogLikelihood(model, seed=0, points=200, derivative=derivative).fit(images)
    truth = -np.log(level0_density(schedule, images, [MEAN], [np.diag(LAMBDAS)], [1]))
    np.testing.assert_allclose(detector.ood_score(images), truth, atol=0.05)


def test_probes_of_a_linear_model_shift_all_images_alike(schedule):
    law = law_of(rotated=True)
    model, images = analytic_model(law, schedule, sample_shape=SHAPE), images_of(law, 8)
    covariance = (law.basis * law.eigenvalues) @ law.basis.T
    truth = -np.log(level0_density(schedule, images, [MEAN], [covariance.numpy()], [1]))
    errors = [
        NegativeLogLikelihood(model, seed=0, points=100, probes=probes)._features(images) - truth
        for probes in (1, 30)
    ]
    assert max(np.ptp(error) for error in errors) < 0.1
    assert abs(errors[1].mean()) < 0.5


def test_likelihood_is_that_of_a_mixture(schedule):
    means = torch.tensor([[-0.4], [0.4]]).double()  # one number an image: a probe gives the trace
    law = MixtureLaw(means, torch.tensor([0.02, 0.04]).double(), torch.tensor([0.3, 0.7]).double())
    model = analytic_model(law, schedule)
    images = torch.rand(12, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double() - 0.5
    covariances = [v * np.eye(1) for v in law.variances.numpy()]
    density = level0_density(schedule, images, means.numpy(), covariances, law.weights.numpy())
    detector = NegativeLogLikelihood(model, seed=0, points=100).fit(images)
    np.testing.assert_allclose(detector.ood_score(images), -np.log(density), atol=0.02)


def test_gradient_and_difference_agree_on_a_network(tiny):
    images = torch.rand(3, *tiny.sample_shape, generator=torch.Generator().manual_seed(0)) - 0.5
    found = [
        NegativeLogLikelihood(tiny, seed=0, derivative=kind)._features(images)
        for kind in ("gradient", "difference")
    ]
    np.testing.assert_allclose(found[0], found[1], atol=0.05 * np.abs(found[0]).max())


def test_likelihood_of_no_noise_is_that_of_the_scaled_image(model, schedule):
    images = images_of(law_of(), 4)
    ratio = np.sqrt(schedule.alpha_bar[999] / schedule.alpha_bar[0])
    detector = NegativeLogLikelihood(zero_model(model), seed=0).fit(images)
    truth = -(norm.logpdf(ratio * images.flatten(1).numpy()) + np.log(ratio)).sum(1)
    np.testing.assert_allclose(detector.ood_score(images), truth, rtol=1e-6)


def test_reconstruction_from_no_noise_has_its_error_in_closed_form(model, schedule):
    images = images_of(law_of(), 6)
    found = Reconstruction(zero_model(model), seed=3, starts=1)._features(images)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(1, *SHAPE, generator=generator, dtype=torch.float64)
    back = np.sqrt(schedule.alpha_bar[0]) * (images + float(schedule.sigma(499.5)) * noise)
    np.testing.assert_allclose(found[:, 0], (back - images).square().flatten(1).mean(1))


def test_path_statistics_are_sums_over_a_ddim_inversion(model, schedule):
    images, grid = images_of(law_of(), 5), np.round(np.linspace(0, 999, 6))
    x, sigma, signal = images.numpy(), schedule.sigma(grid), np.sqrt(schedule.alpha_bar_at(grid))
    noises = []
    for k in range(5):
        noises.append(model.eps(torch.from_numpy(x), grid[k]).numpy())
        x = signal[k + 1] * (x / signal[k] + (sigma[k + 1] - sigma[k]) * noises[-1])
    eps = np.stack(noises)
    rates = np.diff(eps, axis=0) / (np.diff(grid)[1:] / 999)[:, None, None, None, None]
    truth = [(v**p).sum(axis=(0, 2, 3, 4)) for v in (eps, rates) for p in (1, 2, 3)]
    found = PathStatistics(model, points=6)._features(images)
    np.testing.assert_allclose(found, np.stack(truth, axis=1), rtol=1e-9)


def test_comparison_finds_another_domain_and_none_in_the_same(model):
    own, other = images_of(law_of(), 60), images_of(law_of(scale=3), 40, 1)
    detectors = {name: make(model).fit(own) for name, make in MAKERS.items()}
    new = images_of(law_of(), 50, 2)
    found = compare(detectors, new, other, rng=np.random.default_rng(0)).set_index("name")
    assert found.index.tolist() == list(MAKERS)
    reads_size = found.drop(index="reconstruction")
    assert (reads_size.low > 0.7).all()
    assert (reads_size.pvalue < 0.01).all()
    assert (found[["n", "m", "d"]] == [50, 40, 16]).all(axis=None)
    null = compare(detectors, new, images_of(law_of(), 50, 3), rng=np.random.default_rng(0))
    assert (null.pvalue > 0.01 / len(null)).all()


def test_comparison_needs_fitted_detectors(model):
    images = images_of(law_of(), 4)
    with pytest.raises(NotFittedError):
        compare({"norm": OODDetector(model)}, images, images, rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda m: OODDetector(m, statistic="svm"), "svm"),
        (lambda m: OODDetector(m, contamination=0), "contamination is 0"),
        (lambda m: OODDetector(m, start="noise"), "seed is None"),
        (lambda m: OODDetector(m, seed=1), "seed is 1"),
        (lambda m: OODDetector(m, preset="best"), "best"),
        (lambda m: Reconstruction(m, seed=0, starts=0), "starts is 0"),
        (lambda m: NegativeLogLikelihood(m, seed=0, derivative="exact"), "exact"),
        (lambda m: NegativeLogLikelihood(m, seed=0, probes=0), "probes is 0"),
        (lambda m: PathStatistics(m, points=2), "points is 2"),
        (lambda m: PathStatistics(zero_model(m)), "same path statistics"),
        (
            lambda m: NegativeLogLikelihood(
                replace(m, backend="openvino"), seed=0, derivative="gradient"
            ),
            "no gradients",
        ),
    ],
)
def test_bad_settings_are_named(make, match, model):
    with pytest.raises(ValueError, match=match):
        make(model).fit(images_of(law_of(), 5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x[:2], "not 2"),
        (lambda x: x[:, :, :3], r"\(5, 1, 3, 4\)"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: x * float("nan"), "nan"),
        (lambda x: 9 * x, r"\[-1, 1\]"),
    ],
)
def test_bad_images_are_named(change, match, model):
    with pytest.raises(ValueError, match=match):
        OODDetector(model).fit(change(images_of(law_of(), 5)))


def test_a_model_without_gradients_takes_differences(model):
    blind = replace(model, backend="openvino")
    images = images_of(law_of(), 4)
    found = NegativeLogLikelihood(blind, seed=0).fit(images).ood_score(images)
    truth = NegativeLogLikelihood(model, seed=0).fit(images).ood_score(images)
    np.testing.assert_allclose(found, truth, rtol=1e-6)
