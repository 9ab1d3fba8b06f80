"""Samplers of unseen domains: exact where the model is affine, honest about levels and folders."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ood_lib import sampling
from ood_lib.analytic import GaussianLaw, analytic_model
from ood_lib.features import imagenet
from ood_lib.inversion import invert
from ood_lib.models import load_model, zero_model
from ood_lib.sampling import (
    Recipe,
    ReferenceSet,
    best_level,
    level_of,
    levels_within,
    sample,
    twin,
)
from ood_lib.schedule import NoiseSchedule

SHAPE = (1, 4, 4)


@pytest.fixture(scope="module")
def model():
    return load_model("ddpm-fashion-32")


@pytest.fixture(scope="module")
def affine(model):
    """Gaussian model with a covariance of its own: its map is affine, and no multiple of I."""
    d = int(np.prod(SHAPE))
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(1)).double())
    law = GaussianLaw(
        torch.full((d,), 0.1).double(), basis[0], torch.linspace(0.01, 0.4, d).double()
    )
    return analytic_model(law, model.schedule, sample_shape=SHAPE)


def known_of(model, sigma, n=12, seed=0):
    source = torch.Generator().manual_seed(seed)
    images = 0.4 * torch.rand(n, *model.sample_shape, generator=source).double() - 0.3
    made = invert(model, images, t_end=level_of(model, sigma))
    return ReferenceSet("made up", made.latent, made.timesteps, images, images, sigma=sigma)


@pytest.mark.parametrize("sigma", [0.34, 3.0, np.inf])
@pytest.mark.parametrize("prior", ["recombination", "full covariance"])
def test_an_affine_model_adds_nothing_to_its_pixel_twin(affine, sigma, prior):
    """Chapter 06: affine maps commute with affine combinations, so that both draw the same images."""
    known, recipe = known_of(affine, sigma), Recipe(prior)
    made = sample(affine, known, recipe, n=5, rng=np.random.default_rng(3))
    same = twin(known, recipe, n=5, rng=np.random.default_rng(3))
    assert (made.images - same).abs().max() < 0.01  # what 24 calls of the solver are off


def test_a_zero_network_scales_and_scaling_commutes_with_every_draw(model):
    zero = zero_model(model)
    known, recipe = known_of(zero, 1.0), Recipe("isotropic")
    made = sample(zero, known, recipe, n=3, rng=np.random.default_rng(0))
    assert torch.allclose(
        made.images, twin(known, recipe, n=3, rng=np.random.default_rng(0)), atol=1e-3
    )


def test_a_level_is_where_noise_over_signal_is_sigma(model):
    for sigma in (0.05, 0.34, 1.0, 12.0):
        assert model.schedule.sigma(level_of(model, sigma)) == pytest.approx(sigma, rel=0.06)
    assert level_of(model, np.inf) is None


@pytest.mark.parametrize("sigma", [0.0, -1.0, 1e4, float("nan"), -np.inf])
def test_a_level_outside_the_schedule_is_refused(model, sigma):
    with pytest.raises(ValueError, match=r"levels of ddpm-fashion-32 lie from"):
        level_of(model, sigma)


def test_the_same_seed_draws_the_same_images(affine):
    known = known_of(affine, 1.0)
    first, again = (
        sample(affine, known, Recipe("isotropic"), n=4, rng=np.random.default_rng(7)) for _ in "ab"
    )
    assert torch.equal(first.images, again.images)
    assert first.images.abs().max() <= 1


@pytest.mark.parametrize(
    ("n", "held_out"), [(1, 0), (10, 5), (56, 28), (100, 28), (140, 28), (1000, 200)]
)
def test_of_a_folder_enough_images_are_held_out(model, tmp_path, monkeypatch, n, held_out):
    rng = np.random.default_rng(0)
    for k in range(n):
        pixels = rng.integers(0, 255, (32, 32), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k:03d}.png")
    asked = []
    monkeypatch.setattr(
        sampling, "get", lambda spec, **_: asked.append(spec) or _latents(spec, model)
    )
    known = sampling.references(model, str(tmp_path), sigma=0.34, points=7)
    assert len(known.images) == n - held_out
    assert len(known.heldout) == held_out
    assert (known.images[:, None] != known.heldout).flatten(2).any(2).all()
    assert (asked[0].t_end, asked[0].points) == (99, 7)


def _latents(spec, model):
    from ood_lib.domains import load_images
    from ood_lib.latents import LatentSet

    images = load_images(spec.domain, like=model)
    return LatentSet(images, images, spec, np.array([0.0, 99.0]), 1, "ab2", "current", None, None)


def test_more_references_than_there_are_are_refused(model):
    with pytest.raises(ValueError, match="n is 100000; digits has"):
        sampling.references(model, "digits", n=100_000)


@pytest.mark.parametrize(("n", "pictures", "message"), [(13, 60, "n is 13"), (14, 55, "has 55")])
def test_what_cannot_be_judged_is_refused_first(model, tmp_path, n, pictures, message):
    for k in range(pictures):
        Image.new("L", (32, 32), k).save(tmp_path / f"{k}.png")
    with pytest.raises(ValueError, match=message):
        sampling.check_judgeable(model, str(tmp_path), n=n)


def pictures_of(kind, n=40):
    """Smooth pictures of a few numbers each, or noise: mosaics of the first are as good as new."""
    source = torch.Generator().manual_seed(0)
    if kind == "noise":
        return torch.rand(n, 1, 32, 32, generator=source) * 2 - 1
    few = torch.randn(n, 1, 3, 3, generator=source)
    return torch.nn.functional.interpolate(few, (32, 32), mode="bicubic").clamp(-1, 1)


@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_the_window_is_the_widest_that_gives_new_pictures(kind):
    images = pictures_of(kind)
    known = ReferenceSet(kind, images, np.array([0.0, 99.0]), images, images)
    assert np.median(_ratio(known, known.window, images)) >= 0.9
    wider = sampling.WINDOWS[sampling.WINDOWS.index(known.window) + 1 :]
    assert all(np.median(_ratio(known, window, images)) < 0.9 for window in wider[:1])
    assert bool(wider) == (kind == "noise")  # any mosaic of smooth pictures is as new as they are


def _ratio(known, window, images):
    recipe, rng = Recipe(options={"window": window}), np.random.default_rng(0)
    made = imagenet(twin(known, recipe, n=64, rng=rng))
    fit = imagenet(images)
    others = np.sort(np.linalg.norm(fit[:, None] - fit, axis=2), axis=1)[:, 1]
    return np.linalg.norm(made[:, None] - fit, axis=2).min(axis=1) / np.median(others)


def test_draws_use_the_window_and_say_so(model):
    images = pictures_of("smooth")
    zero = zero_model(model)
    made = invert(zero, images.double(), t_end=level_of(zero, 0.1))
    known = ReferenceSet("smooth", made.latent, made.timesteps, images, images)
    drawn = sample(zero, known, Recipe(), n=2, rng=np.random.default_rng(0))
    named = Recipe(options={"window": known.window})
    assert drawn.recipe == named
    same = sample(zero, known, named, n=2, rng=np.random.default_rng(0))
    assert torch.equal(drawn.images, same.images)


def test_the_level_is_that_whose_draws_are_nearest_to_the_references(model):
    zero, images = zero_model(model), pictures_of("smooth")
    made = invert(zero, images.double(), t_end=level_of(zero, 0.2))
    good = ReferenceSet("smooth", made.latent, made.timesteps, images, images, sigma=0.2)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1)).double()
    spoilt = replace(good, latent=noise, sigma=0.06)
    assert best_level(zero, [good, spoilt]) == best_level(zero, [spoilt, good]) == 0.2


def test_a_level_is_chosen_among_those_that_the_schedule_has(model):
    late = replace(model, schedule=NoiseSchedule(np.linspace(0.99, 0.001, 1000)))
    assert levels_within(late) == [0.2]
    with pytest.raises(ValueError, match="none of"):
        levels_within(replace(model, schedule=NoiseSchedule(np.linspace(0.9, 0.001, 1000))))


def test_of_a_folder_no_more_is_inverted_than_is_asked_for(model, tmp_path):
    for k in range(60):
        Image.new("L", (32, 32), k).save(tmp_path / f"{k:02d}.png")
    spec = sampling.spec_of(model, str(tmp_path), sigma=0.2, n=10)
    beside = sampling.held_out(60)
    assert spec.n == 10 + (beside < spec.n).sum()
    assert spec.n - 1 not in beside


@pytest.mark.parametrize(
    ("copies", "message"), [(1, "two references"), (4, "are copies of others")]
)
def test_no_window_can_be_told_from_copies(copies, message):
    images = pictures_of("noise", 1).expand(copies, -1, -1, -1)
    known = ReferenceSet("copies", images, np.array([0.0, 99.0]), images, images)
    with pytest.raises(ValueError, match=message):
        twin(known, Recipe(), n=2, rng=np.random.default_rng(0))


def test_what_is_written_can_be_read_again(affine, tmp_path):
    known = known_of(affine, 1.0)
    made = sample(affine, known, Recipe("isotropic"), n=3, rng=np.random.default_rng(0))
    sampling.write(tmp_path / "out", made, known, {"kid": 0.5})
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["recipe"] == {"prior": "isotropic", "sigma": 1.0}
    assert (record["kid"], record["nfe"]) == (0.5, made.nfe)
    pixels = np.asarray(Image.open(tmp_path / "out" / "001.png"), dtype=float)
    assert np.abs(pixels / 127.5 - 1 - made.images[1, 0].numpy()).max() < 0.005
