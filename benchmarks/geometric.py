"""What the geometric rules keep, what they change in the images, and whether moved latents follow the law.

    .venv/bin/python benchmarks/geometric.py           # data/results/geometric.csv
    .venv/bin/python benchmarks/geometric.py --law     # data/results/geometric_law.csv

The first table has three kinds of rows for a pair of a model and a domain that it never saw, all from
the same references. `acceptance`: the share of candidates of each prior that pass the three released
rules, and each rule. `moments`: the share of each rule's variance that two moments explain. `images`:
quality of decoded candidates, as they come, kept by the rules, and moved. The released levels t = 900 and
t = 474 of the linear schedule are noise levels here, the same for every model.

Each way of keeping candidates walks through the same stream of draws, so that a narrower tolerance keeps
a part of what a wider one keeps, and no candidate is decoded twice. Rows that stand are kept, so a run
that was stopped goes on. Images are made for the first domains of every model, domain by domain;
`--domains` says for how many. A pair takes about six minutes of one core for the images, a few
seconds for the rest, and a minute for the inversion of its references where they are not on disk.
`--law` takes seven minutes.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import process_time

import judging
import numpy as np
import torch
from scipy.stats import ks_2samp
from scipy.stats import t as student
from tables import append, done

from ood_lib import generate, load_model
from ood_lib.features import imagenet
from ood_lib.files import project_root
from ood_lib.geometry import RULES, Targets, accept
from ood_lib.metrics import jackknife, kid, ratio_of_shares
from ood_lib.models import FrozenModel, model_names
from ood_lib.optimisation import (
    STATISTICS,
    descend,
    inside,
    leave_one_out,
    project,
    reject,
    statistics,
    two_moments,
)
from ood_lib.priors import make_prior
from ood_lib.sampling import ReferenceSet
from ood_lib.study import unseen_domains

RESULTS = project_root() / "data" / "results"
LEVELS = {900: 60.8, 474: 2.991}  # noise over signal
REFERENCES, FEW = 100, 20
DRAWS, DOMAINS, GROUPS = 64, 3, 8
BUDGET, BATCH, ENOUGH = 20_000, 1_000, 300
WIDTHS = (0.5, 1.0, 2.0)
PRIORS = (
    "slerp",
    "slerp about the mean",
    "slerp between neighbours",
    "isotropic",
    "isotropic, as released",
    "full covariance",
    "recombination",
    "replay",
    "standard normal",
)
DECODED = {"slerp": WIDTHS, "full covariance": (1.0,)}
KEYS = ("model", "domain", "kind")
COLUMNS = (
    *(*KEYS, "t", "references", "prior", "way", "width", "candidates", "rate"),
    *(*RULES, "seconds", "n", "calls", "kid", "sd", "floor", "noise"),
    *("share", "novelty"),
)
SIZES, D, MOVED, BATCHES = (100, 256, 1000), 3072, 256, 200


def known_of(model: FrozenModel, domain: str, t: int) -> ReferenceSet:
    """Get the references at a level: a hundred, or as many as there are."""
    return judging.known_of(model, domain, LEVELS[t], REFERENCES)


def flat_of(model: FrozenModel, domain: str, t: int) -> np.ndarray:
    """Latents of the references as rows."""
    return known_of(model, domain, t).latent.flatten(1).numpy()


# -------------------------------------------------------------------------------- rules, no network


def acceptance(name: str, flat: np.ndarray) -> dict[str, object]:
    """Measure how many candidates of a prior pass the rules, and CPU seconds for a thousand of them.

    A replayed latent is judged against the other references, as a copy of one fails by definition.
    """
    rng = np.random.default_rng(0)
    prior, rules = make_prior(name).fit(flat), Targets.from_reference(flat, width=1.0, rng=rng)
    passed, started = np.empty((0, len(RULES)), bool), process_time()
    while len(passed) < BUDGET and passed.all(axis=1).sum() < ENOUGH:
        own = rng.integers(len(flat), size=BATCH) if name == "replay" else None
        drawn = prior.sample(BATCH, rng) if own is None else flat[own]
        found = accept(drawn, flat, rules, own=own, rng=rng)
        passed = np.concatenate([passed, found.passed])
    seconds = 1000 * (process_time() - started) / len(passed)
    told = {"prior": name, "width": 1.0, "candidates": len(passed), "seconds": seconds}
    each = dict(zip(RULES, passed.mean(axis=0).tolist(), strict=True))
    return told | each | {"rate": float(passed.all(axis=1).mean())}


def accepted(model: FrozenModel, domain: str) -> Iterator[dict[str, object]]:
    """Measure the acceptance of every prior at every level."""
    for t in LEVELS:
        flat = flat_of(model, domain, t)
        for name in PRIORS:
            yield {"t": t, "references": len(flat)} | acceptance(name, flat)


def explained(model: FrozenModel, domain: str) -> Iterator[dict[str, object]]:
    """Share of each rule's variance over half of the latents that two moments explain."""
    for t in LEVELS:
        fit, fresh = np.array_split(flat_of(model, domain, t), 2)
        share = two_moments(fresh, fit).share[1:]
        told = {"t": t, "references": len(fit), "n": len(fresh)}
        yield told | dict(zip(RULES, share.tolist(), strict=True))


