"""Audit of a user's own images under a frozen model: what returns, what is Gaussian, what separates.

Images are inverted in shards, 14 network calls each, and scored on the way, so that memory does not grow
with their number. Statistics of images taken together (Gaussianity, separability, geometry) read a seeded
choice of them. Round trips, which cost more than three times as many calls, and draws of new images read
fewer still. What cannot be measured on the images that are there is left out, with the reason, and the rest
is done.

`measure` writes tables, `render` a page from them, `audit` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from ood_lib import gaussianity, geometry, reports, sampling, separability
from ood_lib.detectors import STATISTICS, OODDetector
from ood_lib.domains import ImageRows, folder_files, load_images, open_images, to_bytes
from ood_lib.files import write_json, write_whole
from ood_lib.gram import pairwise_distances
from ood_lib.inversion import LARGEST_ERROR, generate, invert, roundtrip
from ood_lib.latents import SHARD, LatentSet, LatentSpec, shards
from ood_lib.metrics import Interval, median_interval, psnr, ratio_of_shares
from ood_lib.models import FrozenModel, load_model, model_names
from ood_lib.study import own_domain

__all__ = ["Audit", "LeftOut", "Measure", "audit", "measure", "render"]

# 14 calls: on five of six pairs of model and domain the median latent was within 0.05 of the converged one
POINTS, SOLVER = 15, "abm2"
JOINT = 2000  # images of joint statistics
PAIRS = 1000  # those of statistics of pairs, whose memory grows with the square
MEDIANS = 1000  # values of a median with an interval, whose bootstrap holds 2,000 times as many
REFERENCES = 128
FEWEST_REFERENCES = 12  # two halves of six, for the control
ROUND_TRIPS, OWN_ROUND_TRIPS = 64, 24  # 48 calls each, of which only the images are kept
SAMPLED, DRAWN = 280, 64  # images that draws are made from and judged by, and draws
NEAR_POINTS = 9  # the way to the level of the draws is short
JUDGED = 2 * sampling.JUDGES  # images from which as many can be held out as judging takes
SIMULATED = (256, 100, 50, 32)  # sizes whose null laws are shipped
PERMUTATIONS, RESAMPLES, BOOTSTRAP = 199, 500, 399
SHOWN = 16
RECORD = "audit.json"  # it also marks a folder as that of an audit
SCORES = {
    "norm": "norm of the latent",
    "distance": "distance of the latent to the mean of the reference's",
    "typicality": "distance of the squared norm from its mean in the reference",
    "mahalanobis": "Mahalanobis distance of the latent to the reference's",
    "linear": "a linear discriminant that is learnt from both sets",
    "c2st": "a classifier with a Gaussian kernel that is learnt from both sets",
}
FAMILIES = {
    "F0": "N(0, I)",
    "F1": "a Gaussian with one variance for all numbers",
    "F2": "a Gaussian with independent numbers",
    "F3": "a Gaussian with any covariance",
}


@dataclass(frozen=True)
class LeftOut:
    """A part of the audit that was not done.

    Parameters
    ----------
    part : str
        What is missing.
    reason : str
        Why, and what would help.

    Examples
    --------
    >>> LeftOut("geometry", "there are 3 images; 4 are needed").part
    'geometry'
    """

    part: str
    reason: str


@dataclass(frozen=True)
class Measure:
    """A number of the summary.

    Parameters
    ----------
    measure : str
        Its name, part.what; what is told of the reference, or of a control, ends in that word.
    value : float
        The number.
    ci_low, ci_high : float
        95 % interval; NaN where there is none.
    n : int
        Images that it is taken from.
    meaning : str
        What it says, as one sentence.

    Examples
    --------
    >>> Measure.of("ood.outliers", Interval(0.1, 0.05, 0.2), 60, "Share of outliers.").ci_low
    0.05
    """

    measure: str
    value: float
    ci_low: float
    ci_high: float
    n: int
    meaning: str

    @classmethod
    def of(cls, name: str, found: Interval | float, n: int, meaning: str) -> Self:
        """Make one of an estimate with or without an interval."""
        if not isinstance(found, Interval):
            found = Interval(float(found), float("nan"), float("nan"))
        return cls(name, *found, n, meaning)


@dataclass(frozen=True)
class Audit:
    """What was measured.

    Parameters
    ----------
    out : Path
        Folder with ``images.csv``, ``reference.csv``, ``summary.csv``, ``gaussianity.csv``,
        ``separability.csv``, ``audit.json``, ``pictures.npz`` and ``samples``.
    n : int
        Images.
    reference : str
        What the images are told against, as a sentence.
    summary : tuple of Measure
        The numbers.
    left_out : tuple of LeftOut
        Parts that were not done.

    Examples
    --------
    >>> Audit(Path("out"), 20, "Its own images.", (), ()).n
    20
    """

    out: Path
    n: int
    reference: str
    summary: tuple[Measure, ...]
    left_out: tuple[LeftOut, ...]


# ------------------------------------------------------------------------------------ what comes in


def _folder(name: str | Path, what: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(
            f"{what} {str(name)!r} is no folder; give a folder that holds nothing but image files"
        )
    return folder.resolve()


def _out_folder(out: str | Path, inputs: Iterable[Path]) -> Path:
    """Resolve the folder of the results and refuse one that would end among the images."""
    made = Path(out).resolve()
    if made.exists() and not made.is_dir():
        raise ValueError(f"out {str(out)!r} is a file; give a folder")
    if made.is_dir() and any(made.iterdir()) and not (made / RECORD).is_file():
        raise ValueError(
            f"out {str(out)!r} holds files that no audit made; give a new or empty folder, or that of an "
            "earlier audit"
        )
    for folder in inputs:
        if made.is_relative_to(folder):
            raise ValueError(
                f"out {str(out)!r} lies in {folder}, whose files are the images; give another folder"
            )
    return made


def _called_from_cpu(model: FrozenModel, device: str) -> FrozenModel:
    """Let a network on another device take and give numbers on the CPU, where all else is done."""

    def predict(x_t: torch.Tensor, t: float) -> torch.Tensor:
        return model.predict(x_t.to(device), t).to(x_t.device)

    return model if device == "cpu" else replace(model, predict=predict)


def _model_name(model: str) -> str:
    """Name a model as `load_model` takes it; a folder by its full path, so that it has a last part."""
    is_folder = model not in model_names() and Path(model).is_dir()
    return str(Path(model).resolve()) if is_folder else model


@dataclass(frozen=True)
class _Reference:
    """Images of the model's own domain, with their latents."""

    said: str
    images: torch.Tensor
    latent: torch.Tensor
    error: torch.Tensor | None


