"""Samplers of unseen domains: search one on a single pair of domains, then try it on all the others.

    .venv/bin/python benchmarks/samplers.py search   # data/results/sampler_search.csv, one pair
    .venv/bin/python benchmarks/samplers.py levels   # data/results/sampler_levels.csv, seven pairs
    .venv/bin/python benchmarks/samplers.py every    # data/results/samplers.csv, every pair, five seeds
    .venv/bin/python benchmarks/samplers.py numbers  # data/results/sampler_numbers.csv, 16 to 1,000
    .venv/bin/python benchmarks/samplers.py affine   # data/results/affine_share.csv, every pair

Every sampler gets the same references, the same network calls an image (24 in the search, 12 in the other
tables), and the same held-out images to be judged by. Rows that stand in a table are kept, so a run that
was stopped goes on. A sampler's twin is its prior fitted to the pixels, without a model.

The search takes the recipe with the smallest KID (not below that of the fitted images) among those that
use the model, whose target share is 0.8 of real images' or more and whose median nearest-neighbour ratio
is 0.9 or more: a little above the 0.8 that is asked of it on other pairs. That settles the prior. The window
of mosaics (`ReferenceSet.window`) and their level (`best_level`) are since chosen from the references of each
pair; `levels` shows whether the level that suits the references suits the held-out images too.
"""

import argparse
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product

import numpy as np
import torch
from judging import Judge, known_of
from tables import append, done, missing_pairs

from ood_lib import load_model, sampling
from ood_lib.domains import open_images
from ood_lib.features import imagenet
from ood_lib.files import project_root
from ood_lib.geometry import Targets, accept
from ood_lib.inversion import generate
from ood_lib.metrics import c2st, diversity, kid, prdc
from ood_lib.models import FrozenModel, model_names
from ood_lib.priors import make_prior
from ood_lib.sampling import Recipe, ReferenceSet, sample, twin
from ood_lib.study import affine_share

RESULTS = project_root() / "data" / "results"
PAIR = ("ddpm-fashion-32", "digits")
REFERENCES, DRAWS, SEEDS = 100, 32, 5
SEARCH_DRAWS = 128
POINTS = 13  # of the grid, one more than the calls; the search has the points of `invert`
RELEASED = 60.8  # sigma at t = 900 of the linear schedule
BAND = (0.8, 1.25)
BUDGET, BATCH = 50_000, 2_000
NEAR = 0.1  # sigma of what is measured at one level only
LEVELS = {"pixels": NEAR, "last level": np.inf} | {f"sigma {x}": x for x in (0.1, 0.17, 0.34, 0.72)}
SIGMAS = (*sampling.LEVELS, 0.6)
SEARCHED = (
    ("isotropic", {}),
    ("full covariance", {}),
    ("PPCA", {"rank": 20}),
    ("recombination", {}),
    ("neighbour recombination", {"neighbours": 5}),
    ("slerp about the mean", {}),
    ("slerp between neighbours", {"neighbours": 3}),
    ("slerp between neighbours", {"neighbours": 5}),
    ("mosaic", {"window": 0.5}),
    ("mosaic", {"window": 0.6}),
    ("mosaic", {"window": 0.7}),
    ("mosaic", {"window": 0.8}),
)
FINALISTS = {  # with their level, None for the one that is chosen
    "default": (Recipe(), None),
    "isotropic, as released": (Recipe("isotropic, as released"), RELEASED),
}
COPIES = {
    "replay": (Recipe("replay"), NEAR),
    "replay plus noise": (Recipe("replay plus noise", {"scale": 0.1}), NEAR),
}
CELLS = (
    ("ddpm-fashion-32", "digits"),
    ("ddpm-digits-32", "animals"),
    ("ddpm-relief-32", "emoji"),
    ("ddpm-emoji-32", "galaxies"),
)
HARD = (  # pairs whose networks spoil mixed latents
    ("ddpm-relief-32", "faces"),
    ("ddpm-fashion-32", "galaxies"),
    ("ddpm-emoji-32", "textures"),
)
NUMBERS = (16, 32, 64, 128, 256, 512, 1000)


def name_of(prior: str, options: Mapping[str, object], level: object) -> str:
    """Write a recipe in a few words."""
    return ", ".join([prior, *(f"{key} {value}" for key, value in options.items()), str(level)])


