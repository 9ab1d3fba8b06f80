"""Reference-guided samplers: limits in the level of noise, closed laws on Gaussian models, seeds."""

import numpy as np
import pytest
import torch
from PIL import Image

from ood_lib.analytic import eta_response
from ood_lib.inversion import generate
from ood_lib.rivals import crdi_like, ilvr, low_pass, sdedit
from ood_lib.schedule import graded_log_sigma


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def one_each(n, seed=0):
    return [seeded(seed * 1000 + i) for i in range(n)]


@pytest.fixture(scope="module")
def square(schedule, factory):
    """Gaussian model of 4x4 images with variances from 0.01 to 1."""
    made = factory.oracle(schedule, np.geomspace(0.01, 1.0, 16))
    object.__setattr__(made.model, "sample_shape", (1, 4, 4))
    return made


def pictures(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(-0.9, 0.9, (n, 1, 4, 4)))


ALL = {
    "sdedit": lambda model, x, **options: sdedit(model, x, t=500, points=6, **options),
    "sdedit, eta 1": lambda model, x, **options: sdedit(
        model, x, t=500, points=6, eta=1.0, **options
    ),
    "ilvr": lambda model, x, **options: ilvr(model, x, factor=2, points=6, **options),
    "crdi_like": lambda model, x, **options: crdi_like(model, x, points=6, **options),
}
samplers = pytest.mark.parametrize("sampler", ALL.values(), ids=ALL)


# all


@samplers
def test_references_take_turns(square, sampler):
    made = sampler(square.model, pictures(3), n=7, generator=seeded())
    assert made.images.shape == (7, 1, 4, 4)
    assert made.images.dtype == torch.float64
    assert made.sources.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(made.timesteps) == 6


@samplers
def test_the_seed_decides(tiny, sampler):
    x = torch.zeros(2, 1, 8, 8)
    first, again, other = (sampler(tiny, x, generator=seeded(k)).images for k in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@samplers
def test_the_size_of_a_batch_does_not_matter(tiny, sampler):
    x = torch.linspace(-0.9, 0.9, 5)[:, None, None, None].expand(5, 1, 8, 8)
    whole, ones = (sampler(tiny, x, generator=seeded(), batch_size=b).images for b in (64, 1))
    torch.testing.assert_close(whole, ones, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sdedit", "sdedit, eta 1", "ilvr"])
def test_with_a_generator_each_an_image_does_not_depend_on_the_others(square, name):
    x = pictures(4)
    together = ALL[name](square.model, x, generator=one_each(4)).images
    alone = ALL[name](square.model, x[2:3], generator=one_each(4)[2:3]).images
    torch.testing.assert_close(together[2:3], alone)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"batch_size": 0},
        {"references": torch.zeros(0, 1, 4, 4)},
        {"references": torch.full((1, 1, 4, 4), 3.0)},
        {"references": torch.zeros(2, 1, 8, 8)},
        {"generator": None},
    ],
    ids=["n", "batch", "none", "range", "shape", "generator"],
)
@samplers
def test_wrong_input_is_named(square, sampler, wrong):
    options = {"references": pictures(2), "generator": seeded()} | wrong
    with pytest.raises(ValueError, match=r"\d|generator"):
        sampler(square.model, options.pop("references"), **options)


# SDEdit


def test_without_noise_sdedit_gives_the_reference_back_and_asks_no_network(square):
    x = pictures(3)
    made = sdedit(square.model, x, t=0, generator=seeded())
    assert torch.equal(made.images, x)
    assert made.nfe == 0