def _reference_images(
    model: FrozenModel, name: str, folder: Path | None, rng: np.random.Generator
) -> tuple[str, torch.Tensor]:
    """Find images of the model's own domain, and say where they come from."""
    own = own_domain(name)
    if folder is None and own is None:
        noise = torch.from_numpy(rng.standard_normal((REFERENCES, *model.sample_shape)))
        said = (
            f"{REFERENCES} images that the model itself made of noise, for want of real ones "
            "(--reference): they show what it makes, not what its domain is"
        )
        return said, generate(model, noise).images.float().clamp(-1, 1)
    source, split = (str(folder), "fit") if folder else (own, "heldout")
    count = min(REFERENCES, len(open_images(source, split=split, like=model)))
    images = load_images(source, n=count, split=split, like=model, rng=rng)
    what = folder.name if folder else f"held-out {source}, the model's own domain"
    return f"{count} images of {what}", images


def _reference(
    model: FrozenModel, name: str, folder: Path | None, seed: int, batch_size: int
) -> _Reference:
    said, images = _reference_images(model, name, folder, np.random.default_rng([seed, 1]))
    images = images[_first_of_copies(images, set())]
    if len(images) < FEWEST_REFERENCES:
        raise ValueError(
            f"the reference has {len(images)} images that differ; give {FEWEST_REFERENCES} or more of "
            "the model's own domain, or leave --reference out"
        )
    made = invert(model, images, points=POINTS, solver=SOLVER, batch_size=batch_size)
    return _Reference(said, images, made.latent.cpu(), made.error_estimate)


