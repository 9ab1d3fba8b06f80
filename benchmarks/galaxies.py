"""Galaxies by frozen and by tuned models, in KID and in physical measures.

    .venv/bin/python benchmarks/galaxies.py            # data/results/galaxies.csv, galaxies_draws.npz
    .venv/bin/python benchmarks/galaxies.py --models ddpm-fashion-32 --seeds 1 --out runs/galaxies

Every model gets the same 100 cut-outs of the left half of a deep field, and each method makes 64 images,
judged by the cut-outs of the right half. Methods and costs are those of `tuning.py`: "fine-tuned" is its
"plain, 1x", as many passes as the default sampler takes, at the rate that its search chose.

Two rows are real images: "held out" is 64 of the held-out ones at random, compared with the others, the
floor of every measure; "replay" is 64 of the references, copies that novelty must find out. Rows that
stand in the table are kept. Images in none of which a source is found count as physically far as can be,
at a distance of 1. `galaxies_draws.npz` has the first 16 images of each method of one grey and
one colour model.
"""

import argparse
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tables import append, done
from tuning import DRAWS, REFERENCES, RESULTS, SEEDS, Drawn, Pair, drawn_by, keep_images, pair_of

from ood_lib.features import imagenet
from ood_lib.galaxies import PHYSICAL, distances, measure, spread
from ood_lib.metrics import kid, nearest_ratio
from ood_lib.models import model_names
from ood_lib.training import LEARNING_RATES

SHOWN_MODELS = {"ddpm-fashion-32": "grey", "ddpm-relief-32": "colour"}
MADE = {
    "default sampler": "default sampler",
    "level chosen": "level chosen",
    "pixel twin": "pixel twin",
    "fine-tuned": "plain, 1x",
    "frozen": "frozen",
}
METHODS = (*MADE, "held out", "replay")


def drawn(pair: Pair, method: str, seed: int) -> tuple[Drawn, np.ndarray]:
    """Images of a method, and the held-out images that they are compared with (a mask)."""
    others = np.ones(len(pair.known.heldout), dtype=bool)
    if method in MADE:
        return drawn_by(pair, MADE[method], seed, LEARNING_RATES), others
    real = pair.known.heldout if method == "held out" else pair.known.images
    chosen = np.random.default_rng(seed).choice(len(real), DRAWS, replace=False)
    if method == "held out":
        others[chosen] = False
    return Drawn(real[chosen], 0), others


def judged(pair: Pair, images: torch.Tensor, others: np.ndarray) -> dict[str, float]:
    """Measure images against the held-out ones that a mask leaves."""
    x, real = imagenet(images), pair.judge.real[others]
    made, true = measure(images), measure(pair.known.heldout[others])
    some = made.found.any()
    apart = distances(made, true) if some else dict.fromkeys(PHYSICAL, 1.0)
    return {
        "kid": max(kid(x, real), pair.judge.floor),
        "kid_floor": pair.judge.floor,
        "novelty": float(np.median(nearest_ratio(x, pair.judge.fit, real))),
        "physical": max(apart.values()),
        **apart,
        "spread": spread(made) / spread(true) if some else np.nan,
        "found": float(made.found.mean()),
    }


def main() -> None:
    """Measure every method on every model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=model_names(), help="all by default")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "galaxies.csv"
    there = done(path, "model", "seed", "method")
    for keys in product(args.models, range(args.seeds), METHODS):
        if keys in there:
            continue
        name, seed, method = keys
        pair, started = pair_of(name, "galaxies"), time.process_time()
        made, others = drawn(pair, method, seed)
        row = {"model": name, "seed": seed, "method": method, "references": REFERENCES}
        row |= {"draws": len(made.images)} | judged(pair, made.images, others)
        seconds = time.process_time() - started
        if name in SHOWN_MODELS and seed == 0:
            shown = f"{SHOWN_MODELS[name]}, {method}"
            keep_images(path.with_name("galaxies_draws.npz"), shown, made.images)
        append(path, [row | {"passes": float(made.passes), "seconds": seconds}])
        print(*keys, f"{seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
