"""The report: its level on true Gaussians, its power on planted alternatives, its answers to bad input."""

import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats
from statsmodels.stats.diagnostic import normal_ad
from statsmodels.stats.multitest import multipletests

from ood_lib import gaussianity, nulls
from ood_lib.analytic import GaussianLaw
from ood_lib.gaussianity import (
    FAMILIES,
    Report,
    Result,
    anderson_darling,
    law_at,
    report,
    shapiro_wilk,
)

sys.path.insert(0, str(ROOT / "benchmarks"))

import calibrate

SHAPE = (3, 12, 12)
FEW = {"draws": 199, "bootstrap": 59}


def normal(n=40, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).standard_normal((n, *shape))


def of(latents, *, seed=0, **options):
    return report(latents, rng=np.random.default_rng(seed), **FEW | options)


def pvalues(found):
    return {f"{x.null}.{x.name}": x.pvalue for x in found.results}


# ------------------------------------------------------------------------------------------- level


def band(repeats):
    return stats.binom.interval(0.999, repeats, 0.05)


def test_every_test_holds_its_level_on_noise():
    rng = np.random.default_rng(0)
    found = [report(normal(30, seed=i), rng=rng, draws=999, bootstrap=0) for i in range(150)]
    rejected = {key: 0 for key, p in pvalues(found[0]).items() if np.isfinite(p)}
    for one in found:
        for key in rejected:
            rejected[key] += pvalues(one)[key] <= 0.05
    low, high = band(150)
    assert len(rejected) == 30
    assert {k: v for k, v in rejected.items() if not low <= v <= high} == {}


@pytest.mark.parametrize("name", ["1/k", "60 spikes", "latents"])
def test_the_free_family_holds_its_level_for_any_covariance(name, monkeypatch):
    monkeypatch.setitem(calibrate.SHAPES, 300, (3, 10, 10))
    cell = calibrate.Cell("size", name, 40, 300, ("F3",))
    rows = calibrate._size(cell, [calibrate._one_size(cell, i) for i in range(100)])
    assert {x["test"]: x["rejected"] for x in rows if not x["inside"]} == {}
    assert len(rows) == 9


def test_unequal_variances_lie_in_the_diagonal_family_but_not_in_the_isotropic_one():
    found = of(normal() * np.linspace(0.1, 3, 12))
    assert found["F1.sphericity"].pvalue < 0.05 < found["F2.sphericity"].pvalue


def test_a_given_law_is_the_null_in_place_of_standard_normal_noise():
    rng = np.random.default_rng(0)
    basis = torch.from_numpy(np.linalg.qr(rng.normal(size=(432, 5)))[0])
    law = GaussianLaw(torch.ones(432).double(), basis, torch.full((5,), 90.0).double(), 0.3)
    draws = law.sample(40, torch.Generator().manual_seed(0))
    found, blind = of(draws, law=law), of(draws)
    assert found.combined("F0").pvalue > 0.05
    assert found["F1.sphericity"].pvalue > 0.05 > blind["F1.sphericity"].pvalue


def test_law_at_a_level_is_that_of_noised_images(schedule):
    law = GaussianLaw(
        torch.ones(3).double(), torch.eye(3)[:, :1].double(), torch.ones(1).double() * 4
    )
    there = law_at(law, schedule, 500)
    signal = schedule.alpha_bar[500]
    assert there.mean[0] == pytest.approx(signal**0.5)
    assert there.eigenvalues[0] == pytest.approx(4 * signal + 1 - signal)
    assert there.residual == pytest.approx(1 - signal)


# ------------------------------------------------------------------------------------------- power


QUICK = ("1 % of coordinates t(3)", "neighbour correlation 0.05")
PLANTED = [
    pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in calibrate.ALTERNATIVES
]


@pytest.mark.parametrize("name", PLANTED)
def test_planted_alternatives_are_found_in_every_family(name):
    found = calibrate._one_power(
        calibrate.Cell("power", name, 256, 3072, calibrate.ALTERNATIVES[name][1]), 0
    )
    combined = {k: p for k, p in found.items() if k.endswith("combined")}
    assert combined
    assert max(combined.values()) < 0.05