def _digest(image: torch.Tensor) -> bytes:
    return sha256(np.ascontiguousarray(image.numpy())).digest()


def _first_of_copies(images: torch.Tensor, seen: set[bytes]) -> list[int]:
    """Rows of images that were not seen before; what is seen is noted."""
    kept = []
    for row, image in enumerate(images):
        digest = _digest(image)
        if digest not in seen:
            kept.append(row)
            seen.add(digest)
    return kept


# --------------------------------------------------------------------------------- one pass over all


class _LatentDetector(OODDetector):
    """`OODDetector` of latents that are there already: one inversion serves all statistics."""

    def fit_latent(self, latent: np.ndarray) -> Self:
        self._learn(latent)
        self.offset_ = -float(np.quantile(self._own_scores(latent), 1 - self.contamination))
        return self

    def score_latent(self, latent: np.ndarray) -> np.ndarray:
        return self._scores(latent)

    def score_fitted(self, latent: np.ndarray) -> np.ndarray:
        """Score what it was fitted to, each under a fit without it."""
        return self._own_scores(latent)


def _flat(latent: torch.Tensor) -> np.ndarray:
    return latent.flatten(1).double().numpy()


@dataclass
class _Kept:
    """What is kept of a pass over all images: the latents of some, and a few pictures."""

    joint: np.ndarray
    tripped: np.ndarray
    seen: set[bytes]
    rows: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    images: list[torch.Tensor] = field(default_factory=list)
    returned: list[torch.Tensor] = field(default_factory=list)
    copies: int = 0

    def take(self, part: LatentSet) -> None:
        """Keep the latents of the chosen rows, of copies only the first."""
        last = part.first_row + len(part.latent)
        mine = self.joint[(self.joint >= part.first_row) & (self.joint < last)] - part.first_row
        fresh = _first_of_copies(part.images[mine], self.seen)
        self.copies += len(mine) - len(fresh)
        self.rows += (part.first_row + mine[fresh]).tolist()
        self.latents.append(part.latent[mine[fresh]])

    def reconstruct(self, model: FrozenModel, part: LatentSet, batch_size: int) -> np.ndarray:
        """PSNR of the round trip of the chosen rows, NaN for the others."""
        found = np.full(len(part.latent), np.nan)
        last = part.first_row + len(part.latent)
        mine = self.tripped[(self.tripped >= part.first_row) & (self.tripped < last)]
        mine = mine - part.first_row
        if len(mine):
            images = part.images[mine]
            made = roundtrip(model, images, batch_size=batch_size).images.float().clamp(-1, 1)
            found[mine] = psnr(made, images).numpy()
            room = max(0, SHOWN - sum(map(len, self.images)))
            self.images.append(images[:room].clone())
            self.returned.append(made[:room].clone())
        return found


def _score_table(
    latent: torch.Tensor,
    error: torch.Tensor | None,
    detectors: dict[str, _LatentDetector],
    *,
    fitted: bool = False,
) -> pd.DataFrame:
    """Score latents by everything that one inversion gives; `fitted` for those of the reference."""
    flat = _flat(latent)
    table = pd.DataFrame({"squared_norm": np.square(flat).mean(1)})
    if error is not None:
        table["error_estimate"] = error.numpy()
    for name, detector in detectors.items():
        table[name] = detector.score_fitted(flat) if fitted else detector.score_latent(flat)
    table["outlier"] = -table["mahalanobis"] < detectors["mahalanobis"].offset_
    return table


def _write_rows(path: Path, tables: Iterator[pd.DataFrame]) -> None:
    """Write tables one below the other; the file is whole or not there."""

    def write(partial: Path) -> None:
        # a file name may hold bytes that are no text
        with partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            for k, table in enumerate(tables):
                table.to_csv(file, header=k == 0, index=False, float_format="%.6g")

    write_whole(path, write)


# ----------------------------------------------------------------------------- numbers, part by part


