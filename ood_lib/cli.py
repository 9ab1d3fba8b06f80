"""The command ``ood``: train, build domains, invert, sample, audit, run chapters."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ood_lib.latents import LatentSet
    from ood_lib.sweep import Cell, Grid

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
domains_app = typer.Typer(no_args_is_help=True, help="Shipped image sets.")
classifier_app = typer.Typer(no_args_is_help=True, help="The classifier of domains.")
chapter_app = typer.Typer(no_args_is_help=True, help="Run chapters and tell which are stale.")
app.add_typer(domains_app, name="domains")
app.add_typer(classifier_app, name="classifier")
app.add_typer(chapter_app, name="chapter")


@app.command()
def models() -> None:
    """List the frozen models in data/zoo with their numbers."""
    from ood_lib.models import load_model, model_names
    from ood_lib.quality import summary_of

    for name in model_names():
        model = load_model(name)
        parameters = sum(p.numel() for p in model.network.parameters())
        shape = "x".join(map(str, model.sample_shape))
        typer.echo(
            f"{name}  {model.family}  {shape}  {parameters:,} parameters  {summary_of(name)}"
        )


@app.command()
def train(
    domain: Annotated[str, typer.Argument(help="digits, emoji, fashion or relief")],
    out: Annotated[Path, typer.Option(help="pipeline folder to write")],
    family: Annotated[str, typer.Option(help="ddpm, or iddpm for learned variances")] = "ddpm",
    images_seen: Annotated[int, typer.Option(help="length of the run in images")] = 409_600,
    channels: Annotated[
        list[int] | None,
        typer.Option(help="width of a level, once a level; 24, 48, 104 if left out"),
    ] = None,
    groups: Annotated[int, typer.Option(help="groups of the group norms")] = 1,
    batch_size: Annotated[int, typer.Option(help="images a step")] = 32,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 2.4e-3,
    noise_weight: Annotated[
        float, typer.Option(help="power of the weight on high noise; 0: the simple loss")
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="weights, data order, timesteps, noise")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16 (autocast)")] = "auto",
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    source: Annotated[Path | None, typer.Option(help="folder with the package's files")] = None,
    stop_after: Annotated[
        int | None, typer.Option(help="leave the run at this step, to go on another time")
    ] = None,
) -> None:
    """Train a model on a domain; a killed run goes on where its last checkpoint stands."""
    from ood_lib import training
    from ood_lib.files import project_root
    from ood_lib.models import check_device
    from ood_lib.sources import train_images

    check_device(device)
    chosen = training.fast_precision(device) if precision == "auto" else precision
    widths = tuple(channels or training.Recipe.channels)
    recipe = training.Recipe(
        images_seen=images_seen,
        batch_size=batch_size,
        channels=widths,
        groups=groups,
        head_dim=max(1, widths[-1] // 2),
        lr=lr,
        precision=chosen,
        seed=seed,
        family=family,
        noise_weight=noise_weight,
    )
    work = project_root() / "runs" / "training" / out.name
    images = train_images(domain, source=source)
    made = training.train(
        images, recipe, out, work=work, name=domain, device=device, stop_after=stop_after
    )
    typer.echo(f"wrote {made}")


@app.command()
def card(name: Annotated[str, typer.Argument(help="a model of data/zoo")]) -> None:
    """Write the card of a model from its training record and fresh samples."""
    from ood_lib.models import pipeline_folder
    from ood_lib.training import write_card

    typer.echo(f"wrote {write_card(pipeline_folder(name))}")


@app.command()
def quality(
    name: Annotated[str, typer.Argument(help="a model of data/zoo")],
    source: Annotated[Path | None, typer.Option(help="folder with the package's files")] = None,
    early: Annotated[Path | None, typer.Option(help="weights at a tenth of the training")] = None,
) -> None:
    """Measure a model against held-out images of its domain, and write its record and card."""
    from ood_lib.models import pipeline_folder
    from ood_lib.quality import measure_quality
    from ood_lib.training import write_card

    made = measure_quality(name, source=source, early=early)
    write_card(pipeline_folder(name))
    typer.echo(f"wrote {made}")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="a .ckpt or .pt of the DDPM or ADM code")],
    out: Annotated[Path, typer.Argument(help="diffusers folder to write")],
    layout: Annotated[str, typer.Option(help="auto, ddpm or adm")] = "auto",
    head_channels: Annotated[int, typer.Option(help="width of an attention head, adm")] = 64,
    side: Annotated[int, typer.Option(help="height and width of the images")] = 256,
    schedule: Annotated[str, typer.Option(help="linear or cosine")] = "linear",
) -> None:
    """Turn an original DDPM or iDDPM/ADM checkpoint into a diffusers folder."""
    from ood_lib import checkpoints

    made = checkpoints.convert(
        checkpoint, out, layout=layout, head_channels=head_channels, side=side, schedule=schedule
    )
    typer.echo(f"wrote {made}")


@app.command()
def invert(
    model: Annotated[str, typer.Argument(help="zoo name, diffusers folder or hub id")],
    domain: Annotated[str, typer.Argument(help="domain, image folder or hub dataset")],
    split: Annotated[str, typer.Option(help="split of the domain")] = "fit",
    n: Annotated[int | None, typer.Option(help="first n images; all by default")] = None,
    preset: Annotated[
        str, typer.Option(help="converged, exact or paper: solver and grid")
    ] = "converged",
    solver: Annotated[
        str | None, typer.Option(help="solver in place of the preset's, such as ab2, heun or ddim")
    ] = None,
    points: Annotated[int | None, typer.Option(help="points of the preset's grid")] = None,
    t_end: Annotated[
        float | None, typer.Option(help="level of the latents; that of the preset by default")
    ] = None,
    start: Annotated[str, typer.Option(help="level0, sigma0 or noise")] = "level0",
    seed: Annotated[int, typer.Option(help="noise of --start noise")] = 0,
    levels: Annotated[bool, typer.Option("--levels", help="keep the state at every level")] = False,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or openvino")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of the network")] = "fp32",
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="images in a network call")] = 64,
    shard: Annotated[int, typer.Option(help="images in a file; memory holds so many")] = 256,
) -> None:
    """Invert the images of a domain into runs/latents; a run that was killed goes on there."""
    from ood_lib import latents

    spec = latents.LatentSpec(
        model,
        domain,
        split=split,
        n=n,
        preset=preset,
        solver=solver,
        points=points,
        t_end=t_end,
        start=start,
        seed=seed,
        levels=levels,
        revision=revision,
    )
    with _warnings_as_sentences():
        made = latents.shards(
            spec,
            device=device,
            backend=backend,
            precision=precision,
            shard=shard,
            batch_size=batch_size,
            progress=True,
        )
        typer.echo(f"{_summary(made)}: {latents.path_of(spec)}")


def _summary(parts: Iterable[LatentSet]) -> str:
    """Count latents shard by shard: number, network calls, median error estimate."""
    count, calls, errors = 0, 0, []
    for part in parts:
        count, calls = count + len(part.latent), max(calls, part.nfe)
        errors += [] if part.error_estimate is None else part.error_estimate.tolist()
    error = f"{median(errors):.2g}" if errors else "unknown"
    return f"{count} latents, {calls} network calls an image, median error estimate {error}"


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Show a warning as errors are shown, and not across a progress bar."""
    from tqdm import tqdm

    def show(message: Warning | str, *rest: object) -> None:
        tqdm.write(f"ood: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("default", RuntimeWarning)
        warnings.showwarning = show
        yield


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="zoo name, diffusers folder or hub id")],
    domain: Annotated[str, typer.Argument(help="shipped domain or image folder, never seen")],
    out: Annotated[Path, typer.Option(help="folder for images, grid.png and metrics.json")],
    n: Annotated[int, typer.Option("-n", help="images to draw")] = 64,
    prior: Annotated[
        str | None, typer.Option(help="a prior of ood_lib.priors, in place of the default")
    ] = None,
    sigma: Annotated[
        float | None, typer.Option(help="noise over signal of the latents, in place of the best")
    ] = None,
    references: Annotated[
        int | None, typer.Option(help="first so many images that are fitted to; all by default")
    ] = None,
    seed: Annotated[int, typer.Option(help="source of the draws")] = 0,
    batch_size: Annotated[int, typer.Option(help="images in a network call")] = 64,
) -> None:
    """Draw new images of a domain that the model never saw, and measure them."""
    import numpy as np

    from ood_lib import sampling
    from ood_lib.models import load_model

    recipe = sampling.Recipe() if prior is None else sampling.Recipe(prior)
    frozen = load_model(model)
    sampling.check_judgeable(frozen, domain, n=n)
    with _warnings_as_sentences():
        known = sampling.references(frozen, domain, sigma=sigma, n=references, progress=True)
        made = sampling.sample(
            frozen,
            known,
            recipe,
            n=n,
            rng=np.random.default_rng(seed),
            batch_size=batch_size,
            progress=True,
        )
        quality = sampling.quality(made.images, known)
    sampling.write(out, made, known, {"model": model, "seed": seed} | quality.as_dict())
    typer.echo(f"{sampling.sentence(quality)}: {out}")


