"""Latent priors: the law each one promises, the span it stays in, the maps it commutes with."""

from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from scipy.spatial import geometric_slerp
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf, oas
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import KernelDensity as SklearnKernelDensity

from ood_lib import mosaic
from ood_lib.gram import open_shards
from ood_lib.priors import (
    LADDER,
    PPCA,
    PRIORS,
    CentredSlerp,
    Diagonal,
    FullGaussian,
    Isotropic,
    IsotropicReleased,
    KernelDensity,
    LinearCombination,
    Mixture,
    Mosaic,
    NeighbourRecombination,
    NeighbourSlerp,
    Recombination,
    Replay,
    ReplayNoise,
    Slerp,
    StandardNormal,
    make_prior,
)

DRAWS = 100_000

WITH_DENSITY = [
    StandardNormal(),
    Isotropic(),
    IsotropicReleased(),
    Diagonal(),
    FullGaussian(shrinkage="ledoit_wolf"),
    PPCA(rank=3),
    Mixture(k=2, rank=3),
    KernelDensity(rank=3),
    ReplayNoise(),
]
WITHOUT_DENSITY = [
    Recombination(),
    LinearCombination(),
    NeighbourRecombination(),
    Slerp(),
    CentredSlerp(),
    NeighbourSlerp(),
    Mosaic(),
    Replay(),
]