def _try(part: str, work: Callable[[], Any], left: list[LeftOut]) -> Any:
    """Do a part, or note why it cannot be done."""
    try:
        return work()
    except ValueError as error:
        left.append(LeftOut(part, str(error)))
        return None


def _image_measures(
    table: pd.DataFrame, own: pd.DataFrame, rng: np.random.Generator
) -> list[Measure]:
    rows = []
    for name, meaning in {
        "latents.squared_norm": "Median squared norm of a latent over its number of coordinates; 1 for "
        "noise, and off 1 for most images, in-domain ones too.",
        "latents.error_estimate": "Median bound on the error of a latent, by the solver; statistics of "
        "latents need it below about 0.05.",
    }.items():
        for ending, values in (("", table), (".reference", own)):
            column = name.partition(".")[2]
            if column in values and len(values) > 1:
                numbers = values[column].to_numpy()
                if len(numbers) > MEDIANS:
                    numbers = rng.choice(numbers, MEDIANS, replace=False)
                found = median_interval(numbers, rng=rng)
                rows.append(Measure.of(name + ending, found, len(numbers), meaning))
    share = ratio_of_shares(table["outlier"].to_numpy())
    meaning = (
        "Share of the images that the Mahalanobis score calls outliers; about 0.05 for new images of the "
        "reference's kind."
    )
    return [*rows, Measure.of("ood.outliers", share, len(table), meaning)]


def _reconstruction(
    returned: np.ndarray, model: FrozenModel, known: _Reference, batch_size: int, seed: int
) -> list[Measure]:
    own = known.images[:OWN_ROUND_TRIPS]
    back = psnr(roundtrip(model, own, batch_size=batch_size).images.float(), own).numpy()
    rows, rng = [], np.random.default_rng([seed, 2])
    for name, values, who in (("", returned, "the images"), (".reference", back, "the reference")):
        found = median_interval(values, rng=rng)
        meaning = (
            f"Median PSNR in dB of {who} after the way to the latent and back, 24 network calls each "
            "way; more calls return more, whatever the model knows."
        )
        rows.append(Measure.of(f"reconstruction.psnr{name}", found, len(values), meaning))
    return rows


def _gaussianity(
    latent: torch.Tensor, out: Path, rng: np.random.Generator, seed: int
) -> list[Measure]:
    rows = next((size for size in SIMULATED if size <= len(latent)), len(latent))
    noise = rng.standard_normal(latent.shape, dtype=np.float32)
    tables, made = [], []
    for name, values, who in (
        ("", latent, "of the images' latents"),
        (".noise", noise, "of noise, a control"),
    ):
        test_rng = np.random.default_rng([seed, 3])
        found = gaussianity.report(values, rng=test_rng, rows=rows, bootstrap=BOOTSTRAP)
        tables.append(found.to_frame().assign(sample=name.lstrip(".") or "images"))
        for family, law in FAMILIES.items():
            meaning = (
                f"p-value {who} against {law}, all tests together by Holm's rule; below 0.05 the law is "
                "rejected, above it nothing is shown."
            )
            value = found.combined(family).pvalue
            made.append(Measure.of(f"gaussianity.{family}{name}", value, len(values), meaning))
        for test, said in (
            ("horizontal_neighbours", "Mean correlation of numbers side by side"),
            ("patch_correlation", "Mean absolute correlation within patches"),
        ):
            value, meaning = found[f"F2.{test}"].effect, f"{said} {who}; compare with noise."
            made.append(Measure.of(f"gaussianity.{test}{name}", value, len(values), meaning))
    _write_rows(out / "gaussianity.csv", iter([pd.concat(tables)]))
    return made


