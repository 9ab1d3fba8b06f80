"""Fine-tuning against samplers that leave the model as it is, on four pairs of model and domain.

    .venv/bin/python benchmarks/tuning.py                 # data/results/tuning.csv, tuning_draws.npz
    .venv/bin/python benchmarks/tuning.py --seeds 1       # the first seed alone

Everyone gets the same 100 references and makes 64 images, judged by the same held-out images. What a
sampler spends at one level for all pairs is the unit of cost: 24 network passes for each reference, to
invert it, and for each image. "level chosen" chooses the level from the references first, as `ood sample`
does, and spends 3.3 times as many. "1x" is tuning at the unit of cost, where a training pass of an image
counts three; its steps of 16 images are the same whatever is trained, though the last layer alone needs a
third of the operations (column `calls`). Drawing from a tuned model comes on top, and is in `passes`.
Frozen and tuned models draw from the same noise by the preset "converged", 24 calls of a two-step solver;
the released code takes 79 steps of DDIM from t = 900. SDEdit and ILVR take 24 calls too, additive guidance
("CRDI-like") 72.

"no step" repeats the first fault of the released code. Its weights are those of the frozen model after
any number of steps, so few are run. "second output" repeats the other one.

Learning rates are chosen on the first pair at its first seed, at 1x, from those in `RATES`: the one
with the smallest KID to held-out images of the unseen domain. Rows of that search have `search` = 1;
the winner is run once more for the table. All tunings of a kind, short or long, take its rate.

Ten times the cost is run for `LONG_SEEDS` seeds. Rows that stand in the table are kept, so a run that
was stopped goes on, the rows that decide first. `tuning_draws.npz` has the first 16 images of each
method on the first pair.
"""

import argparse
import time
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judging import Judge
from tables import append

from ood_lib import generate, load_images, load_model
from ood_lib.domains import to_bytes
from ood_lib.features import imagenet
from ood_lib.files import project_root, write_whole
from ood_lib.metrics import kid, prdc
from ood_lib.models import FrozenModel
from ood_lib.rivals import crdi_like, ilvr, sdedit
from ood_lib.sampling import (
    ASKED,
    TRIED,
    Recipe,
    ReferenceSet,
    levels_within,
    references,
    sample,
    twin,
)
from ood_lib.study import own_domain
from ood_lib.training import fine_tune, forgetting