@pytest.fixture(scope="module")
def latents():
    """Correlated latents (12, 5) away from the origin."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(12, 5)) @ rng.normal(size=(5, 5)) + [3, -2, 0, 1, 5]


@pytest.fixture(scope="module")
def many():
    """Correlated latents (60, 7), two clusters."""
    rng = np.random.default_rng(4)
    z = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7))
    return z + np.where(np.arange(60) % 2, 6, -6)[:, None] * rng.normal(size=7)


def fresh(seed=0):
    return np.random.default_rng(seed)


# ----------------------------------------------------------- moments of the draws, in dense numpy


def principal_moments(z, rank, inside):
    """Mean and covariance of a law with `inside` times the leading variances, and white noise."""
    values, vectors = np.linalg.eigh(np.cov(z, rowvar=False))
    values = np.concatenate([np.full(len(values) - rank, values[:-rank].mean()), values[-rank:]])
    values[-rank:] *= inside
    return z.mean(0), vectors * values @ vectors.T


def mixed_moments(points):
    """Mean and covariance of a law that is uniform over groups of points (groups, points, d)."""
    flat = np.concatenate(points)
    return flat.mean(0), np.cov(flat, rowvar=False, bias=True)


def path(a, b, points=20):
    """The released twenty points, or fewer, by scipy."""
    share = np.arange(1, points + 1) / (points + 1)
    long_a, long_b = np.linalg.norm(a), np.linalg.norm(b)
    length = (1 - share) * long_a + share * long_b
    return length[:, None] * geometric_slerp(a / long_a, b / long_b, share)


def all_paths(z, centre):
    return [path(a - centre, b - centre) + centre for a, b in combinations(z, 2)]


def neighbour_paths(z, m, points):
    """From each latent to its m nearest, about the mean."""
    mean, distances = z.mean(0), np.linalg.norm(z[:, None] - z, axis=2)
    ends = np.argsort(distances, axis=1)[:, 1 : m + 1]
    return [
        path(a - mean, z[j] - mean, points) + mean
        for a, near in zip(z, ends, strict=True)
        for j in near
    ]


def neighbourhoods(z, m):
    distances = np.linalg.norm(z[:, None] - z, axis=2)
    return [z[np.argsort(row, kind="stable")[:m]] for row in distances]


def promised(name, z):
    """Mean and covariance as the docstrings define them."""
    mean, s, d, n = z.mean(0), np.cov(z, rowvar=False), z.shape[1], len(z)
    biased = (n - 1) / n
    return {
        "standard normal": lambda: (np.zeros(d), np.eye(d)),
        "isotropic": lambda: (mean, np.trace(s) / d * np.eye(d)),
        "isotropic, as released": lambda: (mean, np.var(z) * np.eye(d)),
        "diagonal": lambda: (mean, np.diag(np.diag(s))),
        "full covariance": lambda: (mean, s),
        "recombination": lambda: (mean, s),
        "linear combination": lambda: (mean, s),
        "PPCA": lambda: principal_moments(z, 3, 1),
        # every M step keeps mean and biased covariance of the components, plus the ridge of scikit-learn
        "mixture": lambda: principal_moments(z, 3, biased + 1e-6),
        "kernel density": lambda: principal_moments(z, 3, biased + n ** (-2 / 7)),
        "neighbour recombination": lambda: mixed_moments(neighbourhoods(z, 5)),
        "slerp": lambda: mixed_moments(all_paths(z, 0)),
        "slerp about the mean": lambda: mixed_moments(all_paths(z, mean)),
        "slerp between neighbours": lambda: mixed_moments(neighbour_paths(z, 5, 3)),
        "replay": lambda: (mean, biased * s),
        "replay plus noise": lambda: (mean, biased * s + 0.01 * np.trace(s) / d * np.eye(d)),
    }[name]()


@pytest.mark.parametrize("name", [n for n in PRIORS if n != "mosaic"])
def test_draws_converge_to_the_promised_mean_and_covariance(latents, name):
    mean, cov = promised(name, latents)
    rank = {"rank": 3} if name in ("PPCA", "mixture", "kernel density") else {}
    draws = make_prior(name, **rank).fit(latents).sample(DRAWS, fresh())
    scale = np.sqrt(np.diag(cov))
    # five standard errors of a mean; of a covariance with kurtosis at most Gaussian
    np.testing.assert_array_less(np.abs(draws.mean(0) - mean) / scale, 5 / np.sqrt(DRAWS))
    gap = np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)
    assert gap.max() < 5 * np.sqrt(2 / DRAWS)


@pytest.mark.parametrize("kind", [Recombination, LinearCombination])
@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_sums_of_latents_have_covariance_s_for_every_k(latents, kind, k):
    draws = kind(k=k).fit(latents).sample(DRAWS, fresh(1))
    cov = np.cov(latents, rowvar=False)
    scale = np.sqrt(np.diag(cov))
    assert (np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)).max() < 0.03


def test_recombination_of_n_minus_one_is_a_mirror_of_the_one_left_out():
    z = fresh().normal(size=(4, 6))
    draws = Recombination(k=3).fit(z).sample(50, fresh()) - z.mean(0)
    rays = z.mean(0) - z  # the sum of the others about the mean is minus the one left out
    unit = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    cosines = draws @ unit.T / np.linalg.norm(draws, axis=1, keepdims=True)
    np.testing.assert_allclose(cosines.max(axis=1), 1, atol=1e-12)


def test_linear_combination_tends_to_the_published_transform():
    """For many latents 1 / sqrt(b - a^2 / n) is 1 / sqrt(b), eq. of Bodin et al. with a known mean."""
    z = fresh().normal(size=(500, 4)) + 5
    prior = LinearCombination(k=2).fit(z)
    draws = prior.sample(40, fresh(1))
    replay = fresh(1)
    chosen = replay.permuted(np.tile(np.arange(500), (40, 1)), axis=1)[:, :2]
    w = replay.dirichlet(np.ones(2), size=40)
    root = np.sqrt(np.square(w).sum(1))[:, None]
    published = (1 - 1 / root) * z.mean(0) + np.einsum("nk,nkd->nd", w, z[chosen]) / root
    np.testing.assert_allclose(
        draws, published, rtol=0, atol=2 / 500 * np.abs(published - z.mean(0)).max()
    )


def test_neighbour_recombination_of_all_latents_is_the_global_one_with_the_covariance_over_n(many):
    local = NeighbourRecombination(k=2, neighbours=60).fit(many)
    draws = local.sample(DRAWS, fresh())
    cov = np.cov(many, rowvar=False, bias=True)
    scale = np.sqrt(np.diag(cov))
    assert (np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)).max() < 0.03


def test_neighbour_recombination_stays_in_the_cluster_of_its_latent():
    z = fresh().normal(size=(20, 50))
    z[10:] += 40
    draws = NeighbourRecombination(k=2, neighbours=6).fit(z).sample(200, fresh())
    middle = draws.mean(axis=1)
    assert (np.minimum(np.abs(middle), np.abs(middle - 40)) < 2).all()
    assert 60 < (middle > 20).sum() < 140


@pytest.mark.parametrize("neighbours", [2, 4])
def test_one_neighbour_a_draw_is_a_member_of_the_neighbourhood(latents, neighbours):
    draws = NeighbourRecombination(k=1, neighbours=neighbours).fit(latents).sample(30, fresh())
    gaps = np.abs(draws[:, None] - latents).max(axis=2).min(axis=1)
    assert gaps.max() < 1e-12


def test_isotropic_leaves_the_mean_out_of_the_variance():
    """The released estimator takes the variance of all numbers, which the mean inflates (g5)."""
    z = 100 * np.arange(50.0) + fresh().normal(size=(400, 50))
    assert Isotropic().fit(z).variance_ == pytest.approx(1, rel=0.03)
    assert IsotropicReleased().fit(z).variance_ == pytest.approx(np.var(z), rel=1e-12)


def test_the_released_prior_draws_what_the_released_line_draws(latents):
    draws = IsotropicReleased().fit(latents).sample(3, fresh(2))
    line = latents.mean(0) + latents.std() * fresh(2).standard_normal((3, 5))
    np.testing.assert_allclose(draws, line, rtol=1e-12)


# ------------------------------------------------------------------------------------ great circles


@pytest.mark.parametrize("kind", [Slerp, CentredSlerp])
def test_slerp_draws_are_points_of_the_paths_between_latents(latents, kind):
    centre = 0 if kind is Slerp else latents.mean(0)
    points = np.concatenate(all_paths(latents, centre))
    draws = kind().fit(latents).sample(200, fresh())
    gaps = np.linalg.norm(draws[:, None] - points, axis=2)
    assert gaps.min(axis=1).max() < 1e-10
    assert len(np.unique(gaps.argmin(axis=1))) > 150


def test_released_slerp_overshoots_the_mean_and_the_centred_one_does_not():
    """g4: up to 1.41 of a mean that both ends share."""
    z = fresh().normal(size=(30, 4000)) + 0.1
    middle = [
        kind(points=1).fit(z).sample(50, fresh()).mean() / z.mean()
        for kind in (Slerp, CentredSlerp)
    ]
    assert middle[0] == pytest.approx(np.sqrt(2), rel=0.03)
    assert middle[1] == pytest.approx(1, rel=0.03)


def test_slerp_between_neighbours_stays_within_a_cluster():
    """Two clusters: a path between them is empty of latents, and no draw may lie on one."""
    rng = fresh()
    z = rng.normal(size=(40, 30)) + np.repeat([[-20.0], [20.0]], 20, axis=0)
    draws = NeighbourSlerp(neighbours=4).fit(z).sample(300, rng)
    assert (np.abs(draws.mean(1)) > 15).all()
    across = CentredSlerp().fit(z).sample(300, rng).mean(1)
    assert (np.abs(across) < 15).mean() > 0.2


def test_slerp_between_one_neighbour_is_the_path_to_the_nearest(latents):
    draws = NeighbourSlerp(neighbours=1, points=1).fit(latents).sample(100, fresh())
    points = np.concatenate(neighbour_paths(latents, 1, 1))
    assert np.linalg.norm(draws[:, None] - points, axis=2).min(1).max() < 1e-10


@pytest.mark.parametrize("neighbours", [0, 12])
def test_neighbours_must_be_fewer_than_the_latents(latents, neighbours):
    with pytest.raises(ValueError, match="neighbours < n = 12"):
        NeighbourSlerp(neighbours=neighbours).fit(latents)


def test_the_wider_the_window_the_more_mosaics_are_copies():
    z = fresh().normal(size=(9, 3 * 36))
    copies = []
    for window in (0.5, 1.0, 2.0):
        draws = Mosaic(window=window, steps=20).fit(z).sample(200, fresh(1))
        copies.append((np.linalg.norm(draws[:, None] - z, axis=2).min(1) < 1e-4).mean())
    assert copies[0] < 0.1
    assert copies[0] < copies[1] < copies[2]
    assert copies[2] > 0.8


def test_mosaics_are_new_and_each_place_shows_one_latent():
    """All light or all dark pictures make some that are light on one side and dark on the other."""
    z = np.repeat([1.0, -1.0], 30)[:, None] + 0.01 * fresh().normal(size=(60, 256))
    draws = Mosaic(window=0.2, steps=20).fit(z).sample(100, fresh(1)).reshape(100, 16, 16)
    left, right = draws[:, :, :4].mean((1, 2)), draws[:, :, 12:].mean((1, 2))
    assert (left * right < 0).mean() > 0.2
    assert (np.abs(draws).reshape(100, -1).mean(1) > 0.5).all()


def test_a_mosaic_shows_latents_in_the_places_of_their_pictures():
    rng = fresh(0)
    pictures = rng.standard_normal((6, 256))
    known = {"window": 0.3, "shape": (1, 16, 16)}
    of_pictures = Mosaic(**known).fit(pictures).sample(20, fresh(1))
    # latents that are a function of pixels: the same function of the mosaic, as it shows one at a time
    of_latents = Mosaic(**known).fit(3 - 2 * pictures, pictures).sample(20, fresh(1))
    np.testing.assert_allclose(of_latents, 3 - 2 * of_pictures, atol=1e-5)
    # noise that hides the pictures changes nothing in what is chosen
    noisy = pictures + 100 * np.arange(6)[:, None]
    chosen = np.round(
        (Mosaic(**known).fit(noisy, pictures).sample(20, fresh(1)) - of_pictures) / 100
    )
    assert len(np.unique(chosen)) > 1
    with pytest.raises(ValueError, match="give one for each"):
        Mosaic(**known).fit(pictures, pictures[:5])


def test_a_mosaic_depends_on_its_own_noise_only():
    z = torch.from_numpy(fresh().normal(size=(7, 3, 8, 8))).float()
    noise = torch.from_numpy(fresh(1).normal(size=(5, 3, 8, 8))).float()
    how = {"spread": 1.0, "window": 0.6, "steps": 5}
    both = mosaic.flow(z, noise, **how)
    alone = torch.cat([mosaic.flow(z, x[None], **how) for x in noise])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_the_local_mean_is_the_posterior_mean_of_each_window():
    """Against weights written out window by window."""
    rng = torch.Generator().manual_seed(0)
    known, noisy = (torch.randn(n, 3, 6, 7, generator=rng) for n in (5, 2))
    found = mosaic.local_mean(noisy, known, noise=1.3, width=3)
    for y, x in ((0, 0), (2, 3), (5, 6)):
        window = (..., slice(max(y - 1, 0), y + 2), slice(max(x - 1, 0), x + 2))
        far = (noisy[:, None][window] - known[window]).square().sum((2, 3, 4))
        weights = torch.softmax(-far / (2 * 1.3**2), dim=1)
        torch.testing.assert_close(found[:, :, y, x], weights @ known[:, :, y, x])


@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 9, 13)])
@pytest.mark.parametrize("width", [1, 5, 11, 27, 99])
def test_windows_of_long_sides_are_summed_as_those_of_short_ones(monkeypatch, shape, width):
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    by_matrix = mosaic._window_sums(values, width)
    monkeypatch.setattr(mosaic, "LONG", 0)
    torch.testing.assert_close(mosaic._window_sums(values, width), by_matrix)


# ----------------------------------------------------------------------------- densities


def dense_law(prior, z):
    """Mean and covariance of the Gaussian priors in dense algebra, for any n and d."""
    d = z.shape[1]
    s, mean = np.cov(z, rowvar=False), z.mean(0)
    if isinstance(prior, FullGaussian):
        rho = {"none": 0.0, "ledoit_wolf": ledoit_wolf(z)[1], "oas": oas(z)[1]}.get(
            prior.shrinkage, prior.shrinkage
        )
        return mean, (1 - rho) * s + rho * np.trace(s) / d * np.eye(d)
    if isinstance(prior, PPCA):
        return principal_moments(z, prior.rank, 1)
    names = {kind: name for name, kind in PRIORS.items()}
    return promised(names[type(prior)], z)


@pytest.mark.parametrize(
    "prior",
    [
        StandardNormal(),
        Isotropic(),
        IsotropicReleased(),
        Diagonal(),
        FullGaussian("ledoit_wolf"),
        FullGaussian("oas"),
        FullGaussian(0.3),
        PPCA(1),
        PPCA(6),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("n", "d"), [(60, 7), (12, 40)])
def test_gaussian_log_densities_are_those_of_scipy(prior, n, d):
    rng = fresh(5)
    z = rng.normal(size=(n, d)) * np.geomspace(3, 0.3, d) + 1
    x = rng.normal(size=(9, d)) * 2
    mean, cov = dense_law(prior, z)
    found = clone(prior).fit(z).score_samples(x)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, multivariate_normal(mean, cov).logpdf(x), rtol=1e-9)


@pytest.mark.parametrize("shrinkage", ["none", "ledoit_wolf", "oas", 0.3])
def test_full_gaussian_density_and_draws_agree_at_small_d(many, shrinkage):
    prior = FullGaussian(shrinkage).fit(many)
    mean, cov = dense_law(prior, many)
    np.testing.assert_allclose(
        prior.score_samples(many), multivariate_normal(mean, cov).logpdf(many), rtol=1e-9
    )
    draws = prior.sample(DRAWS, fresh())
    scale = np.sqrt(np.diag(cov))
    gap = np.abs(np.cov(draws, rowvar=False) - cov) / np.outer(scale, scale)
    assert gap.max() < 5 * np.sqrt(2 / DRAWS)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_ppca_is_that_of_scikit_learn(many, rank):
    reference = PCA(rank, svd_solver="full").fit(many)
    prior = PPCA(rank).fit(many)
    x = fresh().normal(size=(8, 7)) * 5
    np.testing.assert_allclose(prior.score_samples(x), reference.score_samples(x), rtol=1e-9)
    np.testing.assert_allclose(prior.variances_, reference.explained_variance_)
    assert prior.noise_variance_ == pytest.approx(reference.noise_variance_)


def principal_reference(z, x, rank, law):
    """Log density of a scikit-learn law of whitened components times white noise, by a dense rotation."""
    pca = PCA(svd_solver="full").fit(z)
    kept, white = np.sqrt(pca.explained_variance_[:rank]), pca.explained_variance_[rank:].mean()
    law.fit(pca.transform(z)[:, :rank] / kept)
    scores = pca.transform(x)
    outside = multivariate_normal(np.zeros(z.shape[1] - rank), white).logpdf(scores[:, rank:])
    return law.score_samples(scores[:, :rank] / kept) - np.log(kept).sum() + outside


@pytest.mark.parametrize("rank", [1, 3])
def test_mixture_and_kernel_density_are_those_of_scikit_learn_in_components(many, rank):
    x = fresh().normal(size=(8, 7)) * 5
    pairs = [
        (Mixture(2, rank), GaussianMixture(2, max_iter=1000, random_state=0)),
        (KernelDensity(rank), SklearnKernelDensity(bandwidth="scott")),
        (KernelDensity(rank, bandwidth=0.2), SklearnKernelDensity(bandwidth=0.2)),
    ]
    for prior, law in pairs:
        expected = principal_reference(many, x, rank, law)
        np.testing.assert_allclose(prior.fit(many).score_samples(x), expected, rtol=1e-6)


def test_replay_noise_density_is_a_kernel_density_in_all_coordinates(latents):
    prior = ReplayNoise(scale=0.7).fit(latents)
    x = fresh().normal(size=(6, 5))
    kernel = SklearnKernelDensity(bandwidth=np.sqrt(prior.variance_)).fit(latents)
    np.testing.assert_allclose(prior.score_samples(x), kernel.score_samples(x), rtol=1e-9)


@pytest.mark.parametrize("prior", WITH_DENSITY, ids=repr)
def test_densities_integrate_to_one(prior):
    """By importance sampling from a wide Student law in three coordinates."""
    z = fresh(8).normal(size=(30, 3)) @ np.diag([2.0, 1.0, 0.7]) + 1
    prior = clone(prior).set_params(**({"rank": 2} if hasattr(prior, "rank") else {})).fit(z)
    centre, scale = z.mean(0), z.std(0) * 2 + 1
    proposal = fresh(9).standard_t(3, size=(60_000, 3))
    x = centre + scale * proposal
    t3 = np.log(2 / (np.pi * np.sqrt(3))) - 2 * np.log1p(np.square(proposal) / 3)
    ratio = np.exp(prior.score_samples(x) - (t3 - np.log(scale)).sum(axis=1))
    assert ratio.mean() == pytest.approx(1, abs=5 * ratio.std() / np.sqrt(len(ratio)))


@pytest.mark.parametrize("prior", WITHOUT_DENSITY, ids=repr)
def test_laws_on_points_and_curves_have_no_density(prior):
    assert not hasattr(prior, "score_samples")


@pytest.mark.parametrize("prior", WITH_DENSITY, ids=repr)
def test_the_density_of_a_batch_is_that_of_each_alone(many, prior):
    fitted = clone(prior).fit(many)
    x = fresh().normal(size=(5, 7)) + many.mean(0)
    alone = np.concatenate([fitted.score_samples(row[None]) for row in x])
    np.testing.assert_allclose(fitted.score_samples(x), alone, rtol=1e-10)


def test_draws_score_as_draws_of_the_same_law_should():
    """The mean log density of draws is minus the entropy of the Gaussian, d >> n too."""
    z = fresh().normal(size=(20, 120)) * np.geomspace(3, 0.1, 120)
    for prior in (PPCA(rank=4), FullGaussian("oas"), Diagonal(), Isotropic()):
        cov = dense_law(prior.fit(z), z)[1]
        entropy = 0.5 * (120 * np.log(2 * np.pi * np.e) + np.linalg.slogdet(cov)[1])
        found = prior.score_samples(prior.sample(400, fresh(1)))
        # a log density of a Gaussian has the variance d / 2
        assert found.mean() == pytest.approx(-entropy, abs=5 * np.sqrt(60 / 400))


# ------------------------------------------------------------------------------ spans and maps


COMBINATIONS = [
    FullGaussian(),
    Recombination(),
    Recombination(k=3),
    LinearCombination(k=3),
    NeighbourRecombination(k=2, neighbours=4),
    CentredSlerp(),
    NeighbourSlerp(),
    Replay(),
]


@pytest.mark.parametrize("prior", COMBINATIONS, ids=repr)
def test_draws_lie_in_the_affine_span_of_the_latents(prior):
    z = fresh().normal(size=(6, 500)) + 2
    draws = clone(prior).fit(z).sample(20, fresh(1)) - z.mean(0)
    basis = np.linalg.qr((z - z.mean(0))[:-1].T)[0]
    np.testing.assert_allclose(draws @ basis @ basis.T, draws, atol=1e-10)


@pytest.mark.parametrize("name", ["isotropic", "diagonal", "isotropic, as released"])
def test_other_priors_leave_the_span(name):
    z = fresh().normal(size=(6, 500))
    draws = make_prior(name).fit(z).sample(20, fresh(1)) - z.mean(0)
    basis = np.linalg.qr((z - z.mean(0))[:-1].T)[0]
    assert np.linalg.norm(draws @ basis) < 0.3 * np.linalg.norm(draws)


@pytest.mark.parametrize(
    "prior",
    [FullGaussian(), Recombination(), Recombination(k=4), LinearCombination(), Replay()],
    ids=repr,
)
def test_sums_of_latents_commute_with_an_affine_map(latents, prior):
    rng = fresh(5)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=7)
    before = clone(prior).fit(latents).sample(30, fresh(2)) @ a + b
    after = clone(prior).fit(latents @ a + b).sample(30, fresh(2))
    np.testing.assert_allclose(after, before, atol=1e-10)


@pytest.mark.parametrize("prior", [*COMBINATIONS, Slerp()], ids=repr)
def test_combinations_commute_with_an_isometry_into_many_coordinates(latents, prior):
    """d >> n is the small case in other coordinates; Slerp keeps the origin, the others may move."""
    frame = np.linalg.qr(fresh(6).normal(size=(400, 5)))[0].T
    shift = 0 if isinstance(prior, Slerp) and not isinstance(prior, CentredSlerp) else 3
    before = clone(prior).fit(latents).sample(30, fresh(2)) @ frame + shift
    after = clone(prior).fit(latents @ frame + shift).sample(30, fresh(2))
    np.testing.assert_allclose(after, before, atol=1e-9)


@pytest.mark.parametrize(
    "prior",
    [Isotropic(), FullGaussian("oas"), PPCA(3), Mixture(2, 3), KernelDensity(3), ReplayNoise()],
    ids=repr,
)
def test_densities_at_large_d_do_not_change_under_a_rotation(prior):
    rng = fresh(7)
    z, x = rng.normal(size=(15, 80)) * np.geomspace(3, 0.3, 80) + 1, rng.normal(size=(5, 80))
    turn = np.linalg.qr(rng.normal(size=(80, 80)))[0]
    before = clone(prior).fit(z).score_samples(x)
    after = clone(prior).fit(z @ turn + 2).score_samples(x @ turn + 2)
    np.testing.assert_allclose(after, before, rtol=1e-7)


@pytest.mark.parametrize("name", ["isotropic", "diagonal"])
def test_isotropic_and_diagonal_do_not_commute(latents, name):
    a = fresh(5).normal(size=(5, 5))
    before = make_prior(name).fit(latents).sample(30, fresh(2)) @ a
    after = make_prior(name).fit(latents @ a).sample(30, fresh(2))
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize("prior", [PPCA(4), Mixture(2, 4), KernelDensity(4)], ids=repr)
def test_components_and_noise_of_draws_have_their_variances_at_large_d(prior):
    z = fresh().normal(size=(20, 2000)) * np.geomspace(3, 0.1, 2000)
    fitted = clone(prior).fit(z)
    inside, outside = fitted._components(fitted.sample(300, fresh(1)))
    wanted = fitted._draw_scores(300, fresh(1))
    np.testing.assert_allclose(inside, wanted, atol=1e-9)
    assert outside.mean() / 1996 == pytest.approx(fitted.noise_variance_, rel=0.02)


# ------------------------------------------------------------------------------------- controls


def test_replay_gives_the_fitted_latents_to_the_last_bit(latents):
    for z in (latents, latents.astype(np.float32)):
        draws = Replay().fit(z).sample(200, fresh())
        assert {tuple(row) for row in draws} == {tuple(row) for row in z.astype(np.float64)}


def test_replay_with_noise_is_at_the_stated_distance_of_a_latent():
    z = fresh().normal(size=(10, 3000))
    draws = ReplayNoise(scale=0.2).fit(z).sample(40, fresh(1))
    nearest = np.linalg.norm(draws[:, None] - z, axis=2).min(axis=1)
    spread = np.sqrt(z.var(0, ddof=1).sum())
    np.testing.assert_allclose(nearest, 0.2 * spread, rtol=0.06)


# --------------------------------------------------------------------------- estimators and input


@pytest.mark.parametrize("name", PRIORS)
def test_priors_are_scikit_learn_estimators(latents, name):
    prior = make_prior(name)
    assert clone(prior).get_params() == prior.get_params()
    assert prior.fit(latents.astype(np.float32)) is prior
    assert prior.n_features_in_ == 5
    draws = [prior.sample(3, fresh(7)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)
    assert draws[0].shape == (3, 5)
    assert draws[0].dtype == np.float64
    assert prior.sample(0, fresh()).shape == (0, 5)


@pytest.mark.parametrize("name", PRIORS)
def test_fits_with_one_seed_are_equal(many, name):
    first, second = (make_prior(name).fit(many).sample(4, fresh(1)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", PRIORS)
def test_latents_on_disk_and_lists_give_the_same_draws(tmp_path, latents, name):
    save_file({"latent": latents[:7].reshape(7, 1, 1, 5)}, tmp_path / "0.safetensors")
    save_file({"latent": latents[7:].reshape(5, 1, 1, 5)}, tmp_path / "1.safetensors")
    expected = make_prior(name).fit(latents).sample(4, fresh())
    for given in (open_shards(tmp_path), latents.tolist()):
        np.testing.assert_array_equal(make_prior(name).fit(given).sample(4, fresh()), expected)


@pytest.mark.parametrize("prior", [FullGaussian(0.5), PPCA(2), ReplayNoise(), Diagonal()], ids=repr)
def test_fit_does_not_change_or_follow_the_callers_array(latents, prior):
    z = latents.copy()
    fitted = clone(prior).fit(z)
    np.testing.assert_array_equal(z, latents)
    before = fitted.sample(3, fresh()), fitted.score_samples(latents)
    z *= 0
    np.testing.assert_array_equal(fitted.sample(3, fresh()), before[0])
    np.testing.assert_array_equal(fitted.score_samples(latents), before[1])


def test_parameters_survive_clone_and_set_params():
    assert clone(Recombination(k=3)).k == 3
    assert Recombination().set_params(k=5).get_params() == {"k": 5}
    assert make_prior("mixture", k=3, rank=4).get_params() == {"k": 3, "rank": 4, "seed": 0}


def test_the_ladder_names_the_first_five_priors():
    assert tuple(PRIORS)[: len(LADDER)] == LADDER


@pytest.mark.parametrize(
    ("prior", "z", "match"),
    [
        ("full covariance", np.ones((1, 3)), "n >= 2"),
        ("isotropic", np.ones(3), r"\(3,\)"),
        ("diagonal", np.ones((4, 1, 2, 2)), r"\(4, 1, 2, 2\)"),
        ("full covariance", np.array([[1.0, np.nan], [0, 1]]), "NaN"),
        ("standard normal", np.array([[np.inf]]), "infinity"),
        ("recombination", np.ones((2, 3)), "k = 2"),
        ("gaussian", np.ones((2, 3)), "known are standard normal; isotropic"),
        ("slerp about the mean", np.eye(2), "n >= 3"),
        ("neighbour recombination", np.eye(4), "5 neighbours need .* n = 4"),
        ("mixture", np.eye(11, 30), r"n >= k \(rank \+ 1\) latents; n is 11"),
        ("PPCA", np.eye(4), "rank = 5, but 4 latents of 4 coordinates span 3"),
        ("kernel density", np.eye(40)[:5], "rank = 5, but 5 latents .* span 4"),
        ("PPCA", fresh().normal(size=(20, 3)) @ np.eye(3, 90) + 9, "20 latents of 90 .* span 3"),
    ],
)
def test_bad_input_is_named(prior, z, match):
    with pytest.raises(ValueError, match=match):
        make_prior(prior).fit(z)


GAUSSIANS = ["isotropic", "isotropic, as released", "diagonal", "full covariance", "PPCA"]


@pytest.mark.parametrize("name", [n for n in PRIORS if n not in ("standard normal", *GAUSSIANS)])
def test_priors_made_of_single_latents_refuse_copies_by_number(name):
    z = fresh().normal(size=(20, 9000)).astype(np.float32)
    z[[4, 9, 17], 8999] = 0.0
    z[17, :8999] = z[4, :8999]
    z[9, :8500] = z[4, :8500]
    z[17, 8999] = -0.0
    with pytest.raises(ValueError, match="latents 4 and 17 are copies"):
        make_prior(name).fit(z)
    z[17, 8999] = 1e-30
    make_prior(name).fit(z)


@pytest.mark.parametrize("name", GAUSSIANS)
def test_a_copy_is_a_weight_to_a_gaussian(many, name):
    """A bootstrap of the latents is fitted as its own sample."""
    z = many[fresh().integers(len(many), size=len(many))]
    x = fresh(1).normal(size=(4, 7)) + many.mean(0)
    mean, cov = dense_law(make_prior(name), z)
    found = make_prior(name).fit(z).score_samples(x)
    np.testing.assert_allclose(found, multivariate_normal(mean, cov).logpdf(x), rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in PRIORS if n != "standard normal"])
def test_equal_latents_are_refused(name):
    with pytest.raises(ValueError, match="all 20 latents are equal"):
        make_prior(name).fit(np.full((20, 30), 0.1))


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (Recombination(k=0), "k = 0 "),
        (Recombination(k=-1), "k = -1 "),
        (Recombination(k=12), "k = 12 "),
        (LinearCombination(k=12), "k = 12 "),
        (NeighbourRecombination(k=3, neighbours=3), "k = 3 latents of 3 neighbours"),
        (NeighbourRecombination(k=0), "k = 0 latents"),
        (Mixture(k=0), "k = 0 Gaussians"),
        (Mixture(k=3), "k = 3 Gaussians of rank = 5"),
        (PPCA(rank=0), "rank = 0, but"),
        (PPCA(rank=6), "rank = 6, but 12 latents of 5 coordinates span 5"),
        (KernelDensity(rank=2, bandwidth=-1.0), "bandwidth"),
        (FullGaussian(shrinkage="lasso"), "lasso"),
        (FullGaussian(shrinkage=1.5), "1.5"),
        (Slerp(points=0), "points is 0"),
        (ReplayNoise(scale=0), "scale is 0"),
        (Mosaic(window=0), "window is 0"),
        (Mosaic(steps=0), "steps is 0"),
        (Mosaic(shape=(1, 2, 3)), r"shape is \(1, 2, 3\); latents have 5"),
    ],
    ids=lambda x: repr(x),
)
def test_impossible_parameters_are_refused(latents, prior, match):
    with pytest.raises(ValueError, match=match):
        prior.fit(latents)


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (FullGaussian(), "4 latents of 9 coordinates give a singular covariance"),
        (PPCA(rank=3), "rank = 3 is all that the 4 latents span in 9"),
        (Diagonal(), "coordinate 5 is the same in all latents"),
    ],
    ids=repr,
)
def test_a_singular_law_draws_but_has_no_density(prior, match):
    z = fresh().normal(size=(4, 9))
    z[:, 5] = 0.1
    assert prior.fit(z).sample(2, fresh())[:, 5] == pytest.approx(0.1)
    with pytest.raises(ValueError, match=match):
        prior.score_samples(z)


@pytest.mark.parametrize("prior", WITH_DENSITY, ids=repr)
def test_a_density_refuses_latents_of_another_kind(many, prior):
    fitted = clone(prior).fit(many)
    with pytest.raises(ValueError, match="latents have 3 coordinates; the prior was fitted to 7"):
        fitted.score_samples(np.ones((2, 3)))
    with pytest.raises(ValueError, match="NaN"):
        fitted.score_samples(np.full((2, 7), np.nan))


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_that_is_not_fitted_says_so(name):
    with pytest.raises(NotFittedError):
        make_prior(name).sample(2, fresh())