def _separability(
    own: torch.Tensor, latent: torch.Tensor, out: Path, rng: np.random.Generator
) -> list[Measure]:
    options = {"permutations": PERMUTATIONS, "resamples": RESAMPLES, "rng": rng}
    found = separability.report(_flat(own), latent.flatten(1).numpy(), **options)
    order = rng.permutation(len(own))
    halves = (_flat(own[order[k::2]]) for k in (0, 1))
    control = separability.report(*halves, **options)
    tables, made = [], []
    for name, report in (("", found), (".control", control)):
        tables.append(report.to_frame().assign(sample=name.lstrip(".") or "images"))
        who = "the images" if not name else "one half of the reference, a control,"
        for x in report.results:
            meaning = (
                f"Chance that {who} score higher than the {'other half' if name else 'reference'} by "
                f"{SCORES[x.name]}; 0.5 where nothing tells them apart, 1 or 0 where all does."
            )
            span = Interval(x.auroc, x.low, x.high)
            made.append(Measure.of(f"separability.{x.name}{name}", span, x.n + x.m, meaning))
    _write_rows(out / "separability.csv", iter([pd.concat(tables)]))
    return made


def _geometry(latent: np.ndarray, name: str, who: str) -> list[Measure]:
    found = geometry.measure(latent)
    told = {
        "norm": (found.norm, f"Mean norm of {who}; {latent.shape[1] ** 0.5:.1f} for noise."),
        "distance": (
            found.distance,
            f"Mean distance of two {who}; {(2 * latent.shape[1]) ** 0.5:.1f} for noise.",
        ),
        "origin_angle": (
            found.origin_cos.degrees(),
            f"Angle in degrees of two {who} at the origin; 90 for noise.",
        ),
        "vertex_angle": (
            found.vertex_cos.degrees(),
            f"Angle in degrees of two {who} at a third; near 60 for any law, so it tells little.",
        ),
        "effective_rank": (
            found.effective_rank,
            f"Number of directions that share the variance of {who}; {latent.shape[1]} for noise.",
        ),
    }
    return [
        Measure.of(f"geometry.{key}{name}", Interval(x.value, x.low, x.high), x.n, meaning)
        for key, (x, meaning) in told.items()
    ]


# ------------------------------------------------------------------------------------- new images


def _drawn_from(opened: ImageRows, rows: Sequence[int], rng: np.random.Generator) -> torch.Tensor:
    if not len(rows):
        raise ValueError("no image is left beside copies of the reference; give others")
    chosen = np.sort(rng.choice(rows, min(SAMPLED, len(rows)), replace=False))
    return opened.take(chosen)


def _samples(
    model: FrozenModel, images: torch.Tensor, out: Path, seed: int, batch_size: int
) -> tuple[sampling.Samples, sampling.ReferenceSet, torch.Tensor]:
    """Draw new images, and the twin of the same prior in pixels; write the former."""
    recipe, kept = sampling.Recipe(), torch.ones(len(images), dtype=torch.bool)
    kept[sampling.held_out(len(kept))] = False
    heldout = images[~kept]
    fitted = images[kept]

    def at(sigma: float, images: torch.Tensor) -> sampling.ReferenceSet:
        way = {"t_end": sampling.level_of(model, sigma), "points": NEAR_POINTS}
        made = invert(model, images, **way, batch_size=batch_size)
        place = {"latent": made.latent, "timesteps": made.timesteps, "sigma": sigma}
        return sampling.ReferenceSet("images", images=images, heldout=heldout, **place)

    rows = np.linspace(0, len(fitted) - 1, min(len(fitted), sampling.ASKED)).round()
    asked = fitted[rows.astype(int)]
    levels = [at(sigma, asked) for sigma in sampling.levels_within(model)]
    known = at(sampling.best_level(model, levels), fitted)
    rng = np.random.default_rng([seed, 4])
    drawn = sampling.sample(model, known, recipe, n=DRAWN, rng=rng, batch_size=batch_size)
    twin = sampling.twin(known, recipe, n=DRAWN, rng=np.random.default_rng([seed, 4]))
    sampling.write(out / "samples", drawn, known, {"seed": seed})
    return drawn, known, twin


