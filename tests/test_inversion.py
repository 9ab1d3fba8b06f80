"""Inversion and generation against exact flows, a general ODE solver and diffusers."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ood_lib.analytic import MixtureLaw, analytic_model
from ood_lib.domains import load_images
from ood_lib.inversion import generate, invert, roundtrip
from ood_lib.models import linear_model, load_model, model_names, random_model, zero_model
from ood_lib.schedule import paper_grid, uniform_log_sigma, uniform_t

METHODS = [
    ("ddim", "current", 1),
    ("ddim", "target", 1),
    ("heun", "current", 2),
    ("ab2", "current", 2),
    ("abm2", "current", 2),
    ("leapfrog", "current", 2),
    ("fixed_point", "current", 1),
]
SOLVERS = ["ddim", "heun", "ab2", "abm2", "leapfrog"]
EXACT = ("leapfrog", "fixed_point")


def rms(values):
    return float(np.sqrt(np.mean(np.square(np.asarray(values)))))


def watched(model):
    """Copy of a model that notes the timestep of every call, and the list of them."""
    calls = []

    def predict(x_t, t):
        calls.append(float(t))
        return model.predict(x_t, t)

    return replace(model, predict=predict), calls


# against the exact flow


@pytest.mark.parametrize(("solver", "eps_at", "order"), METHODS)
def test_inversion_converges_to_the_exact_flow_at_its_order(smooth_oracle, solver, eps_at, order):
    x = smooth_oracle.images(4)
    exact = smooth_oracle.flow(x, 0, 999)
    errors = []
    for n in (401, 801, 1601):
        grid = uniform_log_sigma(smooth_oracle.schedule, n)
        made = invert(smooth_oracle.model, x, timesteps=grid, solver=solver, eps_at=eps_at)
        errors.append(rms(made.latent.numpy() - exact))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(order, abs=0.1)
    assert errors[-1] < (0.1 if order == 1 else 1e-3)


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("heun", 2), ("ab2", 2), ("abm2", 2)])
def test_generation_converges_to_the_exact_flow_at_its_order(smooth_oracle, solver, order):
    x = smooth_oracle.images(4)
    latent = torch.from_numpy(smooth_oracle.flow(x, 0, 999))
    errors = []
    for n in (201, 401, 801):
        grid = uniform_log_sigma(smooth_oracle.schedule, n)
        made = generate(smooth_oracle.model, latent, timesteps=grid, solver=solver)
        errors.append(rms(made.images - x))
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert orders[-1] == pytest.approx(order, abs=0.1)
    assert errors[-1] < (0.01 if order == 1 else 1e-4)


def test_latents_of_low_variances_lie_far_outside_the_range_of_images(oracle):
    """Nothing is clipped: along a direction of variance 1e-4 the latent is about 100 y."""
    x = oracle.images(3)
    grid = uniform_log_sigma(oracle.schedule, 1601)
    latent = invert(oracle.model, x, timesteps=grid).latent
    assert latent.abs().max() > 30
    np.testing.assert_allclose(latent, oracle.flow(x, 0, 999), rtol=1e-3, atol=1e-3)


def mixture_reference(means, variances, weights, x0, schedule):
    """Path of a mixture from sigma(0) to sigma(999), by an adaptive solver of order 8."""

    def slope(log_sigma, flat):
        sigma = np.exp(log_sigma)
        x = flat.reshape(-1, means.shape[1])
        spread = variances + sigma**2
        gaps = x[:, None] - means
        log_p = (
            np.log(weights) - 0.5 * x.shape[1] * np.log(spread) - 0.5 * (gaps**2).sum(-1) / spread
        )
        share = np.exp(log_p - log_p.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        return (sigma**2 * ((share / spread)[..., None] * gaps).sum(1)).ravel()

    signal = np.sqrt(schedule.alpha_bar[[0, -1]])
    ends = 0.5 * np.log(1 / signal**2 - 1)
    path = solve_ivp(slope, ends, (x0 / signal[0]).ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    return signal[1] * path.y[:, -1].reshape(x0.shape)


@pytest.mark.parametrize(("solver", "eps_at", "order"), METHODS)
def test_inversion_of_a_mixture_follows_its_curved_flow(schedule, solver, eps_at, order):
    means, variances = np.array([[-0.6, 0.3], [0.5, 0.0]]), np.array([0.05, 0.1])
    weights = np.array([0.4, 0.6])
    model = analytic_model(
        MixtureLaw(*map(torch.from_numpy, (means, variances, weights))), schedule
    )
    x0 = np.random.default_rng(0).uniform(-0.9, 0.9, (8, 2))
    exact = mixture_reference(means, variances, weights, x0, schedule)
    errors = []
    for n in (401, 801):
        grid = uniform_log_sigma(schedule, n)
        images = torch.from_numpy(x0).view(8, 1, 1, 2)
        made = invert(model, images, timesteps=grid, solver=solver, eps_at=eps_at)
        errors.append(rms(made.latent.flatten(1).numpy() - exact))
    assert errors[1] < (0.1 if order == 1 else 2e-3)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


# the paper's setting: gains of the Euler step, round trip, stochastic generation


@pytest.mark.parametrize(
    ("k", "gain", "back"),
    [(0, 0.83, 0.69), (1, 0.74, 0.55), (2, 0.88, 0.77), (3, 0.954, 0.91), (4, 0.979, 0.96)],
    ids=["1e-4", "1e-3", "1e-2", "0.1", "1"],
)
def test_the_papers_grid_shrinks_latents_as_derived(oracle, k, gain, back):
    """900 / 80 steps of eps_at="current": closed-form gains over the exact flow, five variances."""
    x = oracle.images(5)
    trip = roundtrip(oracle.model, x, timesteps=paper_grid(900, 80), solver="ddim")
    about = oracle.signal(900) * oracle.mean
    gains = (trip.latent.numpy() - about) / (oracle.flow(x, 0, 900) - about)
    np.testing.assert_allclose(gains[..., k], gain, atol=0.006)
    about = oracle.signal(0) * oracle.mean
    backs = (trip.images.numpy() - about) / (x.numpy() - about)
    np.testing.assert_allclose(backs[..., k], back, atol=0.006)


def euler_response(oracle, grid, eta):
    """Factor by which eta-DDIM multiplies the deviation from the mean, step by step."""
    response = np.ones_like(oracle.lam)
    for t, u in zip(grid[:0:-1], grid[-2::-1], strict=True):
        a, b = oracle.schedule.alpha_bar[[int(t), int(u)]]
        fresh = eta * np.sqrt((1 - b) / (1 - a) * (1 - a / b))
        noise = np.sqrt(1 - a) / (a * oracle.lam + 1 - a)  # eps for x - a m = 1
        x0_hat = (1 - np.sqrt(1 - a) * noise) / np.sqrt(a)
        response = response * (np.sqrt(b) * x0_hat + np.sqrt(1 - b - fresh**2) * noise)
    return response


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("n", [40, 501])
def test_mean_response_to_eta_is_the_discrete_recursion(oracle, n, eta):
    """Two latents under the same noise: their difference is the mean response, free of sampling error."""
    grid = paper_grid(500, n)
    latent = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    ends = [
        generate(
            oracle.model,
            z,
            timesteps=grid,
            solver="ddim",
            eta=eta,
            generator=torch.Generator().manual_seed(1),
        )
        for z in (latent, 0 * latent)
    ]
    response = (ends[0].images - ends[1].images).numpy().ravel()
    np.testing.assert_allclose(response, euler_response(oracle, grid, eta), rtol=1e-9)


@pytest.mark.parametrize(
    ("eta", "r"), [(0.1, 0.972), (0.2, 0.905), (0.3, 0.804), (0.5, 0.550), (1.0, 0.092)]
)
def test_stochastic_generation_pulls_to_the_mean_as_derived(factory, schedule, eta, r):
    """lambda = 0.1, t0 = 500, every step: r(eta) near (lambda / (lambda + tau^2))^(eta^2 / 2)."""
    lam, y = 0.1, 0.8
    oracle = factory.oracle(schedule, np.full(64, lam), np.zeros(64))
    latent = torch.from_numpy(oracle.flow(np.full((64, 1, 1, 64), y), 0, 500))
    draws = generate(
        oracle.model, latent, timesteps=paper_grid(500, 501), solver="ddim", eta=eta,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    closed = (lam / (lam + oracle.tau(500) ** 2)) ** (eta**2 / 2)
    error = 4 * np.sqrt(lam * (1 - r**2) / draws.numel())
    assert draws.mean() / y == pytest.approx(r, abs=error / y + 2e-3)
    assert closed == pytest.approx(r, abs=0.005)
    assert draws.var() == pytest.approx(lam * (1 - closed**2), rel=0.1)


def test_a_different_generator_draws_different_images_and_the_same_the_same(oracle):
    latent = torch.zeros(2, 1, 1, 5)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(oracle.model, latent, solver="ddim", eta=0.5, generator=generator).images

    assert torch.equal(draw(0), draw(0))
    assert (draw(0) - draw(1)).abs().min() > 0


@pytest.mark.parametrize(("solver", "eps_at"), [m[:2] for m in METHODS if m[0] not in EXACT])
def test_round_trip_error_falls_with_steps_and_is_what_it_says(smooth_oracle, solver, eps_at):
    x = smooth_oracle.images(4)
    trips = [
        roundtrip(
            smooth_oracle.model, x, solver=solver, eps_at=eps_at,
            timesteps=uniform_log_sigma(smooth_oracle.schedule, n),
        )
        for n in (51, 201)
    ]  # fmt: skip
    by_hand = np.sqrt(np.mean((trips[0].images - x).numpy() ** 2, axis=(1, 2, 3)))
    np.testing.assert_allclose(trips[0].rmse, by_hand, rtol=1e-9)
    assert (trips[1].rmse < trips[0].rmse / 2.5).all()


def trip_error(model, images):
    grid = uniform_log_sigma(model.schedule, 20)
    return float(roundtrip(model, images, timesteps=grid, solver="heun").rmse.max())


def test_smooth_networks_reconstruct_unseen_images(fashion, digits):
    """T1 says nothing of the domain: a mean and a covariance, or nothing at all, do as well."""
    linear = linear_model(load_images("fashion", split="train", like=fashion), fashion)
    for model in (fashion, linear, zero_model(fashion)):
        assert trip_error(model, digits[:2]) < 0.1


def test_an_untrained_network_needs_far_smaller_steps(fashion, digits):
    untrained = trip_error(random_model(fashion, seed=0), digits[:2])
    assert untrained > 10 * trip_error(fashion, digits[:2])


# against diffusers


@pytest.fixture(scope="module")
def schedulers(schedule):
    """DDIM and its inverse without clipping, 20 steps, with float64 levels."""
    pair = [
        c(clip_sample=False, set_alpha_to_one=False) for c in (DDIMScheduler, DDIMInverseScheduler)
    ]
    for scheduler in pair:
        scheduler.set_timesteps(20)
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alpha_bar)
        scheduler.initial_alpha_cumprod = scheduler.alphas_cumprod[0]
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return pair


def start_state(model, n=3):
    return torch.randn(n, *model.sample_shape, generator=torch.Generator().manual_seed(3)).double()


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_every_ddim_step_is_that_of_diffusers(tiny, schedulers, eta):
    scheduler, x = schedulers[0], start_state(tiny)
    for t in scheduler.timesteps[:-1].tolist():
        ours = generate(
            tiny, x, timesteps=[t - 50, t], solver="ddim", eta=eta,
            generator=torch.Generator().manual_seed(t),
        ).images  # fmt: skip
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=x.dtype)
        x = scheduler.step(tiny.eps(x, t), t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-6)


def test_ddim_generation_is_that_of_diffusers(tiny, schedulers):
    scheduler, x = schedulers[0], start_state(tiny)
    grid = scheduler.timesteps.numpy()[::-1]
    assert grid.tolist() == uniform_t(tiny.schedule, 20, t_end=950).tolist()
    ours = generate(tiny, x, timesteps=grid, solver="ddim").images
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(tiny.eps(x, t), t, x).prev_sample
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_a_last_step_to_no_noise_is_what_diffusers_adds_when_alpha_is_set_to_one(tiny, schedulers):
    """Our grid ends at level 0; theirs with set_alpha_to_one goes on to x0_hat."""
    theirs = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    theirs.set_timesteps(20)
    x = start_state(tiny)
    eps, ab = tiny.eps(x, 0), tiny.schedule.alpha_bar[0]
    expected = (x - np.sqrt(1 - ab) * eps) / np.sqrt(ab)
    torch.testing.assert_close(theirs.step(eps, 0, x).prev_sample, expected, atol=1e-4, rtol=1e-4)


def test_inversion_at_target_is_that_of_diffusers(tiny, schedulers):
    """Diffusers hands the state of level s to the network as if it were of the next level."""
    scheduler, x = schedulers[1], 0.3 * start_state(tiny).clamp(-3, 3)
    ours = invert(tiny, x, timesteps=scheduler.timesteps.numpy(), solver="ddim", eps_at="target")
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(tiny.eps(x, t), t, x).prev_sample
    torch.testing.assert_close(ours.latent, x, atol=1e-5, rtol=1e-5)


def test_inversion_at_current_is_the_released_loop(tiny):
    """Algorithm A of the paper's code: eps at the old point, x0_hat, then the new level."""
    grid, x = paper_grid(900, 12), 0.3 * start_state(tiny).clamp(-3, 3)
    ours = invert(tiny, x, timesteps=grid, solver="ddim", eps_at="current").latent
    for s, t in pairwise(grid):
        a, b = tiny.schedule.alpha_bar[[int(s), int(t)]]
        eps = tiny.eps(x, s)
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
    torch.testing.assert_close(ours, x, atol=1e-5, rtol=1e-5)


