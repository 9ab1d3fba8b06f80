"""Optimised latents against brute force, autograd, scipy's two-sample test and their own controls."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import binom, ks_2samp, ortho_group

from ood_lib import load_images, optimisation
from ood_lib.geometry import RULES, Targets, accept
from ood_lib.gram import Rows, fit_covariance
from ood_lib.optimisation import (
    STATISTICS,
    History,
    descend,
    inside,
    leave_one_out,
    optimise,
    project,
    reachable,
    reject,
    statistics,
    two_moments,
)

MOVERS = {"project": project, "descend": descend}


def law(d, power=0.0, mean=0.2, seed=None):
    """Draws of a Gaussian whose variances fall as a power of their rank, one on average."""
    lam = np.arange(1, d + 1) ** -float(power)
    lam *= d / lam.sum()
    signs = np.where(np.arange(d) // 2 % 2, mean, -mean)
    source = np.random.default_rng(seed)
    return lambda n, rng=source: signs + np.sqrt(lam) * rng.standard_normal((n, d))


@pytest.fixture(scope="module")
def small():
    """References and candidates that are noise of another mean and variance."""
    draw = law(600, power=0.5, seed=0)
    return draw(80), 0.9 * np.random.default_rng(1).normal(size=(60, 600))


def move(name, candidates, references, seed=0, **options):
    return MOVERS[name](candidates, references, rng=np.random.default_rng(seed), **options)


# --------------------------------------------------------------------- statistics


def angle(a, b):
    return np.degrees(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


def brute(z, references):
    n = len(references)
    ring = [(references[i] - z, references[(i + 1) % n] - z) for i in range(n)]
    return [
        np.linalg.norm(z),
        np.linalg.norm(references - z, axis=1).mean(),
        np.mean([angle(z, r) for r in references]),
        np.mean([angle(a, b) for a, b in ring]),
        (references @ z).std(),
    ]


def test_statistics_are_those_of_brute_force(small):
    references, z = small
    exact = [brute(x, references[:7]) for x in z[:3]]
    np.testing.assert_allclose(statistics(z[:3], references[:7]), exact, rtol=1e-9)


@pytest.mark.parametrize("n", [4, 5, 9])
def test_a_reference_is_compared_with_the_others_only(small, n):
    references = small[0][:n]
    exact = [brute(x, np.delete(references, i, axis=0)) for i, x in enumerate(references)]
    np.testing.assert_allclose(leave_one_out(references), exact, rtol=1e-9)


def test_with_all_references_the_released_means_have_the_same_expectation(small):
    references, z = small
    rules = Targets(1, 90, 60, 1, 1, 1, d=600)
    many = accept(z[:4], references, rules, n_references=40_000, rng=np.random.default_rng(0))
    np.testing.assert_allclose(many.means, statistics(z[:4], references)[:, 1:4], rtol=6e-4)


def test_references_may_lie_on_disk_in_parts_and_blocks(small):
    references, z = small
    parts = Rows((references[:30], references[30:]))
    np.testing.assert_allclose(statistics(z, parts, block=7), statistics(z, references))
    for name in MOVERS:
        whole = move(name, z, references).latents
        np.testing.assert_allclose(move(name, z, parts, block=7).latents, whole, rtol=1e-7)


def test_no_latent_leaves_the_bounds():
    rng = np.random.default_rng(0)
    references = 2 + rng.normal(size=(9, 3))
    low, high = reachable(references)
    directions = rng.normal(size=(5000, 3))
    z = np.concatenate([directions * rng.uniform(0, 5, (5000, 1)), references + 1e-3, -references])
    found = statistics(z, references)
    assert (found >= low).all()
    assert (found <= high).all()
    assert found[:, 2].min() < low[2] * 2.5
    assert low[1] == pytest.approx(cdist(references, references).sum() / 72 / 2)


def test_the_central_part_of_a_law():
    values = np.arange(2001.0)[:, None]
    held = inside(values, values)[:, 0]
    assert np.nonzero(~held)[0].tolist() == [0, 1, 1999, 2000]
    assert inside(values[:50], values[:50]).all()


@pytest.mark.parametrize("name", STATISTICS)
def test_slopes_are_those_of_autograd(small, name):
    references, z = small
    known = optimisation._references(references, 8192)
    table = optimisation._table(z[:4], references, known, 8192)
    by_square, by_inner = optimisation._slopes(table, name)
    found = 2 * by_square[:, None] * z[:4] + by_inner @ references
    x = torch.tensor(z[:4], requires_grad=True)
    r = torch.tensor(references)
    rays, inner = r - x[:, None], x @ r.T
    cosines = torch.nn.functional.cosine_similarity
    values = {
        "norm": lambda: x.norm(dim=1),
        "distance": lambda: rays.norm(dim=2).mean(1),
        "origin angle": lambda: torch.arccos(cosines(x[:, None], r, dim=2)).rad2deg().mean(1),
        "vertex angle": lambda: (
            torch.arccos(cosines(rays, rays.roll(-1, 1), dim=2)).rad2deg().mean(1)
        ),
        "inner spread": lambda: inner.std(1, correction=0),
    }
    values[name]().sum().backward()
    np.testing.assert_allclose(found, x.grad.numpy(), rtol=1e-6, atol=1e-9)


# --------------------------------------------------------------------- what all movers share


@pytest.mark.parametrize("name", MOVERS)
def test_one_latent_is_moved_as_in_a_batch(small, name):
    references, z = small
    batch, one = (move(name, x, references).latents for x in (z, z[:1]))
    np.testing.assert_allclose(batch[:1], one, rtol=1e-9)


@pytest.mark.parametrize("name", MOVERS)
def test_a_rotation_of_everything_rotates_the_result(name):
    draw = law(40, seed=0)
    references, z = draw(30), np.random.default_rng(1).normal(size=(20, 40))
    turn = ortho_group.rvs(40, random_state=0)
    found, turned = (move(name, x, y) for x, y in ((z, references), (z @ turn, references @ turn)))
    np.testing.assert_array_equal(found.indices, turned.indices)
    np.testing.assert_allclose(found.latents @ turn, turned.latents, atol=1e-7)


@pytest.mark.parametrize("name", MOVERS)
def test_the_float_type_is_kept(small, name):
    references, z = (x.astype(np.float32) for x in small)
    found = move(name, z, references)
    assert found.latents.dtype == np.float32
    exact = move(name, z.astype(float), references.astype(float)).latents
    np.testing.assert_allclose(found.latents, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MOVERS)
def test_the_history_counts(small, name):
    references, z = small
    found = move(name, z, references)
    history = found.history
    assert (history.method, history.wanted, history.candidates) == (name, 60, 60)
    assert history.accepted == len(found.latents) == len(found.indices) == history.trace[-1, 1]
    assert history.network_calls == 0
    assert history.seconds > 0
    assert history.complete == (history.rate == 1)


@pytest.mark.parametrize("name", MOVERS)
def test_memory_is_the_latents_and_a_block(name):
    rng = np.random.default_rng(0)
    references, z = (rng.normal(size=(20, 100_000)).astype(np.float32) for _ in range(2))
    tracemalloc.start()
    move(name, z, references, block=4096)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8e6 + 4e6  # the result, and some blocks


@pytest.mark.parametrize("name", MOVERS)
def test_a_thousand_candidates_take_at_most_two_seconds(name):
    draw = law(3072, seed=0)
    references, z = draw(256), np.random.default_rng(1).normal(size=(1000, 3072))
    start = time.process_time()
    assert move(name, z, references).history.complete
    assert time.process_time() - start < 2


def test_the_method_is_a_name(small):
    references, z = small
    for name, mover in MOVERS.items():
        rng = np.random.default_rng(0)
        same = mover(z, references, rng=np.random.default_rng(0)).latents
        np.testing.assert_array_equal(optimise(z, references, method=name, rng=rng).latents, same)
    kept = optimise(law(600, 0.5, seed=5)(50), references, method="reject", rng=rng)
    assert 25 < len(kept.latents) < 50
    assert not kept.history.complete


# --------------------------------------------------------------------- the closed form


def root_mean_square_distance(z, references):
    return np.sqrt(np.square(cdist(z, references)).mean(axis=1))


def test_projection_takes_norm_and_distance_of_the_references_exactly(small):
    references, z = small
    found = project(z, references, rng=np.random.default_rng(0)).latents
    others = np.square(cdist(references, references)).sum(axis=1) / 79
    lent = np.random.default_rng(0).permutation(80)[:60]
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), np.linalg.norm(references[lent], axis=1)
    )
    np.testing.assert_allclose(
        root_mean_square_distance(found, references), np.sqrt(others[lent]), rtol=1e-12
    )


def test_projection_keeps_the_direction_across_the_mean(small):
    references, z = small
    along = references.mean(axis=0) / np.linalg.norm(references.mean(axis=0))
    parts = [x - np.outer(x @ along, along) for x in (z, move("project", z, references).latents)]
    cosines = np.einsum("ij,ij->i", *parts) / np.prod([np.linalg.norm(p, axis=1) for p in parts], 0)
    np.testing.assert_allclose(cosines, 1)


def test_every_reference_lends_once_before_any_lends_again(small):
    references, _ = small
    z = np.random.default_rng(2).normal(size=(170, 600))
    norms = np.linalg.norm(move("project", z, references).latents, axis=1).round(9)
    assert sorted(np.unique(norms, return_counts=True)[1]) == [2] * 70 + [3] * 10


def test_what_no_latent_can_have_is_left_out():
    references = np.random.default_rng(0).normal(size=(4, 2))
    z = np.random.default_rng(1).normal(size=(40, 2))
    found = project(z, references, rng=np.random.default_rng(0))
    assert 0 < len(found.latents) < 40
    assert "partial" in found.history.outcome
    assert np.isfinite(found.latents).all()
    along = project(3 * references.mean(axis=0)[None], references, rng=np.random.default_rng(0))
    assert along.latents.shape == (0, 2)


# --------------------------------------------------------------------- gradients


def test_descent_reaches_each_target_of_its_own(small):
    references, z = small
    wanted = leave_one_out(references)[:60]
    found = descend(z, references, wanted, statistics=STATISTICS, tolerance=0.1)
    spread = leave_one_out(references).std(axis=0)
    gaps = np.abs(statistics(found.latents, references) - wanted[found.indices]) / spread
    assert gaps.max() <= 0.1 + 1e-6
    assert found.history.rate > 0.9


def test_descent_meets_the_centres_of_the_rules(small):
    references, z = small
    rules = Targets.from_reference(references, rng=np.random.default_rng(0))
    found = descend(z, references, rules.centres[:2], statistics=RULES[:2])
    assert found.history.complete
    assert accept(found.latents, references, rules, rng=np.random.default_rng(0)).rate > 0.9
    assert accept(z, references, rules, rng=np.random.default_rng(0)).rate < 0.3


def test_a_latent_at_its_target_stays_where_it_is(small):
    references, z = small
    found = descend(z, references, statistics(z, references)[:, :3], statistics=STATISTICS[:3])
    np.testing.assert_allclose(found.latents, z, rtol=1e-9)
    assert len(found.history.trace) == 1


def test_references_on_a_sphere_are_met(small):
    references, z = small
    sphere = references / np.linalg.norm(references, axis=1, keepdims=True)
    for name in MOVERS:
        found = move(name, z, sphere)
        assert found.history.complete, found.history.outcome
        np.testing.assert_allclose(np.linalg.norm(found.latents, axis=1), 1, rtol=1e-4)


def test_a_latent_across_all_references_can_be_moved():
    references = np.random.default_rng(0).normal(size=(20, 60)) + 0.3
    z = np.random.default_rng(1).normal(size=(5, 60))
    basis = np.linalg.qr(references.T)[0]
    z -= z @ basis @ basis.T
    assert descend(z, references, rng=np.random.default_rng(0)).history.rate > 0.5


def test_targets_that_no_latent_meets_together_leave_a_partial_result(small):
    references, z = small
    norm, distance = leave_one_out(references)[:, :2].mean(axis=0)
    both = [3 * norm, 0.9 * distance]  # each possible, but a long latent is far from all
    found = descend(z, references, both, statistics=STATISTICS[:2])
    assert found.latents.shape == (0, 600)
    assert found.history.outcome == "descend: 0 of 60 latents from 60 candidates; partial"
    assert len(found.history.trace) <= 31


def test_draws_in_the_span_of_few_references_seldom_arrive_and_shrunk_ones_do():
    draw = law(3072, seed=0)
    references, rng = draw(100), np.random.default_rng(0)
    rates = {}
    for method in ("none", "ledoit_wolf"):
        z = fit_covariance(references, method=method).sample(100, rng)
        rates[method] = descend(z, references, rng=rng).history.rate
    assert rates["none"] < 0.2
    assert rates["ledoit_wolf"] == 1


# --------------------------------------------------------------------- do they follow the law


def rejections(move_them, draw, candidates, *, n, d, batches, m=256):
    """Count, for each statistic, the batches that differ from held-out latents at 5 %."""
    rng, counts, held = np.random.default_rng(3), np.zeros(5, int), []
    for _ in range(batches):
        references, fresh, z = draw(n, rng), draw(m, rng), candidates(m, rng)
        both = np.concatenate([fresh, move_them(z, references, rng)])
        new, moved = np.split(statistics(both, references), [m])
        counts += [ks_2samp(a, b).pvalue < 0.05 for a, b in zip(moved.T, new.T, strict=True)]
        held.append(inside(moved, leave_one_out(references)).mean(axis=0))
    return counts, np.mean(held, axis=0)


def noise(d):
    return lambda m, rng: rng.standard_normal((m, d))


@pytest.mark.parametrize(("name", "columns"), [("project", [0, 1, 2, 3]), ("descend", range(5))])
def test_moved_noise_follows_the_law_of_held_out_latents(name, columns):
    mover = lambda z, r, rng: MOVERS[name](z, r, rng=rng).latents  # noqa: E731
    counts, held = rejections(mover, law(500), noise(500), n=256, d=500, batches=30)
    assert (counts[columns] <= binom.ppf(0.999, 30, 0.05)).all(), counts
    assert (held[columns] >= 0.99).all(), held


@pytest.mark.parametrize("name", MOVERS)
def test_images_lend_their_law_to_noise(name):
    """Real images are no Gaussian; nothing here asks that of them."""
    images = load_images("digits", n=512, split="all").flatten(1).numpy().astype(float)
    references, fresh = np.split(np.random.default_rng(0).permutation(images), 2)
    z = np.random.default_rng(1).normal(size=(256, images.shape[1]))
    both = np.concatenate([fresh, move(name, z, references).latents])
    new, moved = np.split(statistics(both, references)[:, :4], [256])
    for a, b in zip(new.T, moved.T, strict=True):
        assert ks_2samp(a, b).pvalue > 0.05
    assert inside(moved, leave_one_out(references)[:, :4]).mean(axis=0).min() > 0.985
    assert (two_moments(fresh, references).share > 0.95).all()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "columns"), [("project", [0, 1, 2, 3]), ("descend", range(5))])
def test_two_hundred_batches_at_the_size_of_colour_images(name, columns):
    mover = lambda z, r, rng: MOVERS[name](z, r, rng=rng).latents  # noqa: E731
    counts, held = rejections(mover, law(3072), noise(3072), n=256, d=3072, batches=200)
    assert (counts[columns] <= 21).all(), counts
    assert (held[columns] >= 0.99).all(), held


@pytest.mark.parametrize("kind", ["nothing", "wrong domain", "wrong targets"])
def test_controls_are_told_from_the_law(kind):
    other = law(500, mean=0.25, seed=9)(256)
    other *= 1.05
    targets = leave_one_out(other)[:, :2]
    movers = {
        "nothing": lambda z, r, rng: z,
        "wrong domain": lambda z, r, rng: project(z, other, rng=rng).latents,
        "wrong targets": lambda z, r, rng: (
            descend(z, r, targets, statistics=STATISTICS[:2]).latents
        ),
    }
    counts, _ = rejections(movers[kind], law(500), noise(500), n=256, d=500, batches=5)
    assert (counts[:2] == 5).all()


def test_compared_with_themselves_references_look_too_near():
    draw = law(500, seed=0)
    references = draw(30)
    itself = np.sqrt(np.square(cdist(references, references)).mean(axis=1))
    fresh = root_mean_square_distance(draw(256), references)
    others = leave_one_out(references)[:, 1]
    assert ks_2samp(itself, fresh).pvalue < 0.05 < ks_2samp(others, fresh).pvalue


# --------------------------------------------------------------------- rejection


@pytest.fixture(scope="module")
def rules():
    references = law(600, power=0.5, seed=0)(80)
    return references, Targets.from_reference(references, rng=np.random.default_rng(0))


def test_rejection_draws_until_it_has_enough(rules):
    references, targets = rules
    draw, drawn = law(600, power=0.5), []
    source = lambda m, rng: drawn.append(draw(m, rng)) or drawn[-1]  # noqa: E731
    found = reject(source, references, targets, n=100, batch=40, rng=np.random.default_rng(1))
    drawn = np.concatenate(drawn)
    assert found.history.complete
    np.testing.assert_array_equal(found.latents, drawn[found.indices])
    assert found.history.candidates == found.indices[-1] + 1
    assert found.history.trace[-1].tolist() == [found.history.candidates, 100]
    assert (np.diff(found.indices) > 0).all()
    assert 0.5 < found.history.rate < 1


def test_the_loop_stops_at_its_budget_and_says_so(rules):
    references, targets = rules
    far = lambda m, rng: 3 * rng.normal(size=(m, 600))  # noqa: E731
    found = reject(
        far, references, targets, n=5, budget=250, batch=100, rng=np.random.default_rng(0)
    )
    assert found.latents.shape == (0, 600)
    assert found.history.trace.tolist() == [[100, 0], [200, 0], [250, 0]]
    assert found.history.outcome == "reject: 0 of 5 latents from 250 candidates; partial"


def test_a_source_that_runs_dry_ends_the_loop(rules):
    references, targets = rules
    few = law(600, power=0.5, seed=3)(30)
    found = reject(lambda m, rng: few, references, targets, n=90, rng=np.random.default_rng(0))
    assert found.history.candidates == 30
    assert not found.history.complete
    with pytest.raises(ValueError, match="no candidate"):
        reject(lambda m, rng: few[:0], references, targets, n=9, rng=np.random.default_rng(0))


def test_rejection_narrows_the_law_and_random_rejection_does_not(rules):
    """At equal acceptance: what the rules do to their own domain is to cut off its tails."""
    references, targets = rules
    narrow = Targets(*targets.centres, *(targets.tolerances / 3), d=600)
    z = law(600, power=0.5, seed=4)(2000)
    rng = np.random.default_rng(0)
    kept = accept(z, references, narrow, rng=rng).accepted
    lucky = rng.permutation(kept)
    distances = statistics(z, references)[:, 1]
    assert 0.02 < kept.mean() < 0.5
    assert distances[kept].std() < 0.75 * distances.std()
    assert ks_2samp(distances[lucky], distances).pvalue > 0.01


# --------------------------------------------------------------------- two moments


@pytest.mark.parametrize("power", [0.0, 0.7])
def test_two_moments_say_nearly_all(power):
    draw = law(2000, power=power, seed=0)
    found = two_moments(draw(500), draw(200))
    np.testing.assert_allclose(found.measured, found.expected, rtol=6e-3)
    assert (found.share > 0.95).all(), found.share


def test_another_domain_with_the_same_two_moments_has_the_same_law():
    draw, lam = law(2000, mean=0.2, seed=0), np.repeat([2.0, 0.0], 1000)
    references = 0.2 + np.sqrt(lam) * np.random.default_rng(1).normal(size=(200, 2000))
    same = two_moments(draw(200), draw(200)).expected
    np.testing.assert_allclose(
        two_moments(references[100:], references[:100]).measured, same, rtol=6e-3
    )


def test_two_moments_say_less_where_there_are_few_directions():
    z = np.random.default_rng(0).normal(size=(400, 2))
    share = two_moments(z[200:], z[:200]).share
    assert share[0] == 1
    assert share[2] < 0.8


# --------------------------------------------------------------------- bad input

Z = np.random.default_rng(0).normal(size=(8, 30))
RULE = Targets(7, 90, 60, 1, 5, 5, d=30)


def seeded():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: statistics(Z[:1], Z[:3]), "3 references.*4 or more"),
        (lambda: leave_one_out(np.vstack([Z, Z[2]])), "references 2 and 8 are equal"),
        (lambda: leave_one_out(np.vstack([Z, 0 * Z[:1]])), "reference 8 is zero"),
        (lambda: statistics(0 * Z[:1], Z), "candidate 0 is zero"),
        (lambda: statistics(Z[:, :9], Z), r"\(8, 9\) and \(8, 30\)"),
        (lambda: statistics(np.full((1, 30), np.nan), Z), "NaN"),
        (lambda: inside(Z, Z, share=0), "share is 0"),
        (lambda: two_moments(Z[:1], Z[1:]), "1 latents"),
        (lambda: project(Z[0], Z, rng=seeded()), r"\(30,\)"),
        (lambda: project(Z[:0], Z, rng=seeded()), r"\(0, 30\)"),
        (lambda: project(Z, np.vstack([Z, -Z]), rng=seeded()), "mean is zero.*descend"),
        (lambda: descend(Z[:2] + 1, Z), "pass rng"),
        (lambda: descend(Z[:2], Z, rng=seeded()), "copy of a reference"),
        (lambda: descend(Z + 1, Z, rng=seeded(), statistics=["size"]), "'size'.*norm, distance"),
        (lambda: descend(Z + 1, Z, rng=seeded(), statistics=[]), r"\[\]"),
        (lambda: descend(Z + 1, Z, np.ones(3)), r"\(3,\).*\(4,\) or \(8, 4\)"),
        (
            lambda: descend(Z + 1, Z, [7, 20], statistics=["distance", "origin angle"]),
            r"origin angle is 20, but .* 4\d\.\d+ to 13\d\.\d+ .*leave_one_out",
        ),
        (lambda: descend(Z + 1, Z, [190], statistics=["vertex angle"]), "190.* 0 to 180"),
        (lambda: descend(Z + 1, Z, [np.nan], statistics=["norm"]), "norm is nan"),
        (lambda: descend(Z + 1, Z, [1.0], statistics=["distance"]), "distance is 1, but"),
        (lambda: reject(Z, Z, RULE, n=0, rng=seeded()), "n = 0"),
        (lambda: reject(Z, Z, RULE, n=1, budget=0, rng=seeded()), "budget = 0"),
        (
            lambda: reject(Z, Z, Targets(7, 200, 60, 1, 5, 5, d=30), n=1, rng=seeded()),
            "origin angle is 200, but .* -5 to 185",
        ),
        (lambda: optimise(Z, Z, method="wish", rng=seeded()), "'wish'.*project, descend, reject"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_an_outcome_is_one_line():
    history = History("project", 2, 2, 2, 0, 0.1, np.array([[2, 2]]))
    assert history.outcome == "project: 2 of 2 latents from 2 candidates; complete"
