"""Sweeps: grids with mistakes are refused by name, jobs are done once, tables are the same again."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from ood_lib import sampling, sweep
from ood_lib.files import project_root
from ood_lib.latents import LatentSpec
from ood_lib.sweep import Grid, arguments_of, path_of, plan, read_grid, run, run_cell, write_table

ROOT = project_root()


@pytest.fixture
def pictures(tmp_path):
    """Folder of 60 smooth pictures."""
    folder, rng = tmp_path / "blobs", np.random.default_rng(0)
    folder.mkdir()
    for k, few in enumerate(rng.integers(0, 255, (60, 3, 3), dtype=np.uint8)):
        Image.fromarray(few).resize((8, 8), Image.Resampling.BICUBIC).save(folder / f"{k:02d}.png")
    return folder


@pytest.fixture
def grid(project, pictures):
    (project / "workflow").symlink_to(ROOT / "workflow", target_is_directory=True)
    sweep._model.cache_clear()
    yield Grid(
        ("tiny",), (str(pictures),), ("mosaic", "isotropic"), ("ddim",), (0,), 20, 14, 3, 1.0
    )
    sweep._model.cache_clear()


def written(folder, text):
    path = folder / "grid.yaml"
    path.write_text(text)
    return path


def as_yaml(grid):
    return json.dumps({k: getattr(grid, k) for k in Grid.__dataclass_fields__})


# ------------------------------------------------------------------------------------- the grid


def test_a_grid_is_read_as_it_was_written(grid, tmp_path):
    assert read_grid(written(tmp_path, as_yaml(grid))) == grid


def test_the_example_is_a_grid():
    whole = read_grid(ROOT / "examples" / "grid.yaml")
    assert len(whole.cells()) == 16
    assert len({path_of(Path("out"), whole, cell) for cell in whole.cells()}) == 16


def test_a_model_does_not_meet_its_own_domain():
    cells = Grid(("ddpm-fashion-32", "ddpm-digits-32"), ("fashion", "digits")).cells()
    assert [(c.model, c.domain) for c in cells] == [
        ("ddpm-fashion-32", "digits"),
        ("ddpm-digits-32", "fashion"),
    ]


WRONG = {
    "models: [ddpm-fashion-32]\ndomain: [digits]": "unknown key 'domain'; did you mean 'domains'",
    "models: [ddpm-fashion-32]": "lacks domains",
    "- digits": "no mapping",
    "models: [": "no YAML",
    "models: [ddpm-fashion-32]\ndomains: [digits]\npriors: [mosaik]": "'mosaik'; did you mean 'mosaic'",
    "models: [ddpm-fashion-32]\ndomains: [digits]\nsolvers: [leapfrog]": "known are ab2",
    "models: [ddpm-fashion-32]\ndomains: [digits]\nseeds: [zero]": "list of int",
    "models: [ddpm-fashion-32]\ndomains: [digits]\nseeds: [0, 1, 0]": "0 twice; two jobs",
    "models: [ddpm-fashion-32]\ndomains: []": "list of str",
    "models: [ddpm-fashion-32]\ndomains: [digits]\ndraws: 2": "draws is 2",
    "models: [ddpm-fashion-32]\ndomains: [digits]\nsigma: -1": "sigma is -1",
    "models: [ddpm-fashion-32]\ndomains: [fashion]": "no job",
    "models: [ddpm-fashion-33]\ndomains: [digits]": "ddpm-fashion-33",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_a_wrong_grid_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_grid(written(tmp_path, text))


@pytest.mark.parametrize("count", [0, 30])
def test_a_domain_that_is_empty_or_too_small_is_refused_first(grid, tmp_path, count):
    (tmp_path / "few").mkdir()
    for k in range(count):
        Image.new("L", (8, 8), k).save(tmp_path / "few" / f"{k}.png")
    small = replace(grid, domains=(str(tmp_path / "few"),))
    with pytest.raises(ValueError, match="few"):
        read_grid(written(tmp_path, as_yaml(small)))


@pytest.mark.parametrize("name", ["../../escape", "/abs/olute", "a b/ü"])
def test_no_name_leaves_the_folder(tmp_path, name):
    grid = Grid((name,), (name,))
    cell = sweep.Cell(name, name, "mosaic", "ab2", 0)
    assert path_of(tmp_path, grid, cell).resolve().parent == tmp_path.resolve() / "cells"


def test_other_settings_have_other_files(grid):
    cell = grid.cells()[0]
    assert path_of(Path(), grid, cell) != path_of(Path(), replace(grid, draws=20), cell)
    assert path_of(Path(), grid, cell) == path_of(Path(), replace(grid, seeds=(0, 1)), cell)


# ------------------------------------------------------------------------------------- jobs


def test_a_job_is_done_once_and_its_row_is_what_the_library_says(grid, tmp_path, monkeypatch):
    cell = grid.cells()[0]
    first = run_cell(tmp_path, grid, cell)
    row, content = json.loads(str(np.load(first)["row"])), first.read_bytes()
    known = grid.known(cell)
    drawn = sweep.sample(
        sweep._model("tiny"),
        known,
        sweep.Recipe(cell.prior),
        n=grid.draws,
        rng=np.random.default_rng(cell.seed),
    )
    assert row["kid"] == sweep.quality(drawn.images, known).kid.value
    assert (row["references"], row["draws"], row["nfe"]) == (20, 14, 2)
    assert (row["window"], row["sigma"]) == (known.window, 1.0)
    without = sweep.twin(
        known, sweep.Recipe(cell.prior), n=grid.draws, rng=np.random.default_rng(cell.seed)
    )
    assert row["twin_kid"] == sweep.quality(without, known).kid.value
    monkeypatch.setattr(sweep, "sample", None)
    assert run_cell(tmp_path, grid, cell).read_bytes() == content


def test_the_plan_counts_the_calls_that_are_made(grid, tmp_path):
    before = plan(grid, tmp_path)
    assert (before.jobs, before.done) == (2, 0)
    assert before.calls == 2 * (37 + 2 * 14)  # pictures until 20 are not held out, once
    run_cell(tmp_path, grid, grid.cells()[0])
    assert plan(grid, tmp_path).done == 1
    assert plan(grid, tmp_path).calls == 2 * 14


def test_a_full_disk_leaves_what_was_there(grid, tmp_path, monkeypatch):
    first, second = grid.cells()
    kept = run_cell(tmp_path, grid, first).read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        run_cell(tmp_path, grid, second)
    assert path_of(tmp_path, grid, first).read_bytes() == kept
    assert not path_of(tmp_path, grid, second).exists()


def test_a_table_needs_every_job(grid, tmp_path):
    run_cell(tmp_path, grid, grid.cells()[0])
    with pytest.raises(ValueError, match="1 cells have no file"):
        write_table(tmp_path, grid)
    run_cell(tmp_path, grid, grid.cells()[1])
    table = pd.read_parquet(write_table(tmp_path, grid))
    assert list(table.prior) == ["mosaic", "isotropic"]
    assert table.kid.notna().all()


def test_the_page_shows_every_pair_and_describes_its_figures(grid, tmp_path):
    for cell in grid.cells():
        run_cell(tmp_path, grid, cell)
    write_table(tmp_path, grid)
    page = sweep.report(tmp_path)
    article = BeautifulSoup(page.read_text("utf-8"), "html.parser").find("article")
    text = article.get_text(" ")
    assert "2 cells: 1 models, 1 domains, 2 priors" in text
    assert "isotropic" in text
    assert not any(x in text for x in ("Traceback", "np.float64(", "tensor(", str(tmp_path)))
    figures = article.find_all("img")
    assert len(figures) == 2
    assert all(len(x["alt"]) > 20 and (page.parent / x["src"]).is_file() for x in figures)


# ------------------------------------------------------------------------------------- Snakemake


def test_a_sweep_runs_and_a_second_one_has_nothing_to_do(grid, tmp_path):
    file, out = written(tmp_path, as_yaml(grid)), tmp_path / "out"
    table = pd.read_parquet(run(file, out, progress=False))
    times = {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.npz")}
    assert len(times) == len(table) == 2
    run(file, out, progress=False)
    assert times == {p: p.stat().st_mtime_ns for p in (out / "cells").glob("*.npz")}


def test_a_job_that_fails_is_said_and_the_others_finish(grid, tmp_path):
    out = tmp_path / "out"
    (out / "cells").mkdir(parents=True)
    blocked = path_of(out, grid, grid.cells()[0])
    blocked.with_suffix(".npz").mkdir()  # a folder in the place of the file
    with pytest.raises(RuntimeError, match="1 of 2 jobs are missing"):
        run(written(tmp_path, as_yaml(grid)), out, progress=False)
    assert path_of(out, grid, grid.cells()[1]).is_file()


def test_an_unknown_profile_is_refused(grid, tmp_path):
    with pytest.raises(ValueError, match="'slurn'; did you mean 'slurm'"):
        run(written(tmp_path, as_yaml(grid)), tmp_path / "out", profile="slurn")


@pytest.mark.parametrize("profile", ["local", "slurm", "kubernetes"])
def test_every_profile_can_plan(profile):
    command = sweep.command_of(ROOT / "examples" / "grid.yaml", Path("runs/none"), profile=profile)
    done = subprocess.run([*command, "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^total +22$", done.stdout + done.stderr, re.MULTILINE)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_table(grid, tmp_path):
    """Ten times the whole group of processes gets SIGKILL; no file that was there is written again.

    A file that is written anew has another inode; Snakemake touches those that a job has left as they were.
    """
    grid = replace(grid, seeds=(0, 1, 2), domains=grid.domains)
    file = written(tmp_path, as_yaml(grid))
    undisturbed = pd.read_parquet(run(file, tmp_path / "whole", progress=False))
    shutil.rmtree(project_root() / "runs" / "latents")
    out, rng, seen = tmp_path / "killed", random.Random(0), {}
    command = sweep.command_of(file, out)
    for _ in range(10):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(2, 25))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {
            p.name: p.stat().st_ino for p in (out / "cells").glob("*.npz") if ".part." not in p.name
        }
        assert all(now.get(name) == inode for name, inode in seen.items())
        seen = now
    pd.testing.assert_frame_equal(pd.read_parquet(run(file, out, progress=False)), undisturbed)
    assert all((out / "cells" / name).stat().st_ino == inode for name, inode in seen.items())


def test_the_arguments_of_ood_invert_name_model_and_domain():
    assert arguments_of(LatentSpec("m", "d", n=3)) == ["m", "d", "--n", "3"]
    assert sys.executable in sweep.command_of(Path("grid.yaml"), Path("out"))


def test_a_grid_without_a_level_takes_the_one_that_is_chosen(grid, tmp_path, monkeypatch):
    free, asked = replace(grid, sigma=None), []
    monkeypatch.setattr(
        sampling, "best_level", lambda model, sets: asked.append(len(sets)) or sets[1].sigma
    )
    for cell in free.cells():
        row = json.loads(str(np.load(run_cell(tmp_path, free, cell))["row"]))
        assert row["sigma"] == sampling.LEVELS[1]
    assert asked == [3]  # once for both priors
    assert plan(free, tmp_path / "new").calls == 2 * (4 * 37 + 3 * sampling.TRIED + 2 * 14)