def _sample_measures(
    images: torch.Tensor, known: sampling.ReferenceSet, name: str, who: str
) -> list[Measure]:
    found = sampling.quality(images, known)
    told = {
        "kid": (found.kid, f"KID of {who} to held-out images; lower is nearer."),
        "kid.real": (
            found.kid_floor,
            "KID of real images to the held-out ones: what can be reached.",
        ),
        "novelty": (
            found.novelty,
            f"Distance of {who} to the nearest image they were made from, over that of held-out images; "
            "0 for copies, 1 for images as new as real ones.",
        ),
        "diversity": (
            found.diversity,
            f"Mean distance of two of {who} over that of two held-out images; 1 where they are as varied.",
        ),
        "c2st": (
            found.c2st,
            f"Accuracy with which {who} and held-out images are told apart; 0.5 is chance.",
        ),
    }
    return [
        Measure.of(f"samples.{key}{name}", x, found.n, meaning)
        for key, (x, meaning) in told.items()
        if not (name and key == "kid.real")
    ]


def _nearest(images: torch.Tensor, fitted: torch.Tensor) -> torch.Tensor:
    """For each image the one nearest to it in pixels."""
    apart = pairwise_distances(_flat(images), _flat(fitted))
    return fitted[torch.from_numpy(apart.argmin(1))]


# -------------------------------------------------------------------------------------- all of it


@dataclass
class _Run:
    """An audit in the making."""

    model: FrozenModel
    folder: Path
    out: Path
    seed: int
    batch_size: int
    known: _Reference
    names: list[str]
    left: list[LeftOut] = field(default_factory=list)
    summary: list[Measure] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    def rng(self, part: int) -> np.random.Generator:
        """Source of a part: it does not depend on which other parts are done."""
        return np.random.default_rng([self.seed, part])

    def add(self, part: str, work: Callable[[], list[Measure]]) -> None:
        """Add the numbers of a part."""
        self.summary += _try(part, work, self.left) or []

    def score(self, parts: Iterator[LatentSet]) -> _Kept:
        """Score all images in one pass, and write `images.csv` on the way."""
        n, rng = len(self.names), self.rng(5)
        joint, tripped = (
            np.sort(rng.choice(n, min(n, most), replace=False)) for most in (JOINT, ROUND_TRIPS)
        )
        own = _flat(self.known.latent)
        detectors = {
            x: _LatentDetector(self.model, statistic=x).fit_latent(own) for x in STATISTICS
        }
        kept = _Kept(joint, tripped, {_digest(x) for x in self.known.images})
        own_table = _score_table(self.known.latent, self.known.error, detectors, fitted=True)
        _write_rows(self.out / "reference.csv", iter([own_table]))
        _write_rows(self.out / "images.csv", self._tables(parts, detectors, kept))
        return kept

    def _tables(
        self, parts: Iterator[LatentSet], detectors: dict[str, _LatentDetector], kept: _Kept
    ) -> Iterator[pd.DataFrame]:
        for part in parts:
            kept.take(part)
            table = _score_table(part.latent, part.error_estimate, detectors)
            last = part.first_row + len(table)
            table.insert(0, "file", self.names[part.first_row : last])
            table.insert(1, "psnr", kept.reconstruct(self.model, part, self.batch_size))
            yield table

    def describe(self, kept: _Kept) -> None:
        """Measure images one by one, and latents taken together."""
        table, own_table = (pd.read_csv(self.out / f"{x}.csv") for x in ("images", "reference"))
        self.summary += _image_measures(table, own_table, self.rng(6))
        self._doubt(table)
        returned = table["psnr"].dropna().to_numpy()
        shared = (self.model, self.known, self.batch_size, self.seed)
        self.add("reconstruction", lambda: _reconstruction(returned, *shared))
        latent = torch.cat(kept.latents)
        own, few = self.known.latent, self.rng(10).permutation(len(latent))[:PAIRS]
        paired = latent[np.sort(few)]
        self.add("gaussianity", lambda: _gaussianity(latent, self.out, self.rng(7), self.seed))
        self.add("separability", lambda: _separability(own, paired, self.out, self.rng(8)))
        who = "latents of the images"
        self.add("geometry", lambda: _geometry(paired.flatten(1).numpy(), "", who))
        self.add(
            "geometry of the reference",
            lambda: _geometry(_flat(own), ".reference", "latents of the reference"),
        )
        self.pictures["image"] = to_bytes(torch.cat(kept.images))
        self.pictures["reconstruction"] = to_bytes(torch.cat(kept.returned))
        self.pictures["reference"] = to_bytes(self.known.images[:SHOWN])
        if kept.copies:
            reason = f"{kept.copies} copies of other images, which statistics of independent images refuse"
            self.left.append(LeftOut("copies, in what is measured of images together", reason))

    def _doubt(self, table: pd.DataFrame) -> None:
        """Say so where latents are further off than statistics of latents take."""
        error = table["error_estimate"].median() if "error_estimate" in table else np.nan
        if not error <= LARGEST_ERROR:
            reason = (
                f"the median bound on their error is {error:.2g}, above {LARGEST_ERROR:g}: what is told of "
                "latents is rough"
            )
            self.left.append(LeftOut("a proof that the latents converged", reason))

    def draw(self, rows: Sequence[int]) -> None:
        """Draw new images and judge them, as far as the number of images allows."""
        made = _try("samples", lambda: self._samples(rows), self.left)
        if made is None:
            return
        drawn, known, twin = made
        self.pictures["sample"] = to_bytes(drawn.images[:SHOWN])
        self.pictures["nearest"] = to_bytes(_nearest(drawn.images[:SHOWN], known.images))
        self.pictures["twin"] = to_bytes(twin[:SHOWN])
        if len(self.names) >= JUDGED:
            who = (
                ("", drawn.images, "the draws"),
                (".twin", twin, "draws of the same prior in pixels"),
            )
            for name, pixels, said in who:
                self.add(
                    f"quality of the samples{name}",
                    lambda p=pixels, a=name, s=said: _sample_measures(p, known, a, s),
                )

    def _samples(
        self, rows: Sequence[int]
    ) -> tuple[sampling.Samples, sampling.ReferenceSet, torch.Tensor]:
        opened = open_images(str(self.folder), like=self.model)
        images = _drawn_from(opened, rows, self.rng(9))
        return _samples(self.model, images, self.out, self.seed, self.batch_size)

    def write(self, arguments: dict[str, Any]) -> Audit:
        """Write what was found."""
        table = pd.DataFrame([asdict(x) for x in self.summary])
        _write_rows(self.out / "summary.csv", iter([table]))
        pictures = self.pictures
        write_whole(self.out / "pictures.npz", lambda p: np.savez_compressed(p, **pictures))
        record = {
            **arguments,
            "n": len(self.names),
            "reference": self.known.said,
            "left_out": [asdict(x) for x in self.left],
            "calls": {"scores": POINTS - 1, "round_trip": 48, "samples": NEAR_POINTS - 1},
        }
        write_json(self.out / RECORD, record, indent=2)
        return Audit(
            self.out, len(self.names), self.known.said, tuple(self.summary), tuple(self.left)
        )