def test_both_conventions_agree_as_steps_grow(smooth_oracle):
    x, gaps = smooth_oracle.images(3), []
    for n in (101, 401, 1601):
        grid = uniform_log_sigma(smooth_oracle.schedule, n)
        both = [
            invert(smooth_oracle.model, x, timesteps=grid, solver="ddim", eps_at=e).latent
            for e in ("current", "target")
        ]
        gaps.append(rms(both[0] - both[1]))
    assert gaps[2] < 0.3 * gaps[1]
    assert gaps[1] < 0.4 * gaps[0]


# bookkeeping


@pytest.mark.parametrize(
    ("solver", "calls_a_step"), [("ddim", 1), ("heun", 2), ("ab2", 1), ("abm2", 1)]
)
def test_nfe_is_the_number_of_calls(smooth_oracle, solver, calls_a_step):
    x = smooth_oracle.images(3)
    grid = uniform_t(smooth_oracle.schedule, 7)
    model, calls = watched(smooth_oracle.model)
    made = invert(model, x, timesteps=grid, solver=solver)
    assert made.nfe == len(calls) == 6 * calls_a_step
    started = invert(model, x, timesteps=grid, solver=solver, start="sigma0")
    assert started.nfe == made.nfe + 1
    calls.clear()
    assert generate(model, made.latent, timesteps=grid, solver=solver).nfe == len(calls) == made.nfe
    calls.clear()
    assert roundtrip(model, x, timesteps=grid, solver=solver).nfe == len(calls) == 2 * made.nfe
    calls.clear()
    assert (
        invert(model, x, timesteps=grid, solver=solver, batch_size=1).nfe
        == len(calls) / 3
        == made.nfe
    )