def test_sdedit_tends_to_the_reference(fashion, digits):
    gaps = [
        (sdedit(fashion, digits[:2], t=t, points=6, generator=seeded()).images - digits[:2]).std()
        for t in (1, 30, 300)
    ]
    assert gaps[0] < 0.02
    assert gaps[0] < gaps[1] < gaps[2]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_at_the_last_level_sdedit_is_the_models_own_sampler(fashion, digits, eta):
    x = digits[:3]
    made = sdedit(fashion, x, t=999, points=12, eta=eta, generator=seeded())
    rng = seeded()
    noise = torch.randn(x.shape, generator=rng, dtype=torch.float64)
    own = generate(
        fashion,
        noise,
        solver="ddim" if eta else "ab2",
        timesteps=made.timesteps,
        eta=eta,
        generator=rng,
    )
    assert made.nfe == own.nfe == 11
    assert (made.images - own.images).square().mean().sqrt() < 0.05 * own.images.std()


@pytest.mark.parametrize("t", [100, 400, 900])
def test_on_a_gaussian_model_sdedit_without_fresh_noise_has_a_known_law(square, t):
    """Deviations shrink like the flow; the noise that was added shrinks with them."""
    n, x = 4000, pictures(1)
    made = sdedit(square.model, x, t=t, n=n, points=120, generator=seeded()).images
    low, high = square.tau(0) ** 2, square.tau(t) ** 2
    shrink = (square.lam + low) / (square.lam + high)
    signal = square.signal(0)
    mean = square.mean + np.sqrt(shrink) * (x.numpy().ravel() / signal - square.mean)
    spread = np.sqrt(shrink * (high - low))
    got = made.reshape(n, -1).numpy() / signal
    assert np.abs((got.mean(0) - mean) / spread).max() < 4.5 / np.sqrt(n) + 0.01
    assert np.abs(got.std(0) / spread - 1).max() < 4.5 / np.sqrt(2 * n) + 0.01


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("t", [200, 700])
def test_on_a_gaussian_model_sdedit_with_fresh_noise_has_a_known_law(square, t, eta):
    """`eta_response` tells the factor from an exact latent, which is larger by the flow's growth."""
    n, x = 4000, pictures(1)
    made = sdedit(square.model, x, t=t, n=n, eta=eta, points=40, generator=seeded())
    response = eta_response(square.lam, square.model.schedule, eta=eta, timesteps=made.timesteps)
    low, high = square.tau(0) ** 2, square.tau(t) ** 2
    factor = response.factor * np.sqrt((square.lam + low) / (square.lam + high))
    signal = square.signal(0)
    mean = signal * (square.mean + factor * (x.numpy().ravel() / signal - square.mean))
    spread = np.sqrt(response.variance + signal**2 * factor**2 * (high - low))
    got = made.images.reshape(n, -1).numpy()
    assert np.abs((got.mean(0) - mean) / spread).max() < 4.5 / np.sqrt(n)
    assert np.abs(got.std(0) / spread - 1).max() < 4.5 / np.sqrt(2 * n)


@pytest.mark.parametrize("t", [-1, 1000, float("nan")])
def test_a_level_outside_the_schedule_is_named(square, t):
    with pytest.raises(ValueError, match="999"):
        sdedit(square.model, pictures(1), t=t, generator=seeded())


# ILVR


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_low_pass_is_that_of_pillow(factor):
    image = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    sides = (32 // factor, 32 // factor)
    theirs = Image.fromarray(image).resize(sides, Image.BICUBIC).resize((32, 32), Image.BICUBIC)
    ours = low_pass(torch.from_numpy(image)[None, None], factor=factor)[0, 0]
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-5)


def test_the_low_pass_keeps_planes_and_drops_a_checkerboard():
    row, column = torch.meshgrid(*2 * [torch.linspace(-1, 1, 32)], indexing="ij")
    plane, board = (row + column)[None, None], torch.ones(1, 1, 32, 32)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    inner = (..., slice(8, -8), slice(8, -8))
    assert (low_pass(plane, factor=4) - plane)[inner].abs().max() < 0.01
    assert low_pass(board, factor=4)[inner].abs().max() < 1e-3  # 0.00005: the edges reach in


