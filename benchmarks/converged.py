"""Measure how far the default latents of every model of the zoo lie from a fine reference.

    .venv/bin/python benchmarks/converged.py

The reference is Heun with 240 points uniform in log sigma from the same start: 478 calls an image. The
table `data/results/inversion_error.csv` gets a line for each model and domain as soon as it is measured;
lines that stand there are kept, so a run that was stopped goes on. It takes about half an hour on two
cores.
"""

import csv
from pathlib import Path

import torch

from ood_lib import invert, load_images, load_model
from ood_lib.files import project_root
from ood_lib.models import FrozenModel, model_names

TABLE = project_root() / "data" / "results" / "inversion_error.csv"
FIELDS = (
    "model",
    "domain",
    "images",
    "setting",
    "calls",
    "median_rmse",
    "largest_rmse",
    "estimate",
)
UNSEEN = {  # by channels
    1: ("faces", "textures", "galaxies", "digits", "fashion"),
    3: ("galaxies", "earth", "emoji", "relief", "textures"),
}
IMAGES = 16
SETTINGS = {
    "default": {},
    "exact": {"preset": "exact"},
}


def rmse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each latent."""
    return (a - b).square().flatten(1).mean(1).sqrt()


def lines(model: FrozenModel, domain: str) -> list[dict[str, object]]:
    """Measure one model on one domain in all settings."""
    images = load_images(domain, n=IMAGES, split="heldout", like=model)
    fine = invert(model, images, solver="heun", points=240).latent
    made = {name: invert(model, images, **options) for name, options in SETTINGS.items()}
    return [
        {
            "model": model.name,
            "domain": domain,
            "images": IMAGES,
            "setting": name,
            "calls": x.nfe,
            "median_rmse": f"{rmse(x.latent, fine).median():.4f}",
            "largest_rmse": f"{rmse(x.latent, fine).max():.4f}",
            "estimate": f"{x.error_estimate.median():.4f}",
        }
        for name, x in made.items()
    ]


def read(path: Path) -> list[dict[str, object]]:
    """Read the lines that are there."""
    if not path.is_file():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def write(path: Path, table: list[dict[str, object]]) -> None:
    """Write the table."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def main() -> None:
    """Measure what is missing, and print the largest median error."""
    table = read(TABLE)
    for name in model_names():
        model = load_model(name)
        own = name.split("-")[1]
        for domain in (own, *(d for d in UNSEEN[model.sample_shape[0]] if d != own)):
            if not any((x["model"], x["domain"]) == (name, domain) for x in table):
                table += lines(model, domain)
                write(TABLE, table)
    worst = max(float(x["median_rmse"]) for x in table if x["setting"] == "default")
    print(f"{TABLE.name}: the largest median error of the default is {worst:.4f} (bar 0.05)")


if __name__ == "__main__":
    main()
