"""Simulate the null tables that are shipped, and measure size and power of every test of the report.

    .venv/bin/python benchmarks/calibrate.py                  # what `make calibrate` runs
    .venv/bin/python benchmarks/calibrate.py --repeats 100 --sizes 100x3072 --out runs/calibration.csv

Tables that are in ``data/nulls`` are kept (``--fresh`` makes them anew); laws and sizes that the output
has are kept, so a run that was stopped goes on. Size: the share of true Gaussian samples that
a test rejects at 5 %, for each covariance that lies in its family. Power: the share of samples of an
alternative whose Holm-combined p-value rejects the family.

The bootstrap of the sizes in F3 is calibrated by the warp-speed method (Giacomini, Politis and White,
Econometric Theory 29, 2013): each repeat makes one draw, and all draws together are the null law.
"""

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.fft import idct
from scipy.stats import binom
from threadpoolctl import threadpool_limits

from ood_lib import latents, nulls
from ood_lib.files import project_root
from ood_lib.gaussianity import FAMILIES, report

ROOT = project_root()
SHIPPED = ROOT / "data" / "nulls"
SPECTRUM = SHIPPED / "latent_spectrum.npz"
SHAPES = {3072: (3, 32, 32), 1024: (1, 32, 32), 196608: (3, 256, 256)}
SIZES = ("100x3072", "1000x3072", "100x196608")
ROWS, WIDTHS = (32, 50, 100, 256), (1024, 3072)  # of the book and the study
TABLES = (
    *(("gram", n, d) for n in ROWS for d in WIDTHS),
    *(("gram", n, d) for n, d in ((1000, 3072), (100, 196608), (1000, 196608))),
    *(("mardia", n // 2, min(10, n // 10)) for n in (*ROWS, 1000)),
    *(("patch", min(n, 200), count, 64) for n in ROWS for count in (16, 48)),
)
LEVEL, BAND = 0.05, 0.999
SPIKES = 60
POWER = ((256, 3072), (100, 3072), (50, 3072))


@dataclass(frozen=True)
class Cell:
    """One covariance or alternative at one size, with the families to ask for."""

    kind: str
    name: str
    n: int
    d: int
    families: tuple[str, ...]


# ------------------------------------------------------------------------------------------ samples


def eigenvalues(name: str, d: int) -> np.ndarray:
    """Eigenvalues of a covariance by name, with mean 1."""
    if name == "isotropic":
        return np.ones(d)
    if name == "60 spikes":
        values = np.r_[np.full(SPIKES, 20.0), np.ones(d - SPIKES)]
    elif name == "latents":
        with np.load(SPECTRUM) as fitted:
            spikes, scale = fitted["spikes"], d / float(fitted["d"])
            values = np.r_[spikes * scale, np.full(d - len(spikes), float(fitted["rest"]))]
    else:
        values = 1 / np.arange(1, d + 1)
    return values / values.mean()


def gaussian(name: str, n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    """Draw from N(mu, S): along the coordinates, or along the cosines if the family is F3."""
    if name == "isotropic":
        return rng.standard_normal((n, d))
    z = rng.standard_normal((n, d)) * np.sqrt(eigenvalues(name, d))
    mean = rng.standard_normal(d)
    return mean + (z if name == "1/k along the coordinates" else idct(z, norm="ortho"))


def _scale_mixture(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((n, d)) * rng.choice([0.9, 1.1], (n, 1))


def _clusters(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    towards = rng.standard_normal(d)
    side = rng.choice([-15.0, 15.0], (n, 1))
    return rng.standard_normal((n, d)) + side * towards / np.linalg.norm(towards)


def _neighbours(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    z = rng.standard_normal((n, d))
    a = (1 - np.sqrt(1 - 4 * 0.05**2)) / (2 * 0.05)  # moving average of correlation a / (1 + a^2)
    images = z.reshape(n, *SHAPES[d])
    images = images + a * np.roll(images, 1, axis=-1)
    return images.reshape(n, d) / np.sqrt(1 + a**2)


def _heavy_tails(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    z = rng.standard_normal((n, d))
    odd = rng.permutation(d)[: round(0.01 * d)]
    z[:, odd] = rng.standard_t(3, (n, len(odd))) / np.sqrt(3)
    return z


def _orthonormal(d: int, r: int, rng: np.random.Generator) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((d, r)))[0].T


def _binary(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    signs = rng.choice([-1.0, 1.0], (n, 10))
    part = np.sqrt(0.2 * d / 10) * signs @ _orthonormal(d, 10, rng)
    return np.sqrt(0.8) * rng.standard_normal((n, d)) + part


def _mixture_beside_rank_40(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    part = np.sqrt(d / 40) * rng.standard_normal((n, 40)) @ _orthonormal(d, 40, rng)
    return (_scale_mixture(n, d, rng) + part) / np.sqrt(2)


def _mixture_with_rank_40(n: int, d: int, rng: np.random.Generator) -> np.ndarray:
    part = np.sqrt(d / 40) * rng.standard_normal((n, 40)) @ _orthonormal(d, 40, rng)
    return (rng.standard_normal((n, d)) + part) / np.sqrt(2) * rng.choice([0.9, 1.1], (n, 1))


ALTERNATIVES: dict[str, tuple[Callable[..., np.ndarray], tuple[str, ...]]] = {
    "scale mixture 0.9, 1.1": (_scale_mixture, FAMILIES),
    "clusters 30 sigma apart": (_clusters, FAMILIES),
    "neighbour correlation 0.05": (_neighbours, FAMILIES[:3]),
    "1 % of coordinates t(3)": (_heavy_tails, FAMILIES),
    "rank-10 binary, 20 %": (_binary, FAMILIES),
    "scale mixture beside a rank-40 Gaussian": (_mixture_beside_rank_40, ("F3",)),
    "scale mixture of all with a rank-40 Gaussian": (_mixture_with_rank_40, ("F3",)),
}


# ----------------------------------------------------------------------------------------- the cells


def cells(sizes: list[str]) -> list[Cell]:
    """All cells: covariances at the given sizes, alternatives at three."""
    found = []
    for n, d in (map(int, x.split("x")) for x in sizes):
        if d > 10_000:  # a subset: what comes from the Gram matrix and the image plane
            found.append(Cell("size", "isotropic", n, d, FAMILIES[:3]))
            continue
        found.append(Cell("size", "isotropic", n, d, FAMILIES))
        found.append(Cell("size", "1/k along the coordinates", n, d, ("F2", "F3")))
        found += [Cell("size", name, n, d, ("F3",)) for name in ("1/k", "60 spikes", "latents")]
    return found + [
        Cell("power", x, *size, of[1]) for size in POWER for x, of in ALTERNATIVES.items()
    ]


def _one_size(cell: Cell, repeat: int) -> dict[str, object]:
    """Make one repeat of a covariance: p-values, and what the warp-speed method needs."""
    rng = np.random.default_rng([cell.n, cell.d, repeat, *cell.name.encode()])
    z = gaussian(cell.name, cell.n, cell.d, rng)
    results = report(z, rng=rng, null=cell.families, shape=SHAPES[cell.d], bootstrap=0).results
    found: dict[str, object] = {f"{x.null}.{x.name}": x.pvalue for x in results if x.testable}
    if "F3" in cell.families:
        z -= z.mean(0)
        gram = z @ z.T
        spectrum = nulls.spiked_spectrum(gram, cell.d)
        rank = len(spectrum.spikes)
        drawn = nulls.draw_gram(spectrum, cell.n, rng)
        found["observed"] = nulls.free_statistics(gram, cell.d, rank)
        found["drawn"] = nulls.free_statistics(drawn, cell.d, rank)
    return found


def _warp(repeats: list[dict[str, object]]) -> dict[str, np.ndarray]:
    """p-values of the bootstrapped statistics from one draw of each repeat."""
    observed, drawn = (pd.DataFrame([x[key] for x in repeats]) for key in ("observed", "drawn"))
    return {
        f"F3.{name}": np.array([nulls.pvalue(x, drawn[name].to_numpy()) for x in observed[name]])
        for name in observed
    }


def _size(cell: Cell, repeats: list[dict[str, object]]) -> list[dict[str, object]]:
    names = [x for x in repeats[0] if x not in ("observed", "drawn")]
    pvalues = {name: np.array([x[name] for x in repeats]) for name in names}
    if "observed" in repeats[0]:
        pvalues |= _warp(repeats)
    low, high = binom.interval(BAND, len(repeats), LEVEL)
    return [_row(cell, name, p, low <= (p <= LEVEL).sum() <= high) for name, p in pvalues.items()]


def _one_power(cell: Cell, repeat: int) -> dict[str, object]:
    rng = np.random.default_rng([cell.n, cell.d, repeat, *cell.name.encode()])
    z = ALTERNATIVES[cell.name][0](cell.n, cell.d, rng)
    found = report(z, rng=rng, null=FAMILIES, shape=SHAPES[cell.d])
    return {f"{family}.combined": found.combined(family).pvalue for family in cell.families} | {
        f"{x.null}.{x.name}": x.pvalue for x in found.results if x.testable
    }


def _power(cell: Cell, repeats: list[dict[str, object]]) -> list[dict[str, object]]:
    return [_row(cell, name, np.array([x[name] for x in repeats]), None) for name in repeats[0]]


def _row(cell: Cell, name: str, pvalues: np.ndarray, inside: bool | None) -> dict[str, object]:
    family, test = name.split(".")
    return {
        "kind": cell.kind,
        "law": cell.name,
        "n": cell.n,
        "d": cell.d,
        "null": family,
        "test": test,
        "repeats": len(pvalues),
        "rejected": round(float((pvalues <= LEVEL).mean()), 4),
        "inside": None if inside is None else bool(inside),
    }


def measure(cell: Cell, repeats: int, pool: ProcessPoolExecutor) -> list[dict[str, object]]:
    """Measure one cell."""
    one, summary = (_one_size, _size) if cell.kind == "size" else (_one_power, _power)
    done = list(pool.map(one, [cell] * repeats, range(repeats), chunksize=4))
    return summary(cell, done)


# --------------------------------------------------------------------------------------------- main


def fit_spectrum() -> None:
    """Fit the spectrum of real latents: digits through the model of clothes, at the last level."""
    latent = latents.get(latents.LatentSpec("ddpm-fashion-32", "digits", n=256, t_end=999)).latent
    flat = latent.flatten(1).double().numpy()
    flat -= flat.mean(0)
    fitted = nulls.spiked_spectrum(flat @ flat.T, flat.shape[1])
    np.savez(SPECTRUM, spikes=fitted.spikes, rest=fitted.rest, d=fitted.d)


def make(table: tuple[str | int, ...]) -> None:
    """Simulate a table, and put it where the repository keeps it."""
    name = nulls.table_name(*table)
    print(f"simulating {name}", flush=True)
    nulls.null_table(*table)
    (ROOT / "runs" / "nulls" / name).replace(SHIPPED / name)


def main() -> None:
    """Make the tables, then measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--power-repeats", type=int, default=40)
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), help="such as 100x3072")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results" / "calibration.csv")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--fresh", action="store_true", help="simulate the tables anew")
    parser.add_argument("--tables", action="store_true", help="only the tables")
    args = parser.parse_args()
    SHIPPED.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for table in TABLES:
            (SHIPPED / nulls.table_name(*table)).unlink(missing_ok=True)
            (ROOT / "runs" / "nulls" / nulls.table_name(*table)).unlink(missing_ok=True)
    if not SPECTRUM.is_file():
        fit_spectrum()
    rows = pd.read_csv(args.out).to_dict("records") if args.out.is_file() else []
    done = {(x["kind"], x["law"], x["n"], x["d"]) for x in rows}
    # One repeat a core: two threads on small matrices wait for each other.
    with ProcessPoolExecutor(args.workers, initializer=threadpool_limits, initargs=(1,)) as pool:
        missing = [x for x in TABLES if not (SHIPPED / nulls.table_name(*x)).is_file()]
        list(pool.map(make, missing))
        if args.tables:
            return
        for cell in cells(args.sizes):
            if (cell.kind, cell.name, cell.n, cell.d) in done:
                continue
            repeats = args.repeats if cell.kind == "size" else args.power_repeats
            rows += measure(cell, repeats, pool)
            pd.DataFrame(rows).to_csv(args.out, index=False, lineterminator="\n")
            print(f"{cell.kind}: {cell.name}, n = {cell.n}, d = {cell.d}", flush=True)
    outside = [x for x in rows if x["inside"] is False]
    print(f"{len(outside)} of {len(rows)} rates outside their band", *outside, sep="\n")


if __name__ == "__main__":
    main()
