"""Measure what returns and from which latent: network x start x solver x calls x domain.

    .venv/bin/python benchmarks/reconstruction.py

The trained network of the first model of `MODELS`, a linear one, an untrained one and the zero network
walk both ways from every start; of the second model the trained network does. A latent is compared with
Heun on 240 points uniform in log sigma from the same start, the image that returns with the one that was
inverted. Chapter 08 draws the table `data/results/reconstruction.csv`. It gets its lines for a model, a
network and a start as soon as they are measured; lines that stand there are kept, so a run that was
stopped goes on. It takes a quarter of an hour on two cores.
"""

import numpy as np
import pandas as pd
import torch

from ood_lib import generate, invert, load_images, load_model
from ood_lib.files import project_root, write_text
from ood_lib.metrics import psnr
from ood_lib.models import FrozenModel
from ood_lib.schedule import uniform_t
from ood_lib.study import networks

TABLE = project_root() / "data" / "results" / "reconstruction.csv"
KEYS = ["model", "network", "start"]
UNSEEN = ("fashion", "digits", "faces", "textures", "galaxies")
MODELS = ("ddpm-fashion-32", "ddpm-digits-32")
STARTS = ("level0", "noise")
CALLS = (10, 20, 50)
IMAGES = 6  # the smallest and the largest of 6 hold the median with 97 %


def settings(model: FrozenModel, calls: int) -> dict[str, dict[str, object]]:
    """Give each solver a grid on which it takes about that many calls one way."""
    even = uniform_t(model.schedule, calls + 1)
    return {
        "DDIM, current level": {"solver": "ddim", "timesteps": even},
        "DDIM, target level": {"solver": "ddim", "timesteps": even, "eps_at": "target"},
        "Heun": {"solver": "heun", "points": calls // 2 + 1},
        "AB2": {"solver": "ab2", "points": calls + 1},
    }


def rms(x: torch.Tensor) -> np.ndarray:
    """Root mean square of each row."""
    return x.square().flatten(1).mean(1).sqrt().numpy()


def walked(
    model: FrozenModel, images: torch.Tensor, start: str, options: dict[str, object]
) -> dict[str, object]:
    """Walk there and back; the noise of a start depends on the image alone."""
    rows = [torch.Generator().manual_seed(1000 + row) for row in range(len(images))]
    there = invert(model, images, start=start, generator=rows, **options)
    way = {"solver": there.solver, "timesteps": there.timesteps}
    back = generate(model, there.latent, **way)
    return {"latent": there.latent, "nfe": there.nfe, "images": back.images}


def lines(model: FrozenModel, sets: dict[str, torch.Tensor], start: str) -> list[dict[str, object]]:
    """Measure one network from one start in every setting, on all sets at once."""
    images = torch.cat(list(sets.values()))
    domain_of = np.repeat(list(sets), [len(x) for x in sets.values()])
    rows = [torch.Generator().manual_seed(1000 + row) for row in range(len(images))]
    fine = invert(model, images, solver="heun", points=240, start=start, generator=rows).latent
    found = []
    for calls in CALLS:
        for name, options in settings(model, calls).items():
            made = walked(model, images, start, options)
            each = pd.DataFrame(
                {
                    "latent_error": rms(made["latent"] - fine) / rms(fine),
                    "round_trip": rms(made["images"] - images),
                    "psnr": psnr(made["images"], images).clamp(max=100).numpy(),
                }
            )
            sets_of = each.groupby(domain_of, sort=False)
            row = sets_of.median()
            row["psnr_low"], row["psnr_high"] = sets_of.psnr.min(), sets_of.psnr.max()
            told = {"start": start, "solver": name, "calls": made["nfe"], "images": IMAGES}
            found += [told | {"domain": d} | x.to_dict() for d, x in row.iterrows()]
    return found


def main() -> None:
    """Measure what is missing."""
    table = pd.read_csv(TABLE) if TABLE.is_file() else pd.DataFrame(columns=KEYS)
    for name in MODELS:
        trained = load_model(name)
        own = name.split("-")[1]
        domains = [own, *(d for d in UNSEEN if d != own)]
        sets = {d: load_images(d, n=IMAGES, split="heldout", like=trained) for d in domains}
        controls = networks(trained) if name == MODELS[0] else {}
        for network, model in {"trained": trained, **controls}.items():
            for start in STARTS:
                if (table[KEYS] == [name, network, start]).all(axis=1).any():
                    continue
                new = pd.DataFrame(lines(model, sets, start))
                new.insert(0, "network", network)
                new.insert(0, "model", name)
                table = pd.concat([table, new], ignore_index=True) if len(table) else new
                text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
                write_text(TABLE, text)
                print(f"{name}, {network}, {start}: measured", flush=True)


if __name__ == "__main__":
    main()