class SamplerJudge(Judge):
    """Adds what the tables of samplers have beside the other measures."""

    def __init__(self, domain: str, known: ReferenceSet, n: int = DRAWS) -> None:
        super().__init__(domain, known)
        # real images in the place of draws, as many of them
        self.cover = prdc(self.real[:n], self.real[n:]).coverage

    def row(self, images: torch.Tensor) -> dict[str, float]:
        """Every measure of some images, with 95 % intervals."""
        x = imagenet(images)
        ratio = self.ratio(x)
        inside = x[(ratio >= BAND[0]) & (ratio <= BAND[1])]
        told = c2st(x, self.real)
        band = {
            "kid_band": max(kid(inside, self.real), self.floor) if len(inside) > 1 else np.nan,
            "in_band": len(inside) / len(x),
        }
        rest = {
            "coverage": prdc(x, self.real).coverage / self.cover,
            "diversity": diversity(x, self.real),
            "c2st": told.value,
            "c2st_low": told.low,
            "c2st_high": told.high,
        }
        return self.distance(x) | band | self.likeness(images, ratio) | rest


# ------------------------------------------------------------------------------------------ samplers


def three_rules(known: ReferenceSet, n: int) -> tuple[np.ndarray, float]:
    """Keep candidates of the released sampler, and the share that is kept.

    Candidates are points on slerps of two latents; means of three geometric measures must be those of the
    references within a standard deviation. It stops at `n` or at the budget.
    """
    rng, flat = np.random.default_rng(0), known.latent.flatten(1).numpy()
    prior, targets = make_prior("slerp").fit(flat), Targets.from_reference(flat, rng=rng)
    kept, tried = [], 0
    while tried < BUDGET and sum(map(len, kept)) < n:
        candidates = prior.sample(BATCH, rng)
        kept.append(candidates[accept(candidates, flat, targets, rng=rng).accepted])
        tried += BATCH
    found = np.concatenate(kept)
    return found, len(found) / tried


def released(
    model: FrozenModel, known: ReferenceSet, kept: np.ndarray, rng: np.random.Generator
) -> torch.Tensor:
    """Decode what the rules kept; what is missing is drawn without them."""
    more = make_prior("slerp").fit(known.latent.flatten(1).numpy()).sample(DRAWS - len(kept), rng)
    latent = torch.from_numpy(np.concatenate([kept, more])).reshape(DRAWS, *model.sample_shape)
    images = generate(model, latent, timesteps=known.timesteps).images
    return images.float().clamp(-1, 1)


def drawn(
    model: FrozenModel, known: ReferenceSet, recipe: Recipe, rng: np.random.Generator
) -> torch.Tensor:
    """Images of a recipe."""
    return sample(model, known, recipe, n=DRAWS, rng=rng).images


