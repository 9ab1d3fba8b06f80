"""The benchmark of inversion: its loops are the right ones, and its summary says what was measured."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

from ood_lib.inversion import generate, invert
from ood_lib.models import model_names, zero_model
from ood_lib.schedule import paper_grid, uniform_log_sigma

sys.path.insert(0, str(ROOT / "benchmarks"))

import converged
import loops
import reconstruction
import report
import throughput
from contenders import DEFAULT, OURS, PLAIN_OURS
from inversion import finite, timed_rung

SAVED = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}
needs_azula = pytest.mark.skipif(not loops.azula_version(), reason="azula is not installed")


@pytest.fixture
def net(tiny):
    """The untrained 8x8 network as the contenders call it."""
    return loops.plain_network(tiny)


@pytest.fixture
def exact(oracle):
    """The Gaussian oracle as the contenders call it."""
    return loops.Network(oracle.model.eps, oracle.schedule)


@pytest.fixture
def pictures():
    """Three small float32 images."""
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.5


# ------------------------------------------------------------------------------------------ the loops


def test_diffusers_first_step_is_its_start_and_its_path_is_ours_at_target(net, tiny, pictures):
    made = loops.ddim_inverse(net, SAVED, False, pictures, 20)
    scheduler = loops.DDIMInverseScheduler.from_config(SAVED, clip_sample=False)
    scheduler.set_timesteps(20)
    first = scheduler.step(net(pictures, torch.tensor(0)), 0, pictures).prev_sample
    torch.testing.assert_close(made.start, first, atol=0, rtol=0)
    ours = invert(
        tiny, made.start, timesteps=np.arange(0, 1000, 50), solver="ddim", eps_at="target"
    )
    torch.testing.assert_close(made.value.double(), ours.latent, atol=1e-4, rtol=1e-4)
    assert (made.t_end, made.calls) == (950, 20)


def test_clipping_changes_where_diffusers_arrives(net, pictures):
    plain, clipped = (loops.ddim_inverse(net, SAVED, clip, pictures, 20) for clip in (False, True))
    assert (plain.value - clipped.value).abs().max() > 1e-3


@pytest.mark.parametrize("batch", [None, 1])
def test_the_papers_loop_is_our_ddim_on_its_grid(net, tiny, pictures, batch):
    made, grid = loops.paper_there(net, batch, pictures, 12), paper_grid(900, 12)
    ours = invert(tiny, pictures, timesteps=grid, solver="ddim")
    torch.testing.assert_close(made.value.double(), ours.latent, atol=1e-5, rtol=1e-5)
    assert (made.t_end, made.calls) == (900, 11)
    back = generate(tiny, made.value, timesteps=grid, solver="ddim", end="sigma0")
    again = loops.paper_back(net, made, 12)
    torch.testing.assert_close(again.double(), back.images, atol=1e-4, rtol=1e-4)


def test_a_fraction_of_a_timestep_reaches_the_network(net, tiny, pictures):
    expected = tiny.eps(pictures, 0.7)
    torch.testing.assert_close(net(pictures, 0.7), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(pictures, 0.0), expected, atol=1e-4)


@needs_azula
@pytest.mark.parametrize(
    ("kind", "log_sigma", "options", "solver"),
    [
        ("Euler", False, {}, "ddim"),
        ("DDIM", False, {}, "ddim"),
        ("Heun", True, {}, "heun"),
        ("zEAB", True, {"order": 2}, "ab2"),
    ],
)
def test_azula_backwards_is_our_solver_on_its_grid(exact, oracle, kind, log_sigma, options, solver):
    x, n = oracle.images(3), 20
    grid = uniform_log_sigma(oracle.schedule, n + 1) if log_sigma else np.linspace(0, 999, n + 1)
    ours = invert(oracle.model, x, timesteps=grid, solver=solver).latent
    made = loops.azula_there(exact, kind, log_sigma, x, n, **options)
    torch.testing.assert_close(made.value, ours, atol=1e-3, rtol=1e-3)
    assert made.calls == (2 * n if kind == "Heun" else n)
    assert loops.azula_back(exact, kind, log_sigma, made, n, **options).shape == x.shape


@pytest.mark.parametrize("log_sigma", [False, True])
def test_belm_gives_the_image_back(exact, oracle, log_sigma):
    x = oracle.images(3)
    made = loops.belm_there(exact, log_sigma, x, 9)
    assert made.calls == 8
    torch.testing.assert_close(loops.belm_back(exact, log_sigma, made, 9), x, atol=1e-10, rtol=0)


def test_belm_is_exact_where_the_path_is_a_parabola(schedule):
    """Its local error is of third order: d xbar / d sigma = 1 + 2 sigma leaves none."""
    parabola = loops.Network(
        lambda x, t: torch.full_like(x, 1 + 2 * float(schedule.sigma(t))), schedule
    )
    grid = np.array([100.0, 180.0, 400.0, 650.0])
    sigma = schedule.sigma(grid)
    states = [torch.full((1, 1, 1, 1), s + s**2, dtype=torch.float64) for s in sigma]
    made = loops.two_step(parabola, states[0], states[1], grid)
    torch.testing.assert_close(torch.stack(made), torch.stack(states[2:]), rtol=1e-12, atol=0)


def test_the_reference_follows_the_exact_flow_to_any_level(exact, smooth_oracle):
    net = loops.Network(smooth_oracle.model.eps, smooth_oracle.schedule)
    x = smooth_oracle.images(3)
    reference = loops.Reference(net, x, 240)
    for t in (0, 500, 950, 999):
        np.testing.assert_allclose(reference.at(t), smooth_oracle.flow(x, 0, t), atol=2e-3)
    heun = invert(
        smooth_oracle.model,
        x,
        timesteps=uniform_log_sigma(smooth_oracle.schedule, 240),
        solver="heun",
    )
    torch.testing.assert_close(reference.at(999), heun.latent, atol=1e-9, rtol=1e-9)


# ---------------------------------------------------------------------------------------- the summary


def rungs(name, errors, seconds, calls=(10, 20, 40)):
    return pd.DataFrame(
        {
            "contender": name,
            "group": OURS if name.startswith("ours") else "others",
            "points": calls,
            "calls": calls,
            "latent_rmse": errors,
            "seconds": seconds,
        }
    )


def test_the_decisive_rung_is_the_first_that_reaches_the_goal():
    best = report.decisive(rungs("a", [0.3, 0.05, 0.01], [1.0, 2.0, 4.0]))
    assert (best.points, best.seconds, best.reached) == (20, 2.0, True)


def test_the_best_rung_stands_in_where_the_goal_is_never_reached():
    best = report.decisive(rungs("a", [0.3, 0.2, math.nan], [1.0, 2.0, 4.0]))
    assert (best.points, best.reached) == (20, False)


def test_ratios_are_to_our_default_and_need_its_accuracy():
    rows = pd.concat(
        [
            rungs(DEFAULT, [0.04], [0.5], [23]),
            rungs(PLAIN_OURS, [0.06], [1.0], [23]),
            rungs("ours, quick", [0.3, 0.05, 0.01], [0.1, 0.2, 0.4]),
            rungs("paper's loop, batched", [0.3, 0.2, 0.05], [1.0, 2.0, 4.0]),
            rungs("never", [0.3, 0.2, 0.1], [1.0, 2.0, 4.0]),
        ]
    )
    best = report.compare(rows).set_index("contender")
    assert best.times_ours.tolist() == [1.0, 2.0, 0.4, 8.0, 8.0]
    assert best.times_ours_quickest["never"] == pytest.approx(20)
    assert best.met["paper's loop, batched"] == "no"
    assert best.times_ours_same_net["never"] == 4.0
    assert math.isnan(best.times_ours_same_net["paper's loop, batched"])


def test_a_long_contender_is_timed_at_a_shorter_rung():
    rows = rungs("a", [0.3, 0.2, 0.01], [1.0, 2.0, 4.0], (20, 50, 500))
    assert timed_rung(rows).points == 50
    assert timed_rung(rows.assign(latent_rmse=[0.3, 0.04, 0.01])).points == 50
    assert timed_rung(rows.assign(latent_rmse=[0.01, 0.04, 0.01])).points == 20
    assert timed_rung(rows.iloc[2:]).points == 500


def test_what_is_not_a_number_becomes_null():
    made = finite({"a": [math.nan, np.float64(1.5), np.int64(2)], "b": {"c": math.inf}})
    assert made == {"a": [None, 1.5, 2], "b": {"c": None}}
    assert type(made["a"][2]) is int


def test_traffic_counts_what_is_neither_a_product_nor_a_view():
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.SiLU(), torch.nn.Flatten())
    moved, largest = throughput.count_traffic(network, torch.zeros(5, 2, 4, 4))
    assert moved == 2 * 4 * (5 * 3 * 4 * 4)
    assert largest == 4 * (5 * 3 * 4 * 4)


@pytest.mark.slow
def test_a_quick_run_writes_json_and_figure(tiny_folder, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "inversion.py"), "--quick"]
    command += ["--model", str(tiny_folder), "--domains", "fashion", "digits"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    made = json.loads((tmp_path / "inversion.json").read_text())
    assert {row["contender"] for row in made["rows"]} >= {DEFAULT, "paper's loop, batched"}
    assert all(row["calls"] > 0 and row["seconds"] > 0 for row in made["rows"])
    assert made["network_calls"][0]["rows"][0]["times_plain"] == 1
    assert bool(made["settings"]["missing"]) == (loops.azula_version() is None)
    assert (tmp_path / "inversion.png").stat().st_size > 10_000
    assert "Time to a latent error" in done.stdout


# ------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("calls", reconstruction.CALLS)
def test_each_solver_takes_the_calls_that_it_is_given(tiny, calls):
    blank = torch.zeros(1, *tiny.sample_shape)
    for options in reconstruction.settings(tiny, calls).values():
        assert invert(zero_model(tiny), blank, **options).nfe == calls


def test_the_zero_network_errs_on_neither_axis(tiny, pictures):
    found = pd.DataFrame(reconstruction.lines(zero_model(tiny), {"a": pictures}, "level0"))
    assert len(found) == 4 * len(reconstruction.CALLS)
    assert found.latent_error.max() < 1e-9
    assert found.round_trip.max() < 1e-9


def test_the_table_of_chapter_08_holds_every_axis():
    table = pd.read_csv(reconstruction.TABLE)
    sizes = table.groupby(reconstruction.KEYS).size()
    assert set(sizes) == {4 * len(reconstruction.CALLS) * len(reconstruction.UNSEEN)}
    assert len(sizes) == 5 * len(reconstruction.STARTS)


def test_the_default_is_converged_on_seen_and_unseen_sets_of_every_model():
    table = pd.read_csv(converged.TABLE)
    default = table[table.setting == "default"]
    assert (default.calls <= 24).all()
    assert (default.median_rmse <= 0.05).all()
    seen = default.domain == default.model.str.split("-").str[1]
    assert set(default[seen].model) == set(default[~seen].model) == set(model_names())