@app.command()
def audit(
    model: Annotated[str, typer.Option(help="zoo name, diffusers folder or hub id")],
    images: Annotated[Path, typer.Option(help="folder of image files")],
    out: Annotated[Path, typer.Option(help="folder for the tables and the page")],
    reference: Annotated[
        Path | None,
        typer.Option(help="folder of the model's own domain, held out from its training"),
    ] = None,
    seed: Annotated[int, typer.Option(help="source of every choice")] = 0,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit of a hub id")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or openvino")] = "auto",
    device: Annotated[str, typer.Option(help="torch device")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="images in a network call")] = 64,
    shard: Annotated[int, typer.Option(help="images in a file; memory holds so many")] = 256,
) -> None:
    """Measure your own images under a frozen model: tables and a page of what they show."""
    from ood_lib import audit as library

    with _warnings_as_sentences():
        found, page = library.audit(
            model,
            images,
            out,
            reference=reference,
            seed=seed,
            revision=revision,
            backend=backend,
            device=device,
            batch_size=batch_size,
            shard=shard,
            progress=True,
        )
    for part in found.left_out:
        typer.echo(f"left out: {part.part} ({part.reason})", err=True)
    typer.echo(f"{found.n} images, {len(found.summary)} numbers: {page}")


@app.command()
def sweep(
    grid: Annotated[Path, typer.Argument(help="YAML: models, domains, priors, solvers, seeds")],
    out: Annotated[Path, typer.Option(help="folder of the table; a sweep there goes on")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="count jobs, network calls and time, run nothing")
    ] = False,
    cores: Annotated[int, typer.Option(help="jobs at a time, one core each")] = 2,
    profile: Annotated[str, typer.Option(help="of workflow/profiles, where jobs run")] = "local",
) -> None:
    """Sample every domain of a grid with every model: one table of all measures, and a page of it."""
    from ood_lib import reports
    from ood_lib import sweep as sweeps

    typer.echo(str(sweeps.plan(sweeps.read_grid(grid), out)))
    if not dry_run:
        reports.check_renderer()
        typer.echo(str(sweeps.run(grid, out, cores=cores, profile=profile)))
        typer.echo(str(sweeps.report(out)))


