"""Every model on every domain: the tables of chapter 17.

    .venv/bin/python benchmarks/grid.py cells     # data/results/grid.csv, grid_draws.npz: an hour, two cores
    .venv/bin/python benchmarks/grid.py own       # data/results/grid_own.csv: draws of the models' own priors
    .venv/bin/python benchmarks/grid.py gaps      # data/results/grid_gaps.csv: how far the domains lie apart

`cells` runs `ood sweep` on examples/every.yaml and examples/solvers.yaml; what is in runs/ already is kept.
`own` judges draws of each model's own prior, 39 calls an image, against every domain: against its own this is
what a model of the target reaches, against the others what there is without any image of the target.
`gaps` compares 50 training images of a model with 50 references of a domain.
"""

import argparse
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tables import append, done

from ood_lib import load_images, load_model
from ood_lib.domains import to_channels
from ood_lib.features import imagenet
from ood_lib.files import project_root, write_whole
from ood_lib.gaps import denoising_gap, feature_gap, spectrum_gap
from ood_lib.metrics import kid
from ood_lib.quality import draw_samples
from ood_lib.study import own_domain
from ood_lib.sweep import Grid, read_grid, run

ROOT = project_root()
RESULTS = ROOT / "data" / "results"
SWEEPS = ("every", "solvers")
LEFT_OUT = ["references", "draws", "prior"]  # the same in all rows
SHOWN = 4  # draws of a pair that are kept
REFERENCES = 100  # of the sweeps
SIGMA = 0.1  # where the network is asked to denoise
IMAGES = 50  # as many as the smallest domain has
LIKE = {1: "ddpm-fashion-32", 3: "ddpm-relief-32"}  # models that take so many channels


def file_of(name: str) -> Path:
    """Name the YAML of a sweep."""
    return ROOT / "examples" / f"{name}.yaml"


def cells() -> None:
    """Run the sweeps, and put what their cells measured into one table."""
    tables = {x: pd.read_parquet(run(file_of(x), ROOT / "runs" / x)) for x in SWEEPS}
    joined = pd.concat(tables, names=["sweep"]).reset_index("sweep").drop(columns=LEFT_OUT)
    with np.load(ROOT / "runs" / SWEEPS[0] / "pictures.npz") as drawn:
        first = {name.rsplit(", ", 1)[0]: drawn[name][:SHOWN] for name in drawn}
    write_whole(RESULTS / "grid_draws.npz", lambda path: np.savez_compressed(path, **first))
    joined.to_csv(RESULTS / "grid.csv", index=False, float_format="%.4g", lineterminator="\n")


def own(grid: Grid) -> None:
    """Judge draws of each model's own prior: against its own domain in grey and colour, and the others."""
    path = RESULTS / "grid_own.csv"
    there = done(path, "model", "seed")
    for name, seed in product(grid.models, grid.seeds):
        if (name, seed) in there:
            continue
        model, home = load_model(name), own_domain(name)
        images = draw_samples(model, grid.draws, seed=seed)
        asked = [(home, 1), (home, 3)]
        asked += [(x, model.sample_shape[0]) for x in grid.domains if x != home]
        labels = {"model": name, "seed": seed}
        append(path, [labels | judged(images, domain, channels) for domain, channels in asked])
        print(name, seed, flush=True)


@cache
def features_of(domain: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of the references and of the held-out images of a domain."""
    like = load_model(LIKE[channels])
    sets = (load_images(domain, split=x, like=like) for x in ("fit", "heldout"))
    first, real = (imagenet(x) for x in sets)
    return first[:REFERENCES], real


def judged(images: torch.Tensor, domain: str, channels: int) -> dict[str, object]:
    """KID of images to the held-out ones of a domain, and that of its references."""
    first, real = features_of(domain, channels)
    found = kid(imagenet(to_channels(images.add(1).div(2), channels).mul(2).sub(1)), real)
    return {"domain": domain, "channels": channels, "kid": found, "kid_floor": kid(first, real)}


def gaps(grid: Grid) -> None:
    """Measure how far every domain lies from what every model knows."""
    path = RESULTS / "grid_gaps.csv"
    there = done(path, "model", "domain")
    for name, domain in product(grid.models, grid.domains):
        if (name, domain) in there or domain == own_domain(name):
            continue
        model = load_model(name)
        unseen = load_images(domain, like=model)[:IMAGES]
        known = load_images(own_domain(name), split="train", n=len(unseen), like=model)
        noise = {"sigma": SIGMA, "generator": torch.Generator().manual_seed(0)}
        row = {
            "model": name,
            "domain": domain,
            "images": len(unseen),
            "feature_gap": feature_gap(known, unseen),
            "spectrum_gap": spectrum_gap(known, unseen),
            "denoising_gap": denoising_gap(model, known, unseen, **noise),
        }
        append(path, [row])
        print(name, domain, flush=True)


def main() -> None:
    """Make one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["cells", "own", "gaps"])
    table = parser.parse_args().table
    if table == "cells":
        cells()
    else:
        {"own": own, "gaps": gaps}[table](read_grid(file_of(SWEEPS[0])))


if __name__ == "__main__":
    main()