# ------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Seen:
    """Features (n, f), hits (n,) and nearest-neighbour ratios (n,) of images."""

    features: np.ndarray
    hits: np.ndarray
    ratio: np.ndarray


def noise(real: np.ndarray, times: int = 100) -> float:
    """Root mean square KID of real images, as many as are drawn or half of them, to the others."""
    rng, found = np.random.default_rng(0), []
    for _ in range(times):
        some, others = np.split(rng.permutation(real), [min(DRAWS, len(real) // 2)])
        found.append(kid(some, others))
    return float(np.sqrt(np.square(found).mean()))


class Judge(judging.Judge):
    """Decodes latents of a pair of model and domain, and compares the images."""

    def __init__(self, model: FrozenModel, domain: str) -> None:
        super().__init__(domain, known_of(model, domain, 900))
        self.model, self.noise = model, noise(self.real)

    def look(self, latents: np.ndarray, grid: np.ndarray) -> Seen:
        """Decode latents (n, d) and look at every image once."""
        latent = torch.from_numpy(latents).reshape(-1, *self.model.sample_shape)
        images = generate(self.model, latent, timesteps=grid).images.float().clamp(-1, 1)
        x = imagenet(images)
        hits = self.classifier.is_domain(images, self.domain)
        return Seen(x, hits, self.ratio(x))

    def row(self, seen: Seen, rows: np.ndarray) -> dict[str, object]:
        """Quality of some of the images that were seen."""
        x = seen.features[rows]
        found = jackknife(lambda kept: kid(x[kept], self.real), len(x), groups=GROUPS)
        return {
            "n": len(rows),
            "kid": found.value,
            "sd": (found.high - found.value) / student.ppf(0.975, GROUPS - 1),
            "floor": self.floor,
            "noise": self.noise,
            "share": ratio_of_shares(seen.hits[rows], self.hits).value,
            "novelty": float(np.median(seen.ratio[rows])),
        }


def stream(
    draw: Callable[[int, np.random.Generator], np.ndarray],
    flat: np.ndarray,
    widths: Sequence[float],
) -> dict[tuple[str, object], tuple[np.ndarray, np.ndarray]]:
    """Places and latents of candidates from one stream: its first, the next, and those that rules keep.

    A tolerance that keeps too few of the budget is left out.
    """
    first = draw(BATCH, np.random.default_rng(1))
    pools = {("all", ""): np.arange(DRAWS), ("random", ""): np.arange(DRAWS, 2 * DRAWS)}
    pools = {key: (rows, first[rows]) for key, rows in pools.items()}
    for width in widths:
        rules = Targets.from_reference(flat, width=width, rng=np.random.default_rng(0))
        rng = np.random.default_rng(1)
        kept = reject(draw, flat, rules, n=DRAWS, budget=BUDGET, batch=BATCH, rng=rng)
        if kept.history.complete:
            pools["kept", width] = kept.indices, kept.latents
    return pools


def of_stream(
    judge: Judge, prior: str, flat: np.ndarray, grid: np.ndarray
) -> Iterator[dict[str, object]]:
    """Images of candidates as they come and as the rules keep them; each is decoded once."""
    pools = stream(make_prior(prior).fit(flat).sample, flat, DECODED[prior])
    places, latents = (np.concatenate(x) for x in zip(*pools.values(), strict=True))
    once, first = np.unique(places, return_index=True)
    seen = judge.look(latents[first], grid)
    for (way, width), (rows, _) in pools.items():
        found = judge.row(seen, np.searchsorted(once, rows))
        spent = int(rows.max()) + 1 if way == "kept" else DRAWS
        told = {"way": way, "width": width, "candidates": spent, "rate": DRAWS / spent}
        yield told | found


def of_moved(
    judge: Judge, prior: str, flat: np.ndarray, other: np.ndarray, grid: np.ndarray
) -> Iterator[dict[str, object]]:
    """Images of the first candidates moved to the law of the references, and to another domain's."""
    z = make_prior(prior).fit(flat).sample(BATCH, np.random.default_rng(1))[:DRAWS]
    ways = {"project": (project, flat), "wrong": (project, other), "descend": (descend, flat)}
    for way, (move, law) in ways.items():
        moved = move(z, law, rng=np.random.default_rng(2))
        told = {"way": way, "candidates": len(z), "rate": moved.history.rate}
        if len(moved.latents) >= GROUPS:
            seen = judge.look(moved.latents, grid)
            told |= judge.row(seen, np.arange(len(moved.latents)))
        yield told


def decoded(model: FrozenModel, domain: str) -> Iterator[dict[str, object]]:
    """Images of the released sampler over the grid of its settings; at the released ones, all ways."""
    judge, domains = Judge(model, domain), unseen_domains(model)
    wrong = domains[(domains.index(domain) + 1) % len(domains)]
    for t, n in product(LEVELS, (REFERENCES, FEW)):
        flat, grid = flat_of(model, domain, t)[:n], known_of(model, domain, t).timesteps
        released = (t, n) == (900, REFERENCES)
        for prior in DECODED if released else ("slerp",):
            told = {"t": t, "references": len(flat), "prior": prior, "calls": len(grid) - 1}
            rows = list(of_stream(judge, prior, flat, grid))
            if released:
                rows += of_moved(judge, prior, flat, flat_of(model, wrong, t), grid)
            yield from (told | row for row in rows)


# ---------------------------------------------------------------------------------------------- law


def law(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draws of a Gaussian with a mean of 0.2 in size and unit variance, (n, D)."""
    return np.where(np.arange(D) // 2 % 2, 0.2, -0.2) + rng.standard_normal((n, D))


def law_rows(n: int) -> Iterator[dict[str, object]]:
    """Batches of moved noise that differ from held-out latents at 5 %, statistic by statistic."""
    movers = {"project": project, "descend": descend}
    counts = {name: np.zeros(len(STATISTICS), int) for name in ("nothing", *movers)}
    held = {name: np.zeros(len(STATISTICS)) for name in counts}
    seconds, rng = dict.fromkeys(counts, 0.0), np.random.default_rng(3)
    for _ in range(BATCHES):
        known, fresh, z = law(n, rng), law(MOVED, rng), rng.standard_normal((MOVED, D))
        moved = {"nothing": z}
        for name, move in movers.items():
            started = process_time()
            moved[name] = move(z, known, rng=rng).latents
            seconds[name] += process_time() - started
        new, own = statistics(fresh, known), leave_one_out(known)
        for name, latents in moved.items():
            values = statistics(latents, known)
            both = zip(values.T, new.T, strict=True)
            counts[name] += [ks_2samp(a, b).pvalue < 0.05 for a, b in both]
            held[name] += inside(values, own).mean(axis=0) / BATCHES
    for name, k in product(counts, range(len(STATISTICS))):
        yield {
            **{"d": D, "references": n, "method": name, "statistic": STATISTICS[k]},
            **{"batches": BATCHES, "differ": int(counts[name][k]), "inside": float(held[name][k])},
            "seconds": 1000 * seconds[name] / MOVED / BATCHES,
        }


# ------------------------------------------------------------------------------------------- tables


def pairs(path: Path, models: Sequence[str], imaged: int) -> None:
    """Measure what is missing, without the network first, then domain by domain."""
    there = done(path, *KEYS)
    parts = {"acceptance": (accepted, 5), "moments": (explained, 5), "images": (decoded, imaged)}
    for kind, (measure, domains) in parts.items():
        for k, name in product(range(domains), models):
            model = load_model(name)
            key = name, unseen_domains(model)[k], kind
            if key in there:
                continue
            started, labels = process_time(), dict(zip(KEYS, key, strict=True))
            append(path, [labels | row for row in measure(model, key[1])], COLUMNS)
            print(*key, f"{process_time() - started:.0f} CPU s", flush=True)


def sizes(path: Path) -> None:
    """Measure the law of moved latents for every number of references."""
    there = done(path, "references")
    for n in SIZES:
        if (n,) not in there:
            rows = list(law_rows(n))
            append(path, rows, list(rows[0]))
            print(n, "references", flush=True)


def main() -> None:
    """Measure the pairs, or the law."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--law", action="store_true", help="the law of moved latents, once")
    parser.add_argument("--models", nargs="*", default=model_names(), help="all by default")
    parser.add_argument("--domains", type=int, default=DOMAINS, help="domains with images, 0 to 5")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args()
    if args.law:
        sizes(args.out / "geometric_law.csv")
    else:
        pairs(args.out / "geometric.csv", args.models, args.domains)


if __name__ == "__main__":
    main()