@app.command(hidden=True)
def settle(
    grid: Annotated[Path, typer.Argument(help="YAML of a sweep")],
    number: Annotated[int, typer.Argument(help="place among its cells, from 0")],
    out: Annotated[Path, typer.Option(help="folder of the sweep")],
) -> None:
    """Choose the level of the references of one job of a sweep, and invert them."""
    from ood_lib.sweep import settle

    _one_job(settle, grid, number, out)


@app.command(hidden=True)
def cell(
    grid: Annotated[Path, typer.Argument(help="YAML of a sweep")],
    number: Annotated[int, typer.Argument(help="place among its cells, from 0")],
    out: Annotated[Path, typer.Option(help="folder of the sweep")],
) -> None:
    """Run one job of a sweep."""
    from ood_lib.sweep import run_cell

    _one_job(run_cell, grid, number, out)


def _one_job(work: Callable[[Path, Grid, Cell], Path], grid: Path, number: int, out: Path) -> None:
    """Do one part of the work on a cell of a grid, and print the file that it made."""
    from ood_lib.sweep import read_grid

    whole = read_grid(grid)
    with _warnings_as_sentences():
        typer.echo(str(work(out, whole, whole.cells()[number])))


@classifier_app.command("train")
def train_domain_classifier(
    out: Annotated[Path | None, typer.Option(help="data/classifier by default")] = None,
    seed: Annotated[int, typer.Option(help="weights, order and augmentation")] = 0,
) -> None:
    """Train the classifier of domains on the shipped sets and judge it on what is held out."""
    from ood_lib.classifier import train_classifier
    from ood_lib.files import project_root

    made = train_classifier(out or project_root() / "data" / "classifier", seed=seed)
    typer.echo(f"wrote {made}")


@domains_app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="a domain that has a builder")],
    source: Annotated[
        Path | None, typer.Option(help="folder with the package's data files")
    ] = None,
) -> None:
    """Build data/domains/NAME.npz and its datasheet entry from the package it comes from."""
    from ood_lib.sources import build_domain

    typer.echo(f"wrote {build_domain(name, source=source)}")


@domains_app.command("list")
def list_domains() -> None:
    """List the shipped domains."""
    from ood_lib.domains import domain_names

    typer.echo("\n".join(domain_names()))


@app.command()
def study(
    table: Annotated[
        str, typer.Argument(help="gaussianity, separability, geometry or differences")
    ],
    again: Annotated[bool, typer.Option("--again", help="measure every model anew")] = False,
) -> None:
    """Measure every model on every domain, and write the table that chapters 09 to 11 draw."""
    from ood_lib.study import write_table

    typer.echo(f"wrote {write_table(table, again=again)}")


@chapter_app.command("run")
def run_chapter(
    slug: Annotated[str, typer.Argument(help="name of a notebook without its ending")],
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="name=value; a run with any is not published")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="where the executed notebook goes")] = None,
    scale: Annotated[str, typer.Option(help="book or quick")] = "book",
) -> None:
    """Execute a chapter: published in book/chapters, or into runs/ when parameters are given."""
    from ood_lib import chapters

    params = chapters.parse_parameters(slug, parameter or [])
    made = chapters.run_chapter(slug, out=out, params=params, scale=scale, progress=True)
    typer.echo(f"wrote {made}")


@chapter_app.command("stale")
def stale() -> None:
    """Print the chapters whose published copy is not what their sources would give."""
    from ood_lib import chapters

    typer.echo("\n".join(chapters.stale_chapters()))


def main() -> None:
    """Run the command; a wrong input is one sentence on stderr and exit status 2."""
    from ood_lib.chapters import ChapterFailed

    try:
        app()
    except (ValueError, OSError, ChapterFailed) as error:
        typer.echo(f"ood: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