@pytest.mark.parametrize(
    ("spoil", "key"),
    [
        (lambda z: z * np.linspace(0.9, 1.1, len(z))[:, None, None, None], "F1.dispersion"),
        (lambda z: z + 0.3, "F0.mean"),
        (lambda z: z * 1.05, "F0.scale"),
        (lambda z: z + 0.4 * np.roll(z, 1, axis=-1), "F2.horizontal_neighbours"),
        (lambda z: z + 0.4 * np.roll(z, 1, axis=-2), "F2.vertical_neighbours"),
        (lambda z: z + 0.4 * np.roll(z, 1, axis=1), "F2.channels"),
        (lambda z: z + 0.4 * np.roll(z, (1, 1), axis=(-1, -2)), "F2.patch_correlation"),
        (lambda z: z**3, "F3.shapiro"),
        (lambda z: z**3, "F3.anderson"),
        (lambda z: z + np.sign(z[:, :1, :1, :1]) * 2, "F3.components"),
        (lambda z: z + np.abs(z[:, :1, :1, :1]) ** 3, "F3.skewness"),
    ],
)  # fmt: skip
def test_each_departure_is_seen_by_its_own_test(spoil, key):
    assert of(spoil(normal(60, (2, 10, 10))))[key].pvalue < 0.05


# ------------------------------------------------------------------------------------- invariances


def test_families_do_not_see_what_they_leave_free():
    z = normal()
    plain = of(z)
    scaled, mixed = of(3 * z - 7), of(z * np.linspace(0.1, 9, 12) + np.arange(12.0))
    for key, p in pvalues(plain).items():
        if not key.startswith("F0"):
            assert pvalues(scaled)[key] == pytest.approx(p, nan_ok=True), key
        if key.startswith("F2") or key in ("F3.shapiro", "F3.anderson"):
            assert pvalues(mixed)[key] == pytest.approx(p, nan_ok=True), key


@pytest.mark.parametrize("block", [7, 100])
def test_blocks_do_not_change_the_statistics(block, monkeypatch):
    z = normal(30).reshape(30, -1)
    one = gaussianity._read(z, np.arange(0, 30, 2), FAMILIES, np.random.default_rng(0))
    monkeypatch.setattr(gaussianity, "BLOCK", block)
    other = gaussianity._read(z, np.arange(0, 30, 2), FAMILIES, np.random.default_rng(0))
    for name in ("raw", "plain", "even", "norms", "mean"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9)
    np.testing.assert_allclose(np.array(one.pvalues), np.array(other.pvalues), rtol=1e-9)
    np.testing.assert_allclose(one.raw, z[::2] @ z[::2].T, atol=1e-9)


def test_tensors_images_and_column_readers_give_one_answer():
    z = normal()

    class Columns:
        shape = (40, 432)

        def __getitem__(self, key):
            assert key[0] == slice(None)
            return z.reshape(40, -1)[key]

    wanted = pvalues(of(z))
    for other in (torch.from_numpy(z), z.reshape(40, -1), Columns()):
        assert pvalues(of(other, shape=SHAPE)) == pytest.approx(wanted, nan_ok=True)


def test_one_seed_gives_one_report():
    assert pvalues(of(normal(), seed=3)) == pytest.approx(
        pvalues(of(normal(), seed=3)), nan_ok=True
    )


# ---------------------------------------------------------------------------------- the statistics


def ordered(x):
    return np.sort((x - x.mean(0)) / x.std(0, ddof=1), axis=0)


@pytest.mark.parametrize("n", [8, 11, 12, 50, 1000])
def test_coordinates_are_tested_as_scipy_and_statsmodels_do(n):
    x = np.exp(normal(n, (9,)) / 3)
    np.testing.assert_allclose(shapiro_wilk(ordered(x)), stats.shapiro(x, axis=0).pvalue, rtol=1e-5)
    np.testing.assert_allclose(anderson_darling(ordered(x)), normal_ad(x)[1], rtol=1e-9)


def test_coordinates_are_judged_together_by_simes_and_by_the_false_discovery_rate():
    x = np.exp(normal(50, (9,)) / 3)
    found = of(x, null="F3")["F3.shapiro"]
    simes = stats.false_discovery_control(stats.shapiro(x, axis=0).pvalue)
    assert found.pvalue == pytest.approx(simes.min(), rel=1e-5)
    assert found.effect == np.mean(simes <= 0.05)