def test_nfe_of_stochastic_generation(oracle):
    model, calls = watched(oracle.model)
    made = generate(
        model, torch.zeros(2, 1, 1, 5), timesteps=uniform_t(oracle.schedule, 9), solver="ddim",
        eta=0.4, generator=torch.Generator(),
    )  # fmt: skip
    assert (made.nfe, made.eta) == (len(calls), 0.4) == (8, 0.4)


@pytest.mark.parametrize("start", ["level0", "sigma0", "noise"])
@pytest.mark.parametrize(("solver", "eps_at"), [m[:2] for m in METHODS if m[0] != "fixed_point"])
def test_every_queried_timestep_is_on_the_schedule(smooth_oracle, solver, eps_at, start):
    x = smooth_oracle.images(2)
    model, calls = watched(smooth_oracle.model)
    for grid in (None, paper_grid(), uniform_t(smooth_oracle.schedule, 60), [0.25, 3.5, 999]):
        made = invert(
            model, x, timesteps=grid, solver=solver, eps_at=eps_at, start=start,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        generate(model, made.latent, timesteps=grid, solver=solver)
        assert made.timesteps[0] <= min(calls)
        assert max(calls) <= made.timesteps[-1] <= 999
        calls.clear()


def test_results_say_how_they_were_made(smooth_oracle):
    x, grid = smooth_oracle.images(2), uniform_t(smooth_oracle.schedule, 5)
    made = invert(smooth_oracle.model, x, timesteps=grid, solver="heun", start="sigma0")
    assert (made.solver, made.start, made.timesteps.tolist()) == ("heun", "sigma0", grid.tolist())
    back = generate(smooth_oracle.model, made.latent, timesteps=grid, solver="heun")
    assert (back.solver, back.eta, back.timesteps.tolist()) == ("heun", 0.0, grid.tolist())
    default = invert(smooth_oracle.model, x)
    assert (len(default.timesteps), default.timesteps[-1], default.solver) == (25, 999, "ab2")


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_nothing(tiny, solver, batch_size):
    x = 0.3 * start_state(tiny, 5).clamp(-3, 3)
    grid = uniform_log_sigma(tiny.schedule, 8)
    whole = roundtrip(tiny, x, timesteps=grid, solver=solver)
    split = roundtrip(tiny, x, timesteps=grid, solver=solver, batch_size=batch_size)
    single = roundtrip(tiny, x[2:3], timesteps=grid, solver=solver)
    for name in ("latent", "images", "rmse"):  # float32 kernels differ by batch in the last digits
        expected = getattr(whole, name)
        assert rms(getattr(split, name) - expected) < 1e-5 * rms(expected)
        assert rms(getattr(single, name)[0] - expected[2]) < 1e-5 * rms(expected)


def test_input_is_not_changed_and_the_state_is_float64(tiny):
    x = 0.3 * start_state(tiny).clamp(-3, 3).float()
    kept = x.clone()
    made = invert(tiny, x)
    assert torch.equal(x, kept)
    latent = made.latent.clone()
    assert generate(tiny, made.latent).images.dtype == made.latent.dtype == torch.float64
    assert torch.equal(made.latent, latent)


# starts


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.integers(0, 9990), min_size=2, max_size=12, unique=True),
    st.sampled_from(SOLVERS),
    st.integers(0, 99),
)
def test_the_zero_model_only_scales(zero, grid, solver, seed):
    grid = np.sort(grid) / 10
    x = torch.rand(2, *zero.sample_shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    factor = np.sqrt(zero.schedule.alpha_bar_at(grid[-1]) / zero.schedule.alpha_bar_at(grid[0]))
    made = invert(zero, x, timesteps=grid, solver=solver)
    near = {"rtol": 1e-12, "atol": 2e-12 if solver == "leapfrog" else 1e-13}
    torch.testing.assert_close(made.latent, factor * x.double(), **near)
    back = generate(zero, 100 * made.latent, timesteps=grid, solver=solver)
    torch.testing.assert_close(back.images, 100 * made.latent / factor, **near)


@pytest.fixture(scope="module")
def zero(tiny):
    """Model without noise."""
    return zero_model(tiny)


def test_starts_place_the_image_where_they_say(smooth_oracle):
    """Each start is level0 of another state: x, one Euler step from sigma = 0, or x plus noise."""
    x = 0.8 * smooth_oracle.images(4)
    signal, tau = smooth_oracle.signal(0), smooth_oracle.tau(0)
    mean, lam = (torch.from_numpy(a) for a in (smooth_oracle.mean, smooth_oracle.lam))
    stretch = 1 + tau**2 / (lam + tau**2)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    states = {
        "sigma0": signal * (mean + (x - mean) * stretch),
        "noise": signal * (x + tau * noise),
    }
    for start, state in states.items():
        made = invert(
            smooth_oracle.model, x, start=start, generator=torch.Generator().manual_seed(5)
        )
        same = invert(smooth_oracle.model, state, start="level0")
        torch.testing.assert_close(made.latent, same.latent, rtol=1e-9, atol=1e-9)
        assert made.start == start


def test_noise_of_an_image_does_not_depend_on_the_images_after_it(fashion, digits):
    few, many = (
        invert(
            zero_model(fashion),
            digits[:n],
            start="noise",
            generator=torch.Generator().manual_seed(2),
        ).latent
        for n in (3, 8)
    )
    assert torch.equal(few, many[:3])


# bad input


def bad_inputs():
    grid = "increasing|larger"
    return {
        "NaN": ({"images": np.nan}, "NaN"),
        "infinite": ({"images": np.inf}, "infinity"),
        "too large": ({"images": 1.5}, r"1\.5.*\[-1, 1\]"),
        "8-bit values": ({"images": 255.0}, r"255.*\[-1, 1\]"),
        "unsorted": ({"timesteps": [0, 20, 10]}, grid),
        "repeated": ({"timesteps": [0, 10, 10]}, grid),
        "decreasing": ({"timesteps": [20, 10, 0]}, grid),
        "one point": ({"timesteps": [5]}, grid),
        "no point": ({"timesteps": []}, grid),
        "two rows": ({"timesteps": [[0, 1], [2, 3]]}, grid),
        "past the end": ({"timesteps": [0, 1000]}, r"1000.*\[0, 999\]"),
        "before the start": ({"timesteps": [-20, 10]}, r"-20.*\[0, 999\]"),
        "NaN timestep": ({"timesteps": [0, np.nan, 10]}, r"\[0, 999\]"),
        "solver": ({"solver": "euler"}, "'euler'.*ddim, heun, ab2, abm2, leapfrog, fixed_point"),
        "preset": ({"preset": "best"}, "'best'.*converged, exact, paper"),
        "two grids": ({"timesteps": [0, 9], "points": 5}, "leave out points"),
        "two ends": ({"timesteps": [0, 9], "t_end": 5}, "leave out points"),
        "too few points": ({"points": 1}, "1 points"),
        "fractional end of the paper's grid": (
            {"preset": "paper", "t_end": 900.5},
            r"900\.5.*integer",
        ),
        "noise on the way": ({"eta": 0.1}, "no inverse"),
        "clipping": ({"clip_sample": True}, "no inverse"),
        "eps_at": ({"solver": "ddim", "eps_at": "next"}, "'next'.*current, target"),
        "start": ({"start": "zero"}, "'zero'.*level0, sigma0, noise"),
        "noise without generator": ({"start": "noise"}, "generator"),
        "one generator for two": (
            {"start": "noise", "generator": [torch.Generator()]},
            "1 generators for 2",
        ),
        "batch size 0": ({"batch_size": 0}, "batch_size"),
    }


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_of_invert_is_named(oracle, case):
    options, text = bad_inputs()[case]
    x = torch.full((2, 1, 1, 5), options.pop("images", 0.1))
    with pytest.raises(ValueError, match=text):
        invert(oracle.model, x, **options)


@pytest.mark.parametrize("shape", [(2, 1, 1, 4), (2, 3, 1, 5), (1, 1, 5), (5,)])
def test_wrong_shapes_are_named(oracle, shape):
    for call in (invert, generate, roundtrip):
        with pytest.raises(ValueError, match=r"\(N, 1, 1, 5\)"):
            call(oracle.model, torch.zeros(shape))


def test_an_array_instead_of_a_tensor_is_named(oracle):
    with pytest.raises(ValueError, match=r"ndarray.*[Tt]ensor|[Tt]ensor.*ndarray"):
        invert(oracle.model, np.zeros((2, 1, 1, 5)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"eta": 0.5, "solver": "ab2"}, "'ab2'"),
        ({"eta": 0.5, "solver": "heun"}, "'heun'"),
        ({"eta": 0.5, "solver": "ddim", "generator": None}, "generator"),
        ({"eta": 1.5, "solver": "ddim"}, r"1\.5.*\[0, 1\]"),
        ({"eta": -0.1, "solver": "ddim"}, r"-0\.1.*\[0, 1\]"),
        ({"eta": np.nan, "solver": "ddim"}, r"nan.*\[0, 1\]"),
        ({"end": "noise"}, "'noise'.*level0, sigma0"),
        ({"companion": torch.zeros(1, 1, 1, 5)}, "leapfrog"),
        ({"companion": torch.zeros(1, 1, 1, 4), "solver": "leapfrog"}, r"\(N, 1, 1, 5\)"),
        ({"solver": "plms"}, "'plms'.*ddim, heun, ab2"),
        ({"timesteps": [3, 1]}, "larger"),
    ],
)
def test_bad_input_of_generate_is_named(oracle, options, text):
    options = {"generator": torch.Generator(), **options}
    with pytest.raises(ValueError, match=text):
        generate(oracle.model, torch.zeros(1, 1, 1, 5), **options)


