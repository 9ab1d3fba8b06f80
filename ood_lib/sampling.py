"""New images of a domain that a frozen model never saw, from a few references.

The references are inverted to one noise level, low where the network spoils mixed latents and higher where
it mends them; a prior is fitted to their latents, and its draws are decoded. `twin` does the same to the
pixels, without a model: a sampler is worth its network calls only where it beats its twin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from ood_lib.classifier import SIDE, load_classifier
from ood_lib.domains import domain_names, load_images, open_images, to_bytes
from ood_lib.features import imagenet
from ood_lib.files import write_json
from ood_lib.inversion import generate
from ood_lib.latents import LatentSpec, get
from ood_lib.metrics import COPY, SampleQuality, kid, sample_quality
from ood_lib.models import FrozenModel
from ood_lib.plotting import image_rows
from ood_lib.priors import make_prior

__all__ = [
    "Recipe",
    "ReferenceSet",
    "Samples",
    "best_level",
    "check_judgeable",
    "choose_level",
    "held_out",
    "level_of",
    "levels_within",
    "quality",
    "reference_count",
    "references",
    "sample",
    "sentence",
    "spec_of",
    "twin",
    "write",
]

HELD_OUT = 5  # of a folder without splits one image in five is kept for judging, and
JUDGES, JUDGED = 28, 14  # so many where there are twice as many; drawn images that can be judged
WINDOWS = (0.5, 0.65, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.2, 4.0, 5.0, 6.5, 8.0, 10.0, 13.0, 16.0, 20.0)
NEW_ENOUGH = 0.9  # of the references' own distances; what the search asked of a sampler
TRIED = 64  # mosaics a window, or a level
LEVELS = (0.02, 0.06, 0.2)  # noise over signal, from which one is chosen
ASKED = 64  # references that it is chosen on


@dataclass(frozen=True)
class Recipe:
    """How to sample an unseen domain; the default comes from the search of `benchmarks/samplers.py`.

    Parameters
    ----------
    prior : str, default "mosaic"
        A key of `ood_lib.priors.PRIORS`.
    options : mapping
        Parameters of the prior. A mosaic without a `window` gets that of the references.

    Examples
    --------
    >>> Recipe("isotropic").options
    {}
    """

    prior: str = "mosaic"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceSet:
    """Latents of a few images at one level, and the images to judge by.

    Parameters
    ----------
    domain : str
        Where the images come from.
    latent : Tensor of shape (n, C, H, W)
        Latents of `images`.
    timesteps : ndarray of shape (points,)
        The grid that led to them.
    images : Tensor of shape (n, C, H, W)
        Images that a prior is fitted to, in [-1, 1].
    heldout : Tensor of shape (m, C, H, W)
        Images of the domain that no prior sees.
    solver : str, optional
        Solver of the way to the latents, and of the way back; that of `invert` by default.
    sigma : float, optional
        Noise over signal of the latents, sqrt(1 / alpha_bar - 1), where it is to be told.

    Examples
    --------
    >>> pixels = torch.zeros(2, 1, 4, 4)
    >>> len(ReferenceSet("digits", pixels, np.array([0.0, 9.0]), pixels, pixels).images)
    2
    """

    domain: str
    latent: torch.Tensor
    timesteps: np.ndarray
    images: torch.Tensor
    heldout: torch.Tensor
    solver: str | None = None
    sigma: float | None = None

    @cached_property
    def window(self) -> float:
        """Widest window whose mosaics of the images are as new as the images are to each other.

        A window is wide enough for pictures that vary smoothly and too wide for others. So mosaics of the
        pixels are made with a few windows, without a model or held-out images: their median distance to
        the nearest reference, in the features of `imagenet`, must be 0.9 or more of that from reference
        to nearest other reference.

        Returns
        -------
        float
            One of `WINDOWS`, as a share of the longer side; the narrowest if none is new enough.

        Raises
        ------
        ValueError
            If there is one reference, or half of them are copies of others.

        Examples
        --------
        >>> images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        >>> known = ReferenceSet("noise", images, np.array([0.0, 99.0]), images, images)
        >>> known.window in WINDOWS
        True
        """
        features = imagenet(self.images)
        if len(features) < 2:
            raise ValueError("a mosaic needs two references or more, not 1")
        near = NearestNeighbors(n_neighbors=1).fit(features)
        usual = np.median(near.kneighbors()[0])
        if usual <= COPY * np.abs(features).max():
            raise ValueError(
                f"half of the {len(features)} references or more are copies of others; remove them"
            )

        def too_wide(window: float) -> bool:
            recipe, rng = Recipe(options={"window": window}), np.random.default_rng(0)
            made = imagenet(twin(self, recipe, n=TRIED, rng=rng))
            return bool(np.median(near.kneighbors(made)[0]) < NEW_ENOUGH * usual)

        return WINDOWS[max(bisect_left(WINDOWS, True, key=too_wide) - 1, 0)]


@dataclass(frozen=True)
class Samples:
    """Generated images and their latents.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        float32, clipped to [-1, 1].
    latent : Tensor of shape (n, C, H, W)
        What was decoded.
    nfe : int
        Network calls an image; the inversion of the references is not counted.
    recipe : Recipe
        How they were made.

    Examples
    --------
    >>> Samples(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 24, Recipe()).nfe
    24
    """

    images: torch.Tensor
    latent: torch.Tensor
    nfe: int
    recipe: Recipe


def level_of(model: FrozenModel, sigma: float) -> float | None:
    """Timestep of a noise level.

    Parameters
    ----------
    model : FrozenModel
        Gives the schedule.
    sigma : float
        Noise over signal; infinity is the last level.

    Returns
    -------
    float or None
        The timestep, a multiple of 1; None for the last.

    Raises
    ------
    ValueError
        If the level is below the first of the schedule or above the last.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> level_of(load_model("ddpm-fashion-32"), 0.34)
    99.0
    """
    if sigma == np.inf:
        return None
    schedule = model.schedule
    first, last = (float(schedule.sigma(t)) for t in (1.0, schedule.t_end))
    if not first <= sigma <= last:
        raise ValueError(
            f"sigma is {sigma:g}; levels of {model.name} lie from {first:.3g} to {last:.3g}"
        )
    return float(np.round(schedule.t_of_log_sigma(np.log(sigma))))


def references(
    model: FrozenModel,
    domain: str,
    *,
    sigma: float | None = None,
    n: int | None = None,
    points: int | None = None,
    solver: str | None = None,
    progress: bool = False,
) -> ReferenceSet:
    """Invert the references of a domain to a level; latents that are on disk are read.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    domain : str
        A shipped domain, whose splits "fit" and "heldout" are used; or anything that `load_images` takes,
        of which one image in five is held out, or 28, at most half, if that is more.
    sigma : float, optional
        Noise level, noise over signal, infinity for the last; that of `choose_level` by default.
    n : int, optional
        First `n` references; all by default.
    points : int, optional
        Points of the grid to the level, one more than the network calls; those of `invert` by default.
    solver : str, optional
        Of the way there and back; that of `invert` by default.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    ReferenceSet
        Latents, images, held-out images.

    Raises
    ------
    ValueError
        If the domain or the level is unknown, or there are fewer than `n` references.

    Examples
    --------
    >>> references(None, "no-such-domain")
    Traceback (most recent call last):
    ValueError: unknown domain 'no-such-domain'; known are ...
    """
    shipped, count = domain in domain_names(), reference_count(model, domain)
    if n is not None and not 1 <= n <= count:
        raise ValueError(f"n is {n}; {domain} has {count} references beside what is held out")
    way = {"points": points, "solver": solver, "progress": progress}
    if sigma is None:
        sigma = choose_level(model, domain, n=n, **way)
    spec = spec_of(model, domain, sigma=sigma, n=n, points=points, solver=solver)
    found = get(spec, model=model, progress=progress)
    opened = open_images(domain, like=model)
    beside = np.array([], int) if shipped else held_out(len(opened))
    if shipped:
        heldout = load_images(domain, split="heldout", like=model)
    else:
        heldout = opened.take(beside) if len(beside) else found.images[:0]
    chosen = np.setdiff1d(np.arange(len(found.images)), beside)[:n]
    latent, images = found.latent[chosen].double(), found.images[chosen]
    return ReferenceSet(domain, latent, found.timesteps, images, heldout, solver, sigma)


def choose_level(
    model: FrozenModel,
    domain: str,
    *,
    n: int | None = None,
    points: int | None = None,
    solver: str | None = None,
    progress: bool = False,
) -> float:
    """Choose the noise level at which a sampler of a domain works best, from its references alone.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    domain, n, points, solver, progress
        As of `references`; 64 references are asked at most.

    Returns
    -------
    float
        Noise over signal, one of `LEVELS`: that of `best_level`.

    Raises
    ------
    ValueError
        As in `references`, or if the schedule has none of the levels.

    Examples
    --------
    >>> choose_level(None, "no-such-domain")
    Traceback (most recent call last):
    ValueError: unknown domain 'no-such-domain'; known are ...
    """
    n = min(n or ASKED, ASKED, reference_count(model, domain))
    way = {"n": n, "points": points, "solver": solver, "progress": progress}
    return best_level(
        model, [references(model, domain, sigma=s, **way) for s in levels_within(model)]
    )


def levels_within(model: FrozenModel) -> list[float]:
    """List the levels that a sampler may work at.

    Parameters
    ----------
    model : FrozenModel
        Gives the schedule.

    Returns
    -------
    list of float
        Those of `LEVELS` that the schedule has.

    Raises
    ------
    ValueError
        If there are none.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> levels_within(load_model("ddpm-fashion-32"))
    [0.02, 0.06, 0.2]
    """
    first, last = (float(model.schedule.sigma(t)) for t in (1.0, model.schedule.t_end))
    within = [sigma for sigma in LEVELS if first <= sigma <= last]
    if not within:
        raise ValueError(
            f"levels of {model.name} lie from {first:.3g} to {last:.3g}, and none of {LEVELS} there; "
            "give sigma"
        )
    return within


def best_level(model: FrozenModel, sets: Sequence[ReferenceSet]) -> float:
    """Of one set of references at several levels, find the level whose draws are nearest to the set.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    sets : sequence of ReferenceSet
        The same images, with their latents and `sigma`.

    Returns
    -------
    float
        The `sigma` of one of them.

    Notes
    -----
    At each level the same 64 mosaics of latents are decoded, and their kernel distance (KID) to the
    references is taken in the features of `imagenet`. As parts of the same images stand in the same places
    at every level, a nearer copy is not what makes one win.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> images = torch.rand(6, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    >>> grid = np.array([0.0, 99.0])
    >>> known = ReferenceSet("noise", images, grid, images, images, sigma=0.34)
    >>> best_level(model, [known])
    0.34
    """
    real, recipe = imagenet(sets[0].images), Recipe(options={"window": sets[0].window})

    def distance(known: ReferenceSet) -> float:
        made = sample(model, known, recipe, n=TRIED, rng=np.random.default_rng(0))
        return kid(imagenet(made.images), real)

    return min(sets, key=distance).sigma


def spec_of(
    model: FrozenModel,
    domain: str,
    *,
    sigma: float,
    n: int | None = None,
    points: int | None = None,
    solver: str | None = None,
) -> LatentSpec:
    """Name the latents that `references` reads, so that they can be made before.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    domain, sigma, n, points, solver
        As of `references`.

    Returns
    -------
    LatentSpec
        Of a folder the first images are inverted, until `n` that are not held out are among them.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> spec_of(load_model("ddpm-fashion-32"), "digits", sigma=0.34, n=8).t_end
    99.0
    """
    if n is not None and domain not in domain_names():
        count = len(open_images(domain, like=model))
        n = int(np.setdiff1d(np.arange(count), held_out(count))[n - 1]) + 1
    level = level_of(model, sigma)
    return LatentSpec(model.name, domain, n=n, t_end=level, points=points, solver=solver)


def held_out(n: int) -> np.ndarray:
    """Places of the images of a folder that are held out, evenly spaced.

    Parameters
    ----------
    n : int
        Images in the folder.

    Returns
    -------
    ndarray of int
        One in five, or 28 if that is more, and at most half.

    Examples
    --------
    >>> held_out(6)
    array([1, 3, 5])
    """
    count = max(n // HELD_OUT, min(JUDGES, n // 2))
    return (np.arange(count) + 1) * n // max(count, 1) - 1


def reference_count(model: FrozenModel, domain: str) -> int:
    """Count the images of a domain that a prior can be fitted to.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    domain : str
        As of `references`.

    Returns
    -------
    int
        Of a folder, those that are not held out.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> reference_count(load_model("ddpm-fashion-32"), "digits")
    372
    """
    count = len(open_images(domain, like=model))
    return count if domain in domain_names() else count - len(held_out(count))


def check_judgeable(model: FrozenModel, domain: str, *, n: int) -> None:
    """Refuse, before anything is inverted, what `quality` could not judge in the end.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    domain : str
        As of `references`.
    n : int
        Images to draw.

    Raises
    ------
    ValueError
        If fewer than 14 images are to be drawn, or a folder has fewer than 56.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> check_judgeable(load_model("ddpm-fashion-32"), "digits", n=4)
    Traceback (most recent call last):
    ValueError: n is 4; draw 14 images or more, fewer cannot be judged
    """
    if n < JUDGED:
        raise ValueError(f"n is {n}; draw {JUDGED} images or more, fewer cannot be judged")
    count = len(open_images(domain, like=model))
    if domain not in domain_names() and count < 2 * JUDGES:
        raise ValueError(
            f"{domain} has {count} images; {2 * JUDGES} or more are needed, {JUDGES} of them to judge by"
        )


def sample(
    model: FrozenModel,
    known: ReferenceSet,
    recipe: Recipe,
    *,
    n: int,
    rng: np.random.Generator,
    batch_size: int = 64,
    progress: bool = False,
) -> Samples:
    """Draw new images of the domain of the references.

    Parameters
    ----------
    model : FrozenModel
        The frozen model.
    known : ReferenceSet
        From `references`; what is drawn lies at their level.
    recipe : Recipe
        The prior.
    n : int
        Images.
    rng : numpy.random.Generator
        Source of the draws.
    batch_size : int, default 64
        Images a network call.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    Samples
        Images, latents, network calls.

    Raises
    ------
    ValueError
        If the references are too few for the prior.

    Examples
    --------
    >>> from ood_lib.models import load_model, zero_model
    >>> model = zero_model(load_model("ddpm-fashion-32"))
    >>> latent = torch.randn(8, 1, 32, 32, dtype=torch.float64)
    >>> grid = np.array([0.0, 99.0])
    >>> known = ReferenceSet("noise", latent, grid, latent.float(), latent.float())
    >>> drawn = sample(model, known, Recipe("isotropic"), n=2, rng=np.random.default_rng(0))
    >>> drawn.images.shape
    torch.Size([2, 1, 32, 32])
    """
    recipe = _with_window(recipe, known)
    latent = _drawn(known.latent, known, recipe, n, rng)
    way = {"timesteps": known.timesteps, "solver": known.solver}
    made = generate(model, latent, **way, batch_size=batch_size, progress=progress)
    return Samples(made.images.float().clamp(-1, 1), latent, made.nfe, recipe)


def twin(known: ReferenceSet, recipe: Recipe, *, n: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw from the same prior fitted to the pixels: what a sampler has to beat.

    Parameters
    ----------
    known : ReferenceSet
        The references.
    recipe : Recipe
        Its prior.
    n : int
        Images.
    rng : numpy.random.Generator
        Source of the draws.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        float32, clipped to [-1, 1].

    Examples
    --------
    >>> pixels = torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    >>> known = ReferenceSet("noise", pixels, np.array([0.0, 99.0]), pixels, pixels)
    >>> twin(known, Recipe("isotropic"), n=2, rng=np.random.default_rng(0)).shape
    torch.Size([2, 1, 4, 4])
    """
    return _drawn(known.images, known, _with_window(recipe, known), n, rng).float().clamp(-1, 1)


def _with_window(recipe: Recipe, known: ReferenceSet) -> Recipe:
    """Add the window of the references to a recipe for mosaics that leaves it open."""
    if recipe.prior != "mosaic" or "window" in recipe.options:
        return recipe
    return replace(recipe, options={**recipe.options, "window": known.window})


def _drawn(
    values: torch.Tensor, known: ReferenceSet, recipe: Recipe, n: int, rng: np.random.Generator
) -> torch.Tensor:
    """Draw from the prior of a recipe, fitted to the latents or the pixels (N, C, H, W) of references."""
    latents, pictures = (x.flatten(1).numpy() for x in (values, known.images))
    prior = make_prior(recipe.prior, **recipe.options).fit(latents, pictures)
    return torch.from_numpy(prior.sample(n, rng)).reshape(n, *values.shape[1:])


def quality(images: torch.Tensor, known: ReferenceSet) -> SampleQuality:
    """Judge images against what was held out, in the features of an ImageNet network.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        Drawn images.
    known : ReferenceSet
        Their references.

    Returns
    -------
    SampleQuality
        As of `sample_quality`; target shares only for a shipped domain of 32 x 32.

    Raises
    ------
    ValueError
        If there are too few images on a side.

    Examples
    --------
    >>> pixels = torch.zeros(4, 1, 32, 32)
    >>> quality(pixels, ReferenceSet("digits", pixels, np.array([0.0, 99.0]), pixels, pixels))
    Traceback (most recent call last):
    ValueError: generated has shape (4, 1, 32, 32); it needs 14 images or more, ...
    """
    told = known.domain in domain_names() and tuple(images.shape[2:]) == (SIDE, SIDE)
    classes = {"classifier": load_classifier(), "domain": known.domain} if told else {}
    sets = {"fit": known.images, "heldout": known.heldout}
    return sample_quality(images, features=imagenet, **sets, **classes)


def sentence(found: SampleQuality) -> str:
    """Say how good and how new images are.

    Parameters
    ----------
    found : SampleQuality
        From `quality`.

    Returns
    -------
    str
        KID beside that of real images, the nearest-neighbour ratio, and the target share if there is one.

    Examples
    --------
    >>> from types import SimpleNamespace as Box
    >>> number = Box(value=0.5)
    >>> sentence(Box(n=4, kid=number, kid_floor=number, novelty=number, share_ratio=None))
    '4 images, KID 0.5 (real images 0.5), nearest-neighbour ratio 0.5'
    """
    share = found.share_ratio
    told = "" if share is None else f", target share {share.value:.2g} of real images'"
    return (
        f"{found.n} images, KID {found.kid.value:.2g} (real images {found.kid_floor.value:.2g}), "
        f"nearest-neighbour ratio {found.novelty.value:.2g}{told}"
    )


def write(out: Path, made: Samples, known: ReferenceSet, record: Mapping[str, Any]) -> Path:
    """Write images, a grid beside held-out images, and a record.

    Parameters
    ----------
    out : Path
        Folder; files of an earlier run are replaced.
    made : Samples
        What was drawn.
    known : ReferenceSet
        Their references.
    record : mapping
        What `metrics.json` holds beside the recipe.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    OSError
        If a file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> pixels = torch.zeros(2, 1, 8, 8)
    >>> known = ReferenceSet("noise", pixels, np.array([0.0, 99.0]), pixels, pixels)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = write(Path(folder), Samples(pixels, pixels, 1, Recipe()), known, {})
    ...     sorted(x.name for x in made.iterdir())
    ['000.png', '001.png', 'grid.png', 'metrics.json']
    """
    out.mkdir(parents=True, exist_ok=True)
    width = max(3, len(str(len(made.images) - 1)))
    pixels = to_bytes(made.images).transpose(0, 2, 3, 1)
    for k, image in enumerate(pixels):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            out / f"{k:0{width}d}.png"
        )
    lines = max(1, min(4, len(pixels) // 16))
    strips = {"real, held out": known.heldout, "drawn": made.images}
    image_rows(strips, lines=lines).savefig(out / "grid.png")
    recipe = {"prior": made.recipe.prior, "sigma": known.sigma, **made.recipe.options}
    write_json(out / "metrics.json", {"recipe": recipe, "nfe": made.nfe, **record}, indent=2)
    return out