def test_an_outlier_breaks_no_test_of_coordinates():
    x = ordered(np.r_[np.random.default_rng(0).normal(size=4999), 1e6][:, None])
    assert 0 <= anderson_darling(x)[0] < 1e-30
    assert 0 <= shapiro_wilk(x)[0] < 1e-30


def test_norms_are_tested_as_scipy_does():
    x = normal(50, (9,))
    known = stats.kstest(np.square(x).sum(1), stats.chi2(9).cdf)
    assert of(x, null="F0")["F0.norms"].pvalue == pytest.approx(known.pvalue)


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 16, 9), (3, 10, 10)])
def test_correlations_in_the_image_plane_are_those_of_their_definition(shape):
    z = normal(30, shape)
    found = of(z, null="F2")
    r = np.corrcoef(z.reshape(30, -1).T)
    place = np.stack(np.unravel_index(np.arange(z[0].size), shape), axis=1)
    step = np.abs(place[:, None] - place)
    for name, wanted in (
        ("horizontal_neighbours", (0, 0, 1)),
        ("vertical_neighbours", (0, 1, 0)),
        ("channels", (1, 0, 0)),
    ):
        here = (step == wanted).all(-1)
        if here.any():
            assert found[f"F2.{name}"].effect == pytest.approx(r[here].mean()), name
        else:
            assert not found[f"F2.{name}"].testable
    deep, wide = min(8, shape[1]), min(8, shape[2])
    cell = place // [1, deep, wide]
    full = (place[:, 1] < shape[1] // deep * deep) & (place[:, 2] < shape[2] // wide * wide)
    same = (cell[:, None] == cell).all(-1) & full[:, None] & full & (step.sum(-1) > 0)
    if deep >= wide:
        assert found["F2.patch_correlation"].effect == pytest.approx(np.abs(r[same]).mean())


def test_holm_combines_a_family_with_all_wider_ones():
    made = [
        Result("a", 0, p, 0, 9, 9, null) for p, null in ((0.03, "F1"), (0.01, "F3"), (1e-9, "F0"))
    ]
    found = Report((*made, Result("b", 0, float("nan"), 0, 9, 9, "F2")))
    adjusted = multipletests([0.03, 0.01], method="holm")[1]
    assert found.combined("F1").adjusted == pytest.approx(
        {"F1.a": adjusted[0], "F3.a": adjusted[1]}
    )
    assert found.combined("F2").pvalue == pytest.approx(0.01)
    assert found.combined("F0").pvalue == pytest.approx(3e-9)
    assert np.isnan(Report(()).combined("F3").pvalue)
    assert list(found.to_frame()["null"]) == ["F1", "F3", "F0", "F2"]


# --------------------------------------------------------------------------------- what is refused


def spoiled(value, at=(3, 4)):
    z = normal().reshape(40, -1)
    z[at] = value
    return z


@pytest.mark.parametrize(
    ("latents", "match"),
    [
        (normal(1), "1 latents say nothing"),
        (normal(2), "2 latents say nothing"),
        (normal(40)[0, 0, 0], r"shape \(12,\)"),
        (spoiled(np.nan), "latent 3 has nan at coordinate 4"),
        (spoiled(np.inf), "latent 3 has inf at coordinate 4"),
        (spoiled(1.5, (slice(None), 4)), "coordinate 4 .*same in all latents"),
        (normal()[[*range(39), 5]], "latents 5 and 39 are equal"),
        (normal().astype(int), "type int64; a Gaussian is continuous"),
        (normal() > 0, "type bool"),
    ],
)
def test_bad_latents_are_named(latents, match):
    with pytest.raises(ValueError, match=match):
        of(latents)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"null": "F4"}, r"\['F4'\]; use F0"),
        ({"shape": (1, 2, 3)}, r"\(1, 2, 3\) does not hold the 432"),
        ({"rows": 3}, "rows is 3"),
        ({"draws": 5}, "5 draws"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        of(normal().reshape(40, -1), **options)


def test_unknown_names_are_told():
    found = of(normal(), null="F0")
    with pytest.raises(ValueError, match=r"no result 'F0.size'; there are F0.norms"):
        found["F0.size"]
    with pytest.raises(ValueError, match="family is 'F9'"):
        found.combined("F9")


def test_a_law_must_fit_and_have_full_rank():
    law = GaussianLaw(torch.zeros(4).double(), torch.eye(4)[:, :2].double(), torch.ones(2).double())
    with pytest.raises(ValueError, match="4 coordinates, the latents 432"):
        of(normal(), law=law)
    with pytest.raises(ValueError, match="no variance outside its basis"):
        of(normal(40, (4,)), law=law)


def test_one_coordinate_is_tested_where_it_can_be():
    found = of(normal(60, (1,)))
    assert found["F3.shapiro"].testable
    assert found["F3.energy"].testable
    assert found["F0.norms"].testable
    assert not found["F1.dispersion"].testable
    assert found.combined("F0").pvalue > 0.05
    assert of(np.exp(normal(60, (1,)))).combined("F3").pvalue < 0.05


def test_more_latents_than_coordinates_have_a_joint_test_of_the_free_family():
    assert of(normal(60, (5,)))["F3.energy"].pvalue > 0.05
    assert not of(normal(60, (59,)))["F3.energy"].testable
    assert "n <= d + 1" in of(normal(60, (59,)))["F3.energy"].reason


def test_a_few_latents_say_which_tests_they_are_too_few_for():
    found = of(normal(9))
    assert not found["F3.components"].testable
    assert "split halves" in found["F3.components"].reason
    assert not found["F2.patch_classifier"].testable


def test_gram_matrices_hold_no_more_rows_than_asked_for():
    found = of(normal(60), rows=30, null=("F1", "F2"))
    assert {x.n for x in found.results if x.name in ("energy", "dispersion")} == {30}
    assert of(normal(60), rows=30, null="F3")["F3.shapiro"].n == 60


def test_no_matrix_of_d_by_d_is_formed():
    z = np.random.default_rng(0).standard_normal((12, 20_000), dtype=np.float32)
    nulls.null_table("gram", 12, 20_000, draws=39)
    tracemalloc.start()
    report(z, rng=np.random.default_rng(0), draws=39, bootstrap=39)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak < 25


# ------------------------------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    "name", ["isotropic", "1/k", "1/k along the coordinates", "60 spikes", "latents"]
)
def test_covariances_of_the_calibration_are_those_they_are_named_after(name):
    values = calibrate.eigenvalues(name, 1024)
    assert values.shape == (1024,)
    assert values.mean() == pytest.approx(1)
    if name != "60 spikes":
        z = calibrate.gaussian(name, 4000, 80, np.random.default_rng(0))
        wanted = calibrate.eigenvalues(name, 80).max()
        assert np.linalg.eigvalsh(np.cov(z.T))[-1] == pytest.approx(wanted, rel=0.35)