def test_latents_that_are_not_finite_are_named(oracle):
    with pytest.raises(ValueError, match="latents hold NaN"):
        generate(oracle.model, torch.full((1, 1, 1, 5), np.nan))


def test_an_option_that_a_solver_would_ignore_is_refused(oracle):
    with pytest.raises(ValueError, match="eps_at"):
        invert(oracle.model, torch.zeros(1, 1, 1, 5), solver="heun", eps_at="target")


def test_no_images_give_no_latents(oracle):
    assert invert(oracle.model, torch.zeros(0, 1, 1, 5)).latent.shape == (0, 1, 1, 5)


def test_progress_is_shown_only_when_asked_for(oracle, capsys):
    invert(oracle.model, torch.zeros(1, 1, 1, 5))
    assert capsys.readouterr().err == ""
    invert(oracle.model, torch.zeros(1, 1, 1, 5), progress=True)
    assert "25/25" in capsys.readouterr().err


# presets


def test_the_default_takes_at_most_24_calls(fashion):
    for model in (fashion, zero_model(fashion)):
        assert invert(model, torch.zeros(1, *model.sample_shape)).nfe <= 24


def test_the_papers_preset_is_the_released_loop_call_for_call(tiny):
    """79 calls to t = 900 at the old points; 80 back, the last to alpha_bar = 1."""
    model, calls = watched(tiny)
    x, grid = 0.3 * start_state(tiny, 2).clamp(-3, 3), paper_grid()
    made = invert(model, x, preset="paper")
    assert calls == grid[:-1].tolist()
    calls.clear()
    back = generate(model, made.latent, preset="paper")
    assert (calls, back.nfe) == (grid[::-1].tolist(), 80)
    y = made.latent
    for t, s in zip(grid[::-1], [*grid[-2::-1], None], strict=True):
        a = tiny.schedule.alpha_bar[int(t)]
        b = 1.0 if s is None else tiny.schedule.alpha_bar[int(s)]
        eps = tiny.eps(y, t)
        y = np.sqrt(b) * (y - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
    torch.testing.assert_close(back.images, y, atol=1e-5, rtol=1e-5)


def test_the_exact_preset_gives_images_back_bit_by_bit_on_the_lattice(
    smooth_oracle, fashion, digits
):
    """No sum is rounded, so what is left is where the image was put: half of 2**-39 at most."""
    for model, x in ((smooth_oracle.model, smooth_oracle.images(4)), (fashion, digits[:2])):
        trip = roundtrip(model, x, preset="exact")
        assert trip.rmse.max() < 1e-12
        again = roundtrip(model, trip.images, preset="exact")
        assert torch.equal(again.images, trip.images)


def test_leapfrog_without_its_companion_is_only_a_second_order_scheme(smooth_oracle):
    x = smooth_oracle.images(3)
    made = invert(smooth_oracle.model, x, preset="exact")
    alone = generate(smooth_oracle.model, made.latent, preset="exact").images
    assert 1e-9 < rms(alone - x) < 0.1


def test_fixed_point_inverts_a_ddim_step_exactly(smooth_oracle):
    x = smooth_oracle.images(3)
    trip = roundtrip(smooth_oracle.model, x, solver="fixed_point", points=40)
    assert trip.rmse.max() < 1e-5
    plain = roundtrip(smooth_oracle.model, x, solver="ddim", points=40)
    assert trip.rmse.max() < 1e-3 * plain.rmse.min()


def test_a_fixed_point_that_is_not_found_is_told(oracle):
    """Steps that double sigma do not contract where the variance is small."""
    with pytest.warns(RuntimeWarning, match=r"residual.*use more points"):
        invert(oracle.model, oracle.images(1), solver="fixed_point", points=5)


# the error estimate


@pytest.mark.parametrize("solver", [*SOLVERS, "fixed_point"])
@pytest.mark.parametrize("points", [24, 96])
def test_the_error_estimate_bounds_the_truth_on_average(oracle, smooth_oracle, solver, points):
    for law in (oracle, smooth_oracle):
        x = law.images(16)
        made = invert(law.model, x, solver=solver, points=points)
        truth = rms(made.latent.numpy() - law.flow(x, 0, 999))
        assert truth <= rms(made.error_estimate) <= 30 * truth


def test_the_error_estimate_of_a_network_bounds_its_error(fashion, digits):
    fine = invert(fashion, digits[:2], solver="heun", points=100).latent
    for options in ({}, {"preset": "exact", "points": 32}, {"solver": "ab2"}):
        made = invert(fashion, digits[:2], **options)
        assert rms(made.latent - fine) <= rms(made.error_estimate) <= 0.12


def test_latents_that_are_too_far_off_are_refused(oracle):
    x = oracle.images(4)
    good = invert(oracle.model, x, points=96)
    assert torch.equal(good.require_converged(), good.latent)
    with pytest.raises(ValueError, match=r"'ddim' with 20 points.*0\.05"):
        invert(oracle.model, x, solver="ddim", points=20).require_converged()
    with pytest.raises(ValueError, match="estimates no error"):
        invert(oracle.model, x, solver="ddim", eps_at="target").require_converged()


# levels, generators


@pytest.mark.parametrize("solver", [*SOLVERS, "fixed_point"])
def test_levels_are_the_states_on_the_way(smooth_oracle, solver):
    x, grid = smooth_oracle.images(2), uniform_t(smooth_oracle.schedule, 500)
    made = invert(smooth_oracle.model, x, solver=solver, timesteps=grid, keep_levels=True)
    assert made.levels.shape == (500, *x.shape)
    assert made.levels.dtype == torch.float32
    torch.testing.assert_close(made.levels[0], x.float(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.levels[-1], made.latent.float())
    middle = smooth_oracle.flow(x, 0, grid[250])
    assert rms(made.levels[250].numpy() - middle) < (
        0.1 if solver in ("ddim", "fixed_point") else 0.02
    )
    assert invert(smooth_oracle.model, x, solver=solver).levels is None


def test_with_a_generator_each_the_noise_of_an_image_is_its_own(fashion, digits):
    def noisy(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return invert(zero_model(fashion), digits[rows], start="noise", generator=generators).latent

    assert torch.equal(noisy([0, 1, 2])[[2, 0]], noisy([2, 0]))


# converged on every model of the zoo


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_the_default_latents_are_converged(name):
    """Median rms error at most 0.05 against Heun with 240 points, in and out of domain."""
    model = load_model(name)
    own = name.split("-")[1]
    other = "faces" if model.sample_shape[0] == 1 else "galaxies"
    for domain in (own, other):
        x = load_images(domain, n=3, split="heldout", like=model)
        fine = invert(model, x, solver="heun", points=240).latent
        error = (invert(model, x).latent - fine).square().flatten(1).mean(1).sqrt()
        assert error.median() <= 0.05


@pytest.mark.slow
def test_doubling_the_reference_moves_it_little(fashion, digits):
    fine, finer = (invert(fashion, digits[:3], solver="heun", points=n).latent for n in (240, 480))
    assert (fine - finer).square().flatten(1).mean(1).sqrt().max() <= 0.005