def measure(
    model: str,
    images: str | Path,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    seed: int = 0,
    revision: str | None = None,
    device: str = "cpu",
    backend: str = "auto",
    batch_size: int = 64,
    shard: int = SHARD,
    progress: bool = False,
) -> Audit:
    """Measure a folder of images under a frozen model, and write tables.

    Parameters
    ----------
    model : str
        As in `load_model`: a zoo name, a diffusers folder (such as ``ood convert`` makes) or a hub id.
    images : str or Path
        Folder of image files; any number.
    out : str or Path
        Folder of the results; those of an earlier audit are replaced.
    reference : str or Path, optional
        Folder with 12 images or more of the model's own domain that it was not trained on. By default
        the held-out images of a zoo model's domain; of another model images that it makes of noise.
    seed : int, default 0
        Source of every choice.
    revision, device, backend : str
        As in `load_model`.
    batch_size : int, default 64
        Images in a network call; it does not change the result beyond rounding.
    shard : int, default 256
        Images that memory holds; it does not change the result beyond rounding.
    progress : bool, default False
        Show a bar of the images.

    Returns
    -------
    Audit
        The numbers, and what was left out.

    Raises
    ------
    ValueError
        If a folder is missing, empty or holds other files, `out` lies among the images, the reference is
        too small, or the model is unknown.

    Notes
    -----
    Every image is inverted with 14 network calls; the latents stay in ``runs/latents``, so a second run is
    short and one that was killed goes on. At most 2,000 images, chosen by `seed`, enter Gaussianity, 1,000 of
    them separability and geometry, 280 the draws, and any 64 a round trip of 48 calls. `psnr` of the other
    images is empty in ``images.csv``.

    Examples
    --------
    >>> measure("ddpm-fashion-32", "no-such-folder", "out")
    Traceback (most recent call last):
    ValueError: images 'no-such-folder' is no folder; give a folder that holds nothing but image files
    """
    folder = _folder(images, "images")
    beside = None if reference is None else _folder(reference, "reference")
    made_in = _out_folder(out, [folder, *([] if beside is None else [beside])])
    names = [path.relative_to(folder).as_posix() for path in folder_files(folder)]
    left = _known_beforehand(len(names))
    name = _model_name(model)
    loaded = load_model(name, device=device, revision=revision, backend=backend)
    frozen = _called_from_cpu(loaded, device)
    known = _reference(frozen, name, beside, seed, batch_size)
    spec = LatentSpec(frozen.name, str(folder), points=POINTS, solver=SOLVER, revision=revision)
    parts = shards(spec, model=frozen, shard=shard, batch_size=batch_size, progress=progress)
    settings = {"model": frozen.name, "images": folder.name, "seed": seed}
    run = _Run(frozen, folder, made_in, seed, batch_size, known, names, left)
    _begin(made_in, settings)
    kept = run.score(parts)
    run.describe(kept)
    run.draw(kept.rows)
    return run.write(settings)


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Mark the folder as that of an audit, and take away what an earlier one left there."""
    if (out / RECORD).is_file():
        for name in ("pictures.npz", "gaussianity.csv", "separability.csv"):
            (out / name).unlink(missing_ok=True)
        rmtree(out / "samples", ignore_errors=True)
    write_json(out / RECORD, settings, indent=2)


def _known_beforehand(n: int) -> list[LeftOut]:
    """Say what so few images do not allow, before anything is computed."""
    if n >= JUDGED:
        return []
    reason = f"there are {n} images; {JUDGED} or more are needed, half of them to judge by"
    return [LeftOut("quality and novelty of the samples", reason)]


def render(out: str | Path, *, progress: bool = False) -> Path:
    """Make the page of an audit from its tables: a notebook, and HTML beside it.

    Parameters
    ----------
    out : str or Path
        Folder that `measure` filled.
    progress : bool, default False
        Show a bar of the cells.

    Returns
    -------
    Path
        ``_build/html/report.html``; ``report.ipynb`` can be run again in its folder.

    Raises
    ------
    ValueError
        If there are no tables, or the packages that render are missing.
    ChapterFailed
        If the notebook fails.

    Examples
    --------
    >>> render("no-such-folder")
    Traceback (most recent call last):
    ValueError: no-such-folder holds no finished audit; measure comes first
    """
    reports.check_renderer()
    folder = Path(out)
    if not (folder / "pictures.npz").is_file():
        raise ValueError(f"{folder} holds no finished audit; measure comes first")
    return reports.render("audit", folder, progress=progress)


def audit(model: str, images: str | Path, out: str | Path, **options: Any) -> tuple[Audit, Path]:
    """Measure a folder of images under a frozen model, and make a page of it.

    Parameters
    ----------
    model, images, out
        As in `measure`.
    **options
        As in `measure`.

    Returns
    -------
    found : Audit
        What was measured.
    page : Path
        The page.

    Raises
    ------
    ValueError
        As in `measure` and `render`.

    Examples
    --------
    >>> audit("ddpm-fashion-32", "no-such-folder", "out")
    Traceback (most recent call last):
    ValueError: images 'no-such-folder' is no folder; give a folder that holds nothing but image files
    """
    reports.check_renderer()
    found = measure(model, images, out, **options)
    return found, render(found.out, progress=bool(options.get("progress")))