RESULTS = project_root() / "data" / "results"
PAIRS = (
    ("ddpm-fashion-32", "digits"),
    ("ddpm-relief-32", "emoji"),
    ("ddpm-fashion-32", "animals"),
    ("ddpm-relief-32", "galaxies"),
)
REFERENCES, DRAWS, SEEDS, LONG_SEEDS = 100, 64, 3, 1
SIGMA = 0.1  # level of the sampler whose cost is the unit
CALLS, BATCH, TRAINING = (
    24,
    16,
    3,
)  # of the preset; images a step; passes that one of training counts
PASSES = (REFERENCES + DRAWS) * CALLS
SHOWN, OWN_IMAGES = 16, 16
RATES = {
    "all": (1e-4, 3e-4, 1e-3),
    "lora": (1e-3, 3e-3, 1e-2, 3e-2),
    "last": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
GUIDED = {
    "SDEdit, t = 300": partial(sdedit, t=300.0),
    "SDEdit, t = 500": partial(sdedit, t=500.0),
    "ILVR, factor 4": partial(ilvr, factor=4, points=CALLS + 1),
    "ILVR, factor 8": partial(ilvr, factor=8, points=CALLS + 1),
    "CRDI-like": partial(crdi_like, pairs=1),
}


@dataclass(frozen=True)
class Tuning:
    """What is trained, for how long, and with which faults of the released code."""

    parameters: str
    times: float
    defects: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return round(self.times * PASSES / (TRAINING * BATCH))


TUNED = {
    "plain, 0.1x": Tuning("all", 0.1),
    "plain, 1x": Tuning("all", 1),
    "plain, 10x": Tuning("all", 10),
    "no step": Tuning("all", 0.1, ("no_step",)),
    "second output, 1x": Tuning("all", 1, ("second_output",)),
    "second output, 10x": Tuning("all", 10, ("second_output",)),
    "LoRA, 1x": Tuning("lora", 1),
    "LoRA, 10x": Tuning("lora", 10),
    "last layer, 1x": Tuning("last", 1),
    "last layer, 10x": Tuning("last", 10),
}
DECISIVE = (
    *("frozen", "default sampler", "level chosen", "pixel twin"),
    *("plain, 0.1x", "plain, 1x", "no step"),
)
LONG = ("plain, 10x", "LoRA, 10x", "last layer, 10x", "second output, 10x")


@dataclass
class Drawn:
    """Images of a method, and what they took."""

    images: torch.Tensor
    passes: float
    record: dict[str, float] = field(default_factory=dict)


# -------------------------------------------------------------------------------------- one pair


class Pair:
    """A frozen model, references of a domain that it never saw, and what draws are compared with."""

    def __init__(self, name: str, domain: str) -> None:
        self.name, self.domain, self.own = name, domain, own_domain(name)
        self.model = load_model(name)
        self.known = references(self.model, domain, sigma=SIGMA, n=REFERENCES)
        self.own_images = load_images(self.own, split="heldout", like=self.model)
        own_fit = imagenet(load_images(self.own, like=self.model))
        self.judge = Judge(domain, self.known)
        self.real_own = imagenet(self.own_images)
        self.own_floor = kid(own_fit, self.real_own)
        self.even, odd = self.judge.real[::2][:DRAWS], self.judge.real[1::2][:DRAWS]
        self.cover = prdc(odd, self.even).coverage

    @cached_property
    def chosen(self) -> ReferenceSet:
        """The references at the level that is chosen from them."""
        return references(self.model, self.domain, n=REFERENCES)

    def judged(self, images: torch.Tensor) -> dict[str, float]:
        """Measure images against held-out ones of the unseen domain."""
        x = imagenet(images)
        measured = self.judge.distance(x) | self.judge.likeness(images, self.judge.ratio(x))
        return measured | {"coverage": prdc(x, self.even).coverage / self.cover}

    def judged_at_home(self, images: torch.Tensor) -> dict[str, float]:
        """Measure draws from noise against held-out images of the model's own domain."""
        far = kid(imagenet(images), self.real_own)
        share = self.judge.classifier.is_domain(images, self.own).mean()
        return {
            "own_kid": max(far, self.own_floor),
            "own_floor": self.own_floor,
            "own_share": float(share),
        }


# --------------------------------------------------------------------------------------- methods


def from_noise(pair: Pair, model: FrozenModel, seed: int) -> Drawn:
    """Draw from N(0, I), the same for the frozen model and each that was tuned."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(DRAWS, *model.sample_shape, generator=generator, dtype=torch.float64)
    made = generate(model, noise)
    images = made.images.float().clamp(-1, 1)
    return Drawn(images, DRAWS * made.nfe, pair.judged_at_home(images))


def tuned(pair: Pair, tuning: Tuning, lr: float, seed: int) -> Drawn:
    """Tune a copy of the model on the references, and draw from it."""
    made = fine_tune(
        pair.model,
        pair.known.images,
        steps=tuning.steps,
        rng=np.random.default_rng(seed),
        parameters=tuning.parameters,
        lr=lr,
        batch_size=BATCH,
        defects=tuning.defects,
    )
    drawn = from_noise(pair, made.model, seed)
    drawn.passes += tuning.steps * BATCH * TRAINING
    own, rng = pair.own_images[:OWN_IMAGES], np.random.default_rng(seed)
    drawn.record |= {
        "lr": lr,
        "steps": tuning.steps,
        "calls": made.network_calls,
        "loss": float(made.losses[-max(1, tuning.steps // 10) :].mean()),
        "forgetting": float(forgetting(pair.model, made.model, own, rng=rng).ratio),
    }
    return drawn


def drawn_by(pair: Pair, method: str, seed: int, rates: dict[str, float]) -> Drawn:
    """Images of any method."""
    if method in TUNED:
        return tuned(pair, TUNED[method], rates[TUNED[method].parameters], seed)
    if method == "frozen":
        return from_noise(pair, pair.model, seed)
    if method == "pixel twin":
        rng = np.random.default_rng(seed)
        return Drawn(twin(pair.known, Recipe(), n=DRAWS, rng=rng), 0)
    if method == "default sampler":
        rng = np.random.default_rng(seed)
        made = sample(pair.model, pair.known, Recipe(), n=DRAWS, rng=rng)
        return Drawn(made.images, (REFERENCES + DRAWS) * made.nfe)
    if method == "level chosen":
        made = sample(pair.model, pair.chosen, Recipe(), n=DRAWS, rng=np.random.default_rng(seed))
        choosing = len(levels_within(pair.model)) * (ASKED + TRIED)
        return Drawn(made.images, (REFERENCES + DRAWS + choosing) * made.nfe)
    generator = torch.Generator().manual_seed(seed)
    made = GUIDED[method](pair.model, pair.known.images, n=DRAWS, generator=generator)
    return Drawn(made.images.float().clamp(-1, 1), DRAWS * made.nfe)


# ----------------------------------------------------------------------------------------- table

KEYS = ("model", "domain", "seed", "method", "search", "lr")
COLUMNS = (
    *(*KEYS, "steps", "passes", "calls", "kid", "kid_low", "kid_high", "kid_floor"),
    *("share", "novelty", "coverage", "own_kid", "own_floor", "own_share", "forgetting"),
    *("loss", "seconds"),
)
pair_of = cache(Pair)


def table(path: Path) -> pd.DataFrame:
    """Read what a table has already."""
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=COLUMNS)


def measure(
    name: str, domain: str, seed: int, method: str, rates: dict[str, float]
) -> tuple[dict[str, object], torch.Tensor]:
    """Run a method on a pair: a row of the table, and the images."""
    started = time.process_time()
    pair = pair_of(name, domain)
    drawn = drawn_by(pair, method, seed, rates)
    labels = {"model": name, "domain": domain, "seed": seed, "method": method}
    row = labels | {"search": 0, "passes": float(drawn.passes)} | drawn.record
    row |= pair.judged(drawn.images)
    return row | {"seconds": time.process_time() - started}, drawn.images


def keep_images(path: Path, method: str, images: torch.Tensor) -> None:
    """Add the first images of a method to those of the others, whose run may have been stopped."""
    kept = dict(np.load(path)) if path.is_file() else {}
    pixels = to_bytes(images[:SHOWN])
    write_whole(path, lambda partial: save(partial, kept | {method: pixels}))


def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays to exactly this path; a name would get a suffix."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def search(path: Path) -> dict[str, float]:
    """Choose the learning rate of each kind of tuning on the first pair."""
    short = {t.parameters: m for m, t in TUNED.items() if t.times == 1 and not t.defects}
    chosen = {}
    for kind, rates in RATES.items():
        for lr in rates:
            there = table(path).query("search == 1 and method == @short[@kind] and lr == @lr")
            if there.empty:
                row, _ = measure(*PAIRS[0], 0, short[kind], {kind: lr})
                append(path, [row | {"search": 1}], COLUMNS, digits=6)
                print("search", short[kind], lr, flush=True)
        rows = table(path).query("search == 1 and method == @short[@kind]")
        chosen[kind] = float(rows.loc[rows.kid.idxmin(), "lr"])
    return chosen


def jobs(seeds: int, long_seeds: int) -> list[tuple[int, str, str, str]]:
    """List seed, method, model and domain of each row, those that decide first."""
    rest = [m for m in (*GUIDED, *TUNED) if m not in (*DECISIVE, *LONG)]
    stages = (
        (range(min(1, seeds)), DECISIVE),
        (range(min(1, long_seeds)), LONG[:2]),
        (range(min(1, seeds)), rest),
        (range(1, seeds), [*DECISIVE, *rest]),
        (range(min(1, long_seeds)), LONG[2:]),
        (range(1, long_seeds), LONG),
    )
    return [
        (seed, method, *pair)
        for some, methods in stages
        for seed, method, pair in product(some, methods, PAIRS)
    ]


def main() -> None:
    """Choose the rates, then measure every method on every pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--long-seeds", type=int, default=LONG_SEEDS)
    parser.add_argument("--methods", nargs="*", help="all by default")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), help="the first few alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tuning.csv"
    rates = search(path)
    print("learning rates", rates, flush=True)
    for seed, method, *pair in jobs(args.seeds, args.long_seeds):
        keys = dict(zip(KEYS, (*pair, seed, method, 0), strict=False))
        there = table(path)[list(keys)].eq(pd.Series(keys)).all(axis=1).any()
        wanted = args.methods is None or method in args.methods
        if wanted and not there and tuple(pair) in PAIRS[: args.pairs]:
            row, images = measure(*pair, seed, method, rates)
            if tuple(pair) == PAIRS[0] and seed == 0:
                keep_images(path.with_name("tuning_draws.npz"), method, images)
            append(path, [row], COLUMNS, digits=6)
            print(*keys.values(), flush=True)


if __name__ == "__main__":
    main()