def test_alternatives_have_the_size_they_are_named_after():
    rng = np.random.default_rng(0)
    images = calibrate._neighbours(200, 3072, rng).reshape(-1, 32)
    assert np.mean(images[:, 1:] * images[:, :-1]) == pytest.approx(0.05, abs=0.005)
    binary = calibrate._binary(50, 3072, rng)
    assert np.square(binary).mean() == pytest.approx(1, abs=0.02)
    heavy = calibrate._heavy_tails(200, 3072, rng)
    assert np.square(heavy).mean() == pytest.approx(1, abs=0.02)


def test_calibration_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate, "ALTERNATIVES", {})
    monkeypatch.setattr(calibrate, "TABLES", ())
    monkeypatch.setattr(calibrate, "_one_size", lambda cell, i: {"F0.norms": i / 50})
    monkeypatch.setattr(calibrate, "ProcessPoolExecutor", lambda *a, **k: Inline())
    monkeypatch.setattr(calibrate, "SHAPES", {3072: (3, 32, 32)})
    out = tmp_path / "calibration.csv"
    monkeypatch.setattr(
        sys, "argv", ["x", "--repeats", "50", "--sizes", "9x20000", "--out", str(out)]
    )
    calibrate.main()
    first = out.read_text()
    assert "size,isotropic,9,20000,F0,norms,50,0.06" in first
    monkeypatch.setattr(calibrate, "_one_size", None)
    calibrate.main()
    assert out.read_text() == first


class Inline(SimpleNamespace):
    """A pool that works in this process."""

    def map(self, call, *items, chunksize=1):
        return map(call, *items)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False