@pytest.mark.parametrize("factor", [0, 3, 64])
def test_a_factor_that_does_not_divide_the_sides_is_named(fashion, digits, factor):
    with pytest.raises(ValueError, match=f"factor is {factor}"):
        ilvr(fashion, digits, factor=factor, generator=seeded())


@pytest.mark.parametrize(("factor", "eta"), [(4, 1.0), (8, 0.0)])
def test_ilvr_ends_with_the_low_pass_of_its_reference(fashion, digits, factor, eta):
    x = digits[:2]
    made = ilvr(fashion, x, factor=factor, points=20, eta=eta, generator=seeded())
    free = ilvr(fashion, x, factor=factor, points=20, eta=eta, t_stop=999, generator=seeded())
    coarse = low_pass(x.double(), factor=factor)
    gap, free_gap = (
        (low_pass(a.images, factor=factor) - coarse).square().mean().sqrt() for a in (made, free)
    )
    assert gap < 0.01
    assert free_gap > 20 * gap
    assert made.nfe == 19


def test_ilvr_that_takes_over_everything_gives_the_reference_back(square):
    x = pictures(3)
    made = ilvr(square.model, x, factor=1, points=8, generator=seeded())
    torch.testing.assert_close(made.images, x)


def test_ilvr_without_guidance_is_the_models_own_sampler(square):
    x = pictures(5)
    made = ilvr(square.model, x, factor=2, points=9, eta=0.0, t_stop=999, generator=seeded())
    noise = torch.randn(x.shape, generator=seeded(), dtype=torch.float64)
    own = generate(square.model, noise, solver="ddim", timesteps=made.timesteps)
    torch.testing.assert_close(made.images, own.images)


def test_an_earlier_stop_frees_the_low_pass(fashion, digits):
    x = digits[:2]
    coarse = low_pass(x.double(), factor=4)
    gaps = [
        (low_pass(made.images, factor=4) - coarse).square().mean()
        for t_stop in (0, 300, 700)
        for made in [ilvr(fashion, x, factor=4, points=12, t_stop=t_stop, generator=seeded())]
    ]
    assert gaps[0] < gaps[1] < gaps[2]


# additive guidance


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_on_a_gaussian_model_guidance_moves_the_mean_and_nothing_else(square, strength):
    """The guided path is the free path of the shifted start, shifted back: to rounding."""
    x = pictures(2)
    made = crdi_like(
        square.model, x, strength=strength, n=6, pairs=1, points=15, generator=seeded()
    )
    noise = torch.randn(6, 1, 4, 4, generator=seeded(), dtype=torch.float64)
    clean = x.double()[made.sources] / square.signal(0)
    shift = strength * (clean - torch.from_numpy(square.mean).view(1, 1, 4, 4))
    start = noise - square.signal(999) * shift
    free = generate(square.model, start, solver="ddim", timesteps=made.timesteps).images
    torch.testing.assert_close(made.images, free + square.signal(0) * shift)


def test_guidance_is_counted(square):
    made = crdi_like(square.model, pictures(2), n=8, pairs=3, points=11, generator=seeded())
    assert made.nfe == 10 + 10 * 2 * 3 * 2 / 8
    stopped = crdi_like(
        square.model, pictures(2), n=1, pairs=1, points=11, t_stop=999, generator=seeded()
    )
    assert graded_log_sigma(square.model.schedule, 11)[-1] == 999
    assert stopped.nfe == 10 + 2


def test_guidance_brings_a_network_to_its_reference(fashion, digits):
    x = digits[:2].double()
    free, guided = (
        crdi_like(fashion, x, strength=w, pairs=1, points=8, generator=seeded()).images
        for w in (0.0, 1.0)
    )
    assert (guided - x).square().mean() < 0.5 * (free - x).square().mean()


def test_no_pairs_are_named(square):
    with pytest.raises(ValueError, match="pairs is 0"):
        crdi_like(square.model, pictures(1), pairs=0, generator=seeded())
