"""Grids of models, domains, priors, solvers and seeds: checked, planned, run by Snakemake, put in one table.

A YAML file names the grid (`read_grid`). ``workflow/sweep.smk`` has one job for each model, domain and
solver, which chooses the noise level and inverts the references (``ood settle``), once for all priors and
seeds, and one for each cell, which draws, judges and writes one file whole (``ood cell``). `write_table`
joins the files. Whatever is there already is not made again.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

from ood_lib import reports
from ood_lib.domains import did_you_mean, to_bytes
from ood_lib.files import from_root, project_root, write_json, write_whole
from ood_lib.latents import LatentSpec
from ood_lib.metrics import SampleQuality
from ood_lib.models import FrozenModel, load_model
from ood_lib.priors import PRIORS
from ood_lib.sampling import (
    ASKED,
    JUDGED,
    TRIED,
    Recipe,
    ReferenceSet,
    check_judgeable,
    levels_within,
    quality,
    reference_count,
    references,
    sample,
    spec_of,
    twin,
)
from ood_lib.study import own_domain

__all__ = [
    "Cell",
    "Grid",
    "Plan",
    "arguments_of",
    "command_of",
    "path_of",
    "plan",
    "read_grid",
    "references_path",
    "report",
    "run",
    "run_cell",
    "settle",
    "write_table",
]

AXES = ("models", "domains", "priors", "solvers", "seeds")
SHOWN = 16  # drawn images that a cell keeps
STRIPS = 60  # of them on a page
CALLS_A_STEP = {"ab2": 1, "ddim": 1, "heun": 2, "abm2": 2}  # of the solvers that need no companion
ENDS = ("", "_low", "_high")
MEASURES = ("kid", "kid_floor", "novelty", "share_ratio", "c2st", "diversity")
POLL = 0.5  # seconds between looks at what is done
TIMED = 16  # images of the call that is timed
BESIDE_CALLS = 10.0  # seconds of a job: its start, mosaics, and judging


@dataclass(frozen=True)
class Cell:
    """One job of a grid.

    Parameters
    ----------
    model : str
        Zoo name, diffusers folder or hub id.
    domain : str
        Shipped domain or folder of images.
    prior : str
        Key of `ood_lib.priors.PRIORS`.
    solver : str
        Of the way to the latents and back.
    seed : int
        Source of the draws.

    Examples
    --------
    >>> Cell("ddpm-fashion-32", "digits", "mosaic", "ab2", 0).name
    'ddpm-fashion-32.digits.mosaic.ab2.0-0668177d'
    """

    model: str
    domain: str
    prior: str
    solver: str
    seed: int

    @property
    def name(self) -> str:
        """Readable file name without a folder in it, and a hash that tells equal ones apart.

        Returns
        -------
        str
            Letters, digits, dots, dashes and underscores.
        """
        parts = [
            re.sub(r"[^\w-]+", "-", str(x).rstrip("/").split("/")[-1])
            for x in asdict(self).values()
        ]
        return f"{'.'.join(parts)}-{_short_hash(asdict(self))}"


@dataclass(frozen=True)
class Grid:
    """Every model on every domain that it never saw, with every prior, solver and seed.

    Parameters
    ----------
    models, domains : tuple of str
        As in `Cell`; a zoo model is not crossed with its own domain.
    priors : tuple of str, default ("mosaic",)
        As in `Cell`.
    solvers : tuple of str, default ("ab2",)
        As in `Cell`.
    seeds : tuple of int, default (0,)
        As in `Cell`.
    references : int, default 100
        Images that a prior is fitted to; all of them where there are fewer.
    draws : int, default 32
        Images to draw, 14 or more.
    points : int, default 13
        Points of the grid to the latents, one more than the steps.
    sigma : float, optional
        Noise over signal of the latents; by default chosen for each model, domain and solver from the
        references, as `ood_lib.sampling.choose_level` does.

    Examples
    --------
    >>> grid = Grid(models=("ddpm-fashion-32",), domains=("digits", "fashion"), seeds=(0, 1))
    >>> [(cell.domain, cell.seed) for cell in grid.cells()]
    [('digits', 0), ('digits', 1)]
    """

    models: tuple[str, ...]
    domains: tuple[str, ...]
    priors: tuple[str, ...] = ("mosaic",)
    solvers: tuple[str, ...] = ("ab2",)
    seeds: tuple[int, ...] = (0,)
    references: int = 100
    draws: int = 32
    points: int = 13
    sigma: float | None = None

    def cells(self) -> list[Cell]:
        """List the jobs, those that share latents together.

        Returns
        -------
        list of Cell
            In the order of the file.
        """
        return [
            Cell(model, domain, prior, solver, seed)
            for model, domain, solver, prior, seed in product(
                self.models, self.domains, self.solvers, self.priors, self.seeds
            )
            if domain != own_domain(model)
        ]

    def known(self, cell: Cell, sigma: float | None = None) -> ReferenceSet:
        """Read the references of a cell; their latents are made if they are not there.

        Parameters
        ----------
        cell : Cell
            One of `cells`.
        sigma : float, optional
            Their level where it was chosen before.

        Returns
        -------
        ReferenceSet
            `references` of them, or as many as there are.
        """
        return references(
            _model(cell.model),
            cell.domain,
            sigma=self.sigma if sigma is None else sigma,
            n=self.fitted(cell),
            points=self.points,
            solver=cell.solver,
        )

    def fitted(self, cell: Cell) -> int:
        """Count the images that the prior of a cell is fitted to.

        Parameters
        ----------
        cell : Cell
            One of `cells`.

        Returns
        -------
        int
            `references`, or as many as there are.
        """
        return min(self.references, reference_count(_model(cell.model), cell.domain))

    def calls(self, cell: Cell) -> int:
        """Count the network calls of a path.

        Parameters
        ----------
        cell : Cell
            One of `cells`.

        Returns
        -------
        int
            Calls an image, one way.
        """
        return (self.points - 1) * CALLS_A_STEP[cell.solver]


@dataclass(frozen=True)
class Plan:
    """What a sweep will do.

    Parameters
    ----------
    jobs : int
        Cells of the grid.
    done : int
        Those whose file is there.
    calls : int
        Network calls that are left, counted by image.
    seconds : float
        Estimated time on one core, from calls timed here and 10 s a job beside them.

    Examples
    --------
    >>> str(Plan(jobs=8, done=2, calls=12000, seconds=90.0))
    '8 jobs, 2 of them done; 12,000 network calls left, about 2 minutes on one core'
    """

    jobs: int
    done: int
    calls: int
    seconds: float

    def __str__(self) -> str:
        left = (
            f"{self.calls:,} network calls left, about {self.seconds / 60:.0f} minutes on one core"
        )
        return f"{self.jobs} jobs, {self.done} of them done; {left}"


# ------------------------------------------------------------------------------------- the grid


def read_grid(path: Path) -> Grid:
    r"""Read and check the YAML file of a grid.

    Parameters
    ----------
    path : Path
        Its keys are the parameters of `Grid`; an axis may be one value instead of a list.

    Returns
    -------
    Grid
        The grid.

    Raises
    ------
    ValueError
        If the file is no mapping, a key or a value is unknown (the nearest one is named), a value is of the
        wrong type, one stands twice in an axis, or a domain has no images.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "grid.yaml"
    ...     _ = path.write_text("models: ddpm-fashion-32\ndomain: digits")
    ...     read_grid(path)
    Traceback (most recent call last):
    ValueError: grid.yaml has an unknown key 'domain'; did you mean 'domains'?
    """
    try:
        given = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is no YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path.name} is no mapping; write keys such as models and domains")
    grid = _grid(path.name, given)
    _check_values(path.name, grid)
    return grid


def _grid(name: str, given: Mapping[str, Any]) -> Grid:
    """Turn what a file gives into a grid, with the types of its fields."""
    known = {field.name: field for field in fields(Grid)}
    for key in given:
        if key not in known:
            raise ValueError(f"{name} has an unknown key {key!r}{did_you_mean(str(key), known)}")
    for key, field in known.items():
        if key not in given and field.default is MISSING:
            raise ValueError(f"{name} lacks {key}; give a list")
    axes = {
        key: tuple(given[key]) if isinstance(given[key], list) else (given[key],)
        for key in AXES
        if key in given
    }
    kinds = dict.fromkeys(AXES, str) | {"seeds": int}
    for key, values in axes.items():
        wrong = [x for x in values if type(x) is not kinds[key]]
        if wrong or not values:
            raise ValueError(
                f"{name}: {key} is {given[key]!r}; give a list of {kinds[key].__name__}"
            )
        twice = sorted({str(x) for x in values if values.count(x) > 1})
        if twice:
            raise ValueError(
                f"{name}: {key} has {', '.join(twice)} twice; two jobs would write one file"
            )
    return Grid(**{**given, **axes})


def _check_values(name: str, grid: Grid) -> None:
    """Refuse numbers out of range, names that are unknown, and domains that cannot be judged."""
    for key, least in (("references", 2), ("draws", JUDGED), ("points", 3)):
        value = getattr(grid, key)
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: {key} is {value!r}; give a whole number of {least} or more")
    if grid.sigma is not None and not (isinstance(grid.sigma, (int, float)) and grid.sigma > 0):
        raise ValueError(f"{name}: sigma is {grid.sigma!r}; give a number above 0, or leave it out")
    for key, known in (("priors", PRIORS), ("solvers", CALLS_A_STEP)):
        for value in getattr(grid, key):
            if value not in known:
                raise ValueError(f"{name}: {key} has {value!r}{did_you_mean(value, known)}")
    pairs = {(cell.model, cell.domain) for cell in grid.cells()}
    if not pairs:
        raise ValueError(f"{name} has no job: each model meets its own domain only")
    for model, domain in sorted(pairs):
        check_judgeable(_model(model), domain, n=grid.draws)


@lru_cache(maxsize=32)
def _model(name: str) -> FrozenModel:
    return load_model(name)


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


# ------------------------------------------------------------------------------------- one job


def path_of(out: Path, grid: Grid, cell: Cell) -> Path:
    """Name the file of a cell.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    grid : Grid
        Its settings are part of the name, so that a changed grid never takes what another one made.
    cell : Cell
        One of its cells.

    Returns
    -------
    Path
        An ``.npz`` under ``out/cells``.

    Examples
    --------
    >>> grid = Grid(models=("ddpm-fashion-32",), domains=("digits",))
    >>> path_of(Path("out"), grid, grid.cells()[0]).parent
    PosixPath('out/cells')
    """
    return out / "cells" / f"{cell.name}-{_short_hash(_settings(grid))}.npz"


def references_path(out: Path, grid: Grid, cell: Cell) -> Path:
    """Name the file that says at which level the references of a cell lie.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    grid : Grid
        Its settings are part of the name.
    cell : Cell
        One of its cells; those that differ in prior and seed share the file.

    Returns
    -------
    Path
        A ``.json`` under ``out/references``.

    Examples
    --------
    >>> grid = Grid(models=("ddpm-fashion-32",), domains=("digits",), seeds=(0, 1))
    >>> len({references_path(Path("out"), grid, cell) for cell in grid.cells()})
    1
    """
    shared = replace(cell, prior="", seed=0)
    return out / "references" / f"{shared.name}-{_short_hash(_settings(grid))}.json"


def _settings(grid: Grid) -> dict[str, Any]:
    return {k: v for k, v in asdict(grid).items() if k not in AXES}


def settle(out: Path, grid: Grid, cell: Cell) -> Path:
    """Choose the level of the references of a cell and invert them; what is there stays.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    grid : Grid
        Its settings.
    cell : Cell
        One of its cells.

    Returns
    -------
    Path
        The file of `references_path`, with "sigma" as JSON.

    Raises
    ------
    ValueError
        If there are too few references.
    """
    path = references_path(out, grid, cell)
    if not path.is_file():
        write_json(path, {"sigma": grid.known(cell).sigma})
    return path


def run_cell(out: Path, grid: Grid, cell: Cell) -> Path:
    """Draw and judge the images of a cell, and write its file whole; one that is there stays.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    grid : Grid
        Its settings.
    cell : Cell
        One of its cells.

    Returns
    -------
    Path
        The file: a row of the table as JSON, and the first 16 images.

    Raises
    ------
    ValueError
        If the references are too few for the prior.
    OSError
        If the file cannot be written; those of other cells stay as they are.
    """
    path = path_of(out, grid, cell)
    if path.is_file():
        return path
    known = grid.known(cell, json.loads(settle(out, grid, cell).read_text())["sigma"])
    recipe, drawn = Recipe(cell.prior), {"n": grid.draws}
    made = sample(_model(cell.model), known, recipe, rng=np.random.default_rng(cell.seed), **drawn)
    without = twin(known, made.recipe, rng=np.random.default_rng(cell.seed), **drawn)
    row = asdict(cell) | {"references": len(known.images), "draws": grid.draws, "nfe": made.nfe}
    row |= {"window": made.recipe.options.get("window"), "sigma": known.sigma}
    row |= _measures(quality(made.images, known)) | _measures(quality(without, known), "twin_")
    pixels = to_bytes(made.images[:SHOWN])
    write_whole(path, lambda partial: _save(partial, row, pixels))
    return path


def _measures(found: SampleQuality, whose: str = "") -> dict[str, float | None]:
    """Flatten what a table shows of the quality of images, under names that begin with whose they are."""
    named = {name: getattr(found, name) for name in MEASURES} | {"coverage": found.prdc["coverage"]}
    row: dict[str, float | None] = {}
    for name, interval in named.items():
        value, low, high = interval or (None, None, None)
        row |= {f"{whose}{name}{end}": x for end, x in zip(ENDS, (value, low, high), strict=True)}
    return row


def _save(path: Path, row: Mapping[str, Any], pixels: np.ndarray) -> None:
    """Write to exactly this path; a name would get a suffix."""
    with path.open("wb") as file:
        np.savez_compressed(file, row=json.dumps(row), images=pixels)


# ------------------------------------------------------------------------------------- all jobs


def plan(grid: Grid, out: Path) -> Plan:
    """Count what a sweep has left to do.

    Parameters
    ----------
    grid : Grid
        The grid.
    out : Path
        Folder of the sweep.

    Returns
    -------
    Plan
        Jobs, network calls and an estimate of the time; a call of each model is timed for it.
    """
    cells = grid.cells()
    left = [cell for cell in cells if not path_of(out, grid, cell).is_file()]
    calls: dict[str, int] = dict.fromkeys(grid.models, 0)
    for cell in left:
        calls[cell.model] += grid.draws * grid.calls(cell)
    for path, cell in {references_path(out, grid, cell): cell for cell in left}.items():
        if not path.is_file():
            calls[cell.model] += _settling(grid, cell) * grid.calls(cell)
    seconds = len(left) * BESIDE_CALLS
    seconds += sum(n * _seconds_a_call(name) for name, n in calls.items() if n)
    return Plan(len(cells), len(cells) - len(left), sum(calls.values()), seconds)


def _settling(grid: Grid, cell: Cell) -> int:
    """Count the images that are inverted or decoded until the references of a cell are there."""
    model, n = _model(cell.model), grid.fitted(cell)
    asked = min(n, ASKED)
    at = {"points": grid.points, "solver": cell.solver}
    levels = [] if grid.sigma else levels_within(model)
    tried = [spec_of(model, cell.domain, sigma=s, n=asked, **at) for s in levels]
    final = spec_of(model, cell.domain, sigma=grid.sigma or levels[0], n=n, **at)
    inverted = [spec.n or n for spec in (*tried, final)]
    return sum(inverted) + TRIED * len(levels)


def _seconds_a_call(name: str) -> float:
    """Time a network call of a batch, for one image of it; the first call sets up and is not timed."""
    model = _model(name)
    x = torch.zeros(TIMED, *model.sample_shape)
    model.eps(x, 1.0)
    started = time.process_time()
    model.eps(x, 1.0)
    return (time.process_time() - started) / TIMED


def run(
    grid_file: Path, out: Path, *, cores: int = 2, profile: str = "local", progress: bool = True
) -> Path:
    """Run a sweep to its end, and join the table; one that was stopped goes on.

    Parameters
    ----------
    grid_file : Path
        The YAML file.
    out : Path
        Folder of the sweep.
    cores : int, default 2
        Jobs at a time, one core each.
    profile : str, default "local"
        A folder of ``workflow/profiles``.
    progress : bool, default True
        Show a live line of the jobs that are done.

    Returns
    -------
    Path
        The table, ``out/table.parquet``.

    Raises
    ------
    ValueError
        If the grid or the profile is wrong.
    RuntimeError
        If a job failed; the others are done and kept.
    """
    grid = read_grid(grid_file)
    root = project_root()
    profiles = {p.name: None for p in (root / "workflow" / "profiles").iterdir()}
    if profile not in profiles:
        raise ValueError(f"unknown profile {profile!r}{did_you_mean(profile, profiles)}")
    out.mkdir(parents=True, exist_ok=True)
    paths = _paths(out, grid)
    log = out / "workflow.log"
    with log.open("wb") as lines:
        command = command_of(grid_file, out, cores=cores, profile=profile)
        process = subprocess.Popen(command, cwd=root, stdout=lines, stderr=subprocess.STDOUT)
        with tqdm(total=len(paths), disable=not progress, unit="job", mininterval=10) as bar:
            while process.poll() is None:
                time.sleep(POLL)
                bar.update(sum(path.is_file() for path in paths) - bar.n)
    if process.returncode:
        raise RuntimeError(
            f"{sum(not path.is_file() for path in paths)} of {len(paths)} jobs are missing; "
            f"{log} says why, and the same command goes on with them"
        )
    return out / "table.parquet"


def _paths(out: Path, grid: Grid) -> list[Path]:
    return [path_of(out, grid, cell) for cell in grid.cells()]


def command_of(grid_file: Path, out: Path, *, cores: int = 2, profile: str = "local") -> list[str]:
    """Write the Snakemake command of a sweep.

    Parameters
    ----------
    grid_file, out, cores, profile
        As of `run`.

    Returns
    -------
    list of str
        Program and arguments.

    Examples
    --------
    >>> command_of(Path("grid.yaml"), Path("out"))[-1].startswith("out=")
    True
    """
    folder = project_root() / "workflow"
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(folder / "sweep.smk")),
        *("--profile", str(folder / "profiles" / profile), "--cores", str(cores)),
        *("--config", f"grid={from_root(grid_file)}", f"out={from_root(out)}"),
    ]


def arguments_of(spec: LatentSpec) -> list[str]:
    """Write the arguments of `ood invert` that make a set of latents.

    Parameters
    ----------
    spec : LatentSpec
        Which latents.

    Returns
    -------
    list of str
        Model, domain, and what differs from the defaults.

    Examples
    --------
    >>> arguments_of(LatentSpec("ddpm-fashion-32", "digits", t_end=474, levels=True))
    ['ddpm-fashion-32', 'digits', '--t-end', '474.0', '--levels']
    """
    written = [spec.model, spec.domain]
    for option in fields(spec)[2:]:
        value, flag = getattr(spec, option.name), f"--{option.name.replace('_', '-')}"
        if value != option.default:
            written += [flag] if value is True else [flag, str(value)]
    return written


def write_table(out: Path, grid: Grid) -> Path:
    """Join the rows of all cells, in the order of the grid, and the images that a page shows.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    grid : Grid
        The grid.

    Returns
    -------
    Path
        ``out/table.parquet``, one row a cell; ``out/pictures.npz`` has the first draws of the first solver
        and seed of 60 models, domains and priors at most.

    Raises
    ------
    ValueError
        If a cell has no file yet.
    """
    paths = _paths(out, grid)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} cells have no file, such as {missing[0]}; run the sweep")
    table = pd.DataFrame([json.loads(str(np.load(path)["row"])) for path in paths])
    first = table.drop_duplicates(["model", "domain", "prior"]).head(STRIPS)
    names = first[["model", "domain", "prior"]].map(lambda x: x.rstrip("/").split("/")[-1])
    drawn = {
        f"{model} on {domain}, {prior}": np.load(paths[row])["images"]
        for row, model, domain, prior in names.itertuples()
    }
    write_whole(out / "pictures.npz", lambda partial: np.savez_compressed(partial, **drawn))
    write_whole(out / "table.parquet", table.to_parquet)
    return out / "table.parquet"


def report(out: Path, *, progress: bool = False) -> Path:
    """Make the page of a sweep from its table: a notebook, and HTML beside it.

    Parameters
    ----------
    out : Path
        Folder of the sweep.
    progress : bool, default False
        Show a bar of the cells.

    Returns
    -------
    Path
        ``out/_build/html/report.html``; ``report.ipynb`` can be run again in its folder.

    Raises
    ------
    ValueError
        If there is no table, or the packages that render are missing.
    ChapterFailed
        If the notebook fails.

    Examples
    --------
    >>> report(Path("no-such-folder"))
    Traceback (most recent call last):
    ValueError: no-such-folder holds no table; run the sweep to its end
    """
    if not (out / "table.parquet").is_file():
        raise ValueError(f"{out} holds no table; run the sweep to its end")
    return reports.render("sweep", out, progress=progress)