def finalists(
    model: FrozenModel, sets: Mapping[float | None, ReferenceSet], seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and the images of each sampler; copies once, as a control."""
    known = sets[None]
    made = FINALISTS | (COPIES if seed == 0 else {})
    for k, (name, (recipe, sigma)) in enumerate(made.items()):
        rng = np.random.default_rng([seed, k])
        yield name, drawn(model, sets[sigma], recipe, rng)
    yield (
        "default, pixel twin",
        twin(known, Recipe(), n=DRAWS, rng=np.random.default_rng([seed, 0])),
    )


# -------------------------------------------------------------------------------------------- tables


def search() -> None:
    """Try every prior at every level on one pair, and its twin in the pixels."""
    path = RESULTS / "sampler_search.csv"
    model, there = load_model(PAIR[0]), done(path, "recipe")
    at = partial(known_of, model, PAIR[1], n=REFERENCES)
    judge = SamplerJudge(PAIR[1], at(NEAR), SEARCH_DRAWS)
    for level, (prior, options) in product(LEVELS, SEARCHED):
        name = name_of(prior, options, level)
        if (name,) in there:
            continue
        known = at(LEVELS[level])
        recipe, rng = Recipe(prior, options), np.random.default_rng(0)
        if level == "pixels":
            images = twin(known, recipe, n=SEARCH_DRAWS, rng=rng)
        else:
            images = sample(model, known, recipe, n=SEARCH_DRAWS, rng=rng).images
        labels = {"recipe": name, "prior": prior, "level": level, "options": str(options)}
        append(path, [labels | judge.row(images)])
        print(name, flush=True)


def levels(models: list[str]) -> None:
    """Draw mosaics at every level, and measure how near they are to references and to held-out images."""
    path = RESULTS / "sampler_levels.csv"
    there = done(path, "model", "domain", "sigma")
    for (name, domain), sigma in product((*CELLS, *HARD), SIGMAS):
        if name not in models or (name, domain, sigma) in there:
            continue
        model = load_model(name)
        known = known_of(model, domain, sigma, REFERENCES, POINTS)
        judge = SamplerJudge(domain, known, min(SEARCH_DRAWS, len(known.heldout) // 2))
        rng = np.random.default_rng(0)
        images = sample(model, known, Recipe(), n=SEARCH_DRAWS, rng=rng).images
        labels = {"model": name, "domain": domain, "sigma": sigma, "window": known.window}
        labels["kid_references"] = kid(imagenet(images), judge.fit)
        append(path, [labels | judge.row(images)])
        print(name, domain, sigma, flush=True)


def sets_of(
    model: FrozenModel, domain: str, *sigmas: float | None
) -> dict[float | None, ReferenceSet]:
    """Get the references at some levels, None for the one that is chosen."""
    return {sigma: known_of(model, domain, sigma, REFERENCES, POINTS) for sigma in sigmas}


def pair_rows(model: FrozenModel, domain: str) -> Iterator[list[dict[str, object]]]:
    """Yield the rows of a pair, seed by seed."""
    sets = sets_of(model, domain, None, NEAR, RELEASED)
    judge = SamplerJudge(domain, sets[None])
    kept, share = three_rules(sets[RELEASED], DRAWS * SEEDS)
    for seed in range(SEEDS):
        labels = {"model": model.name, "domain": domain, "seed": seed}
        labels |= {"window": sets[None].window, "sigma": sets[None].sigma}
        made = dict(finalists(model, sets, seed))
        rng, mine = np.random.default_rng([seed, 9]), kept[seed * DRAWS : (seed + 1) * DRAWS]
        made["released"] = released(model, sets[RELEASED], mine, rng)
        accepted = {"released": {"kept": share, "accepted": len(mine)}}
        none = {"kept": 1.0, "accepted": DRAWS}
        yield [
            labels | {"sampler": name} | accepted.get(name, none) | judge.row(images)
            for name, images in made.items()
        ]


def every_pair(models: list[str]) -> None:
    """Draw from the finalists on every pair, and judge them."""
    path = RESULTS / "samplers.csv"
    for model, domain in missing_pairs(path, models):
        append(path, [row for rows in pair_rows(model, domain) for row in rows])


def numbers(models: list[str]) -> None:
    """Draw the default at one level, and its twin, with few to many references."""
    path = RESULTS / "sampler_numbers.csv"
    there = done(path, "model", "domain")
    for name, domain in CELLS:
        if name not in models or (name, domain) in there:
            continue
        model, rows = load_model(name), []
        most = len(open_images(domain, like=model))
        for n in sorted({min(n, most) for n in NUMBERS}):
            known = known_of(model, domain, NEAR, n, POINTS)
            judge = SamplerJudge(domain, known)
            for seed in range(SEEDS):
                rng = [np.random.default_rng([seed, 0]) for _ in range(2)]
                labels = {"model": name, "domain": domain, "references": n, "seed": seed}
                labels["window"] = known.window
                for sampler, images in (
                    ("default", drawn(model, known, Recipe(), rng[0])),
                    ("default, pixel twin", twin(known, Recipe(), n=DRAWS, rng=rng[1])),
                ):
                    rows.append(labels | {"sampler": sampler} | judge.row(images))
        append(path, rows)
        print(name, domain, flush=True)


def affine(models: list[str]) -> None:
    """Measure how much of the latents a linear map of the pixels explains, level by level."""
    path = RESULTS / "affine_share.csv"
    for model, domain in missing_pairs(path, models):
        labels = {"model": model.name, "domain": domain}
        rows = [
            labels | {"sigma": sigma, "share": affine_share(x.images, x.latent)}
            for sigma, x in sets_of(model, domain, NEAR, RELEASED).items()
        ]
        append(path, rows)


def main() -> None:
    """Make one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["search", "levels", "every", "numbers", "affine"])
    parser.add_argument("--models", nargs="*", default=model_names(), help="all by default")
    args = parser.parse_args()
    if args.table == "search":
        search()
    else:
        tables = {"levels": levels, "every": every_pair, "numbers": numbers, "affine": affine}
        tables[args.table](args.models)


if __name__ == "__main__":
    main()
