"""The study: the latents of every model on its own and on five unseen domains, for chapters 09 to 11.

`make study` inverts what is missing and writes the tidy tables of `data/results`, from which the book
draws and judges. A cell is a model, a domain and a way to the latent: converged from the images as they
are, converged from images with invisible noise, the paper's own loop, and the converged latent at the
level where that loop ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LinearRegression

from ood_lib import geometry, separability
from ood_lib.domains import domain_names, load_images, open_images
from ood_lib.files import project_root, write_text
from ood_lib.gaussianity import FAMILIES, report
from ood_lib.gram import draw_weights, gram_matrix
from ood_lib.inversion import generate, invert
from ood_lib.latents import LatentSet, LatentSpec, get
from ood_lib.models import (
    FrozenModel,
    linear_model,
    load_model,
    model_names,
    random_model,
    zero_model,
)
from ood_lib.solvers import NetworkCalls, walk

__all__ = [
    "TABLES",
    "UNSEEN",
    "WAYS",
    "Sample",
    "affine_share",
    "along_t",
    "cell",
    "difference_table",
    "drawn",
    "gaussianity_table",
    "geometry_table",
    "last_level",
    "networks",
    "own_domain",
    "regenerated",
    "samples",
    "separability_table",
    "table_path",
    "unseen_domains",
    "without_network",
    "write_table",
]

UNSEEN = {  # by channels
    1: ("digits", "fashion", "animals", "faces", "textures", "galaxies"),
    3: ("relief", "emoji", "earth", "galaxies", "textures", "faces"),
}
IMAGES = 100
FEW = 32  # for the paper's loop, which takes three times the calls
LEVELS = (100.0, 300.0, 500.0, 700.0)  # along t
LAST = 990.0  # from here on in-domain latents follow N(0, I) to the fourth digit
CONTROLLED = ("ddpm-fashion-32", "ddpm-relief-32")
PERMUTATIONS = 199
KEPT = ("combined", "dispersion", "shapiro", "patch_correlation")  # along t, and in the loop
WAYS = {
    "level0": {"n": IMAGES, "levels": True},
    "noise": {"n": IMAGES, "start": "noise", "levels": True},
    "paper": {"n": FEW, "preset": "paper"},
    "t900": {"n": FEW, "t_end": 900.0},
}


def own_domain(name: str) -> str | None:
    """Domain that a model was trained on, as far as it is known.

    Parameters
    ----------
    name : str
        Model name; those of the zoo are family-domain-size.

    Returns
    -------
    str or None
        Shipped domain; None for a model that is not of the zoo, or whose domain is not shipped.

    Examples
    --------
    >>> own_domain("ddpm-fashion-32-b")
    'fashion'
    """
    domain = name.split("-")[1] if name in model_names() and "-" in name else None
    return domain if domain in domain_names() else None


def affine_share(images: torch.Tensor, latent: torch.Tensor, *, width: int = 7) -> float:
    """Share of the variance of latents that an affine map of the images explains.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W)
        Images.
    latent : Tensor of shape (n, C, H, W)
        Their latents, at any level.
    width : int, default 7
        Side of the window of pixels that a coordinate of a latent is predicted from, odd.

    Returns
    -------
    float
        1 - residual over variance, on the second half of the images, of a map that was fitted to the first;
        at most 1, below 0 for a map worse than the mean.

    Raises
    ------
    ValueError
        If there are fewer than 4 images, or the shapes differ.

    Notes
    -----
    The weights are the same at all places and the intercept is not; a few images cannot tell a map of all
    pixels to all coordinates. So the share is a lower bound of what affine maps explain.

    Examples
    --------
    >>> images = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> round(affine_share(images, 3 * images - 1), 6)
    1.0
    """
    if images.shape != latent.shape or len(images) < 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, latents {tuple(latent.shape)}; "
            "give the same shape and 4 or more"
        )
    half = len(images) // 2
    x, z = (a.double() - a[:half].double().mean(0) for a in (images, latent))
    windows = torch.nn.functional.unfold(x, width, padding=width // 2).mT.numpy()
    targets = z.flatten(2).mT.numpy()
    (x_fit, x_new), (z_fit, z_new) = (
        (a[:half].reshape(-1, a.shape[2]), a[half:].reshape(-1, a.shape[2]))
        for a in (windows, targets)
    )
    left = z_new - LinearRegression(fit_intercept=False).fit(x_fit, z_fit).predict(x_new)
    return float(1 - np.square(left).sum() / np.square(z_new).sum())


def unseen_domains(model: FrozenModel) -> list[str]:
    """Five domains that a model never saw.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.

    Returns
    -------
    list of str
        Names of shipped domains.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> unseen_domains(load_model("ddpm-digits-32"))
    ['fashion', 'animals', 'faces', 'textures', 'galaxies']
    """
    return [d for d in UNSEEN[model.sample_shape[0]] if d != own_domain(model.name)]


def networks(model: FrozenModel, *, seed: int = 0) -> dict[str, FrozenModel]:
    """Build the controls of a trained model; what is due to its weights shows in none of them.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.
    seed : int, default 0
        Source of the weights of the untrained network.

    Returns
    -------
    dict of str to FrozenModel
        The optimal prediction for a Gaussian with the mean and covariance of the training images, an
        untrained network of the same architecture, and the network that answers zero.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> list(networks(load_model("ddpm-fashion-32")))
    ['linear', 'untrained', 'zero']
    """
    images = load_images(own_domain(model.name), split="train", like=model)
    return {
        "linear": linear_model(images, model),
        "untrained": random_model(model, seed=seed),
        "zero": zero_model(model),
    }


def cell(
    model: FrozenModel,
    domain: str,
    way: str = "level0",
    *,
    split: str = "heldout",
    name: str | None = None,
    progress: bool = False,
) -> LatentSet:
    """Latents of a cell, read from disk or inverted and written there.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo, or one of its controls.
    domain : str
        Shipped domain.
    way : str, default "level0"
        A key of `WAYS`.
    split : str, default "heldout"
        Split of the domain.
    name : str, optional
        Name of the model on disk; its own by default.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    LatentSet
        As many latents as the way asks for, or as the split has.

    Raises
    ------
    ValueError
        If the way is unknown.

    Examples
    --------
    >>> cell(None, "digits", "quickly")
    Traceback (most recent call last):
    ValueError: unknown way 'quickly'; known are level0, noise, paper, t900
    """
    if way not in WAYS:
        raise ValueError(f"unknown way {way!r}; known are {', '.join(WAYS)}")
    options = dict(WAYS[way])
    options["n"] = min(options["n"], len(open_images(domain, split=split, like=model)))
    spec = LatentSpec(name or model.name, domain, split=split, **options)
    return get(spec, model=model, progress=progress)


def regenerated(
    model: FrozenModel, n: int = IMAGES, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noise, and the latents of what a model makes of it.

    Parameters
    ----------
    model : FrozenModel
        The model.
    n : int, default 100
        Samples.
    seed : int, default 0
        Source of the noise.

    Returns
    -------
    noise : Tensor of shape (n, C, H, W)
        Draws from N(0, I) at the last level.
    of_states : Tensor of shape (n, C, H, W)
        Latents of the generated states, not clipped: only the solver stands between them and the noise.
    of_images : Tensor of shape (n, C, H, W)
        Latents of the images clipped to [-1, 1], as a file would hold them.

    Examples
    --------
    >>> from ood_lib.models import load_model
    >>> made = regenerated(zero_model(load_model("ddpm-fashion-32")), 2)
    >>> float((made[0] - made[1]).abs().max()) < 1e-6
    True
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, *model.sample_shape, generator=generator, dtype=torch.float64)
    made = generate(model, noise)
    of_states, _, _ = walk(NetworkCalls(model, 64), made.images, made.timesteps, made.solver)
    of_images = invert(model, made.images.clamp(-1, 1)).latent
    return noise, of_states, of_images


# -------------------------------------------------------------------------------- what is compared


@dataclass(frozen=True)
class Sample:
    """Latents, or what stands in for them, with the names of their cell.

    Parameters
    ----------
    network : str
        "trained", a control of `networks`, or "none" where no network was asked.
    domain : str
        Domain of the images, or the law of synthetic latents.
    way : str
        A key of `WAYS`, "states" or "images" for `regenerated`, "pixels", "noised" or "drawn".
    t : float
        Level.
    values : Tensor of shape (n, C, H, W)
        The latents.

    Examples
    --------
    >>> Sample("none", "noise", "drawn", 999.0, torch.zeros(8, 1, 4, 4)).family
    'F0'
    """

    network: str
    domain: str
    way: str
    t: float
    values: torch.Tensor

    @property
    def family(self) -> str:
        """Narrowest family of null laws that makes sense: N(0, I) only at the last level."""
        return "F0" if self.t > LAST or self.way == "drawn" else "F1"

    @property
    def whole(self) -> bool:
        """Whether the table keeps every test, and not only `KEPT`."""
        return self.way == "drawn" or (self.t > LAST and self.way not in ("paper", "t900"))

    @property
    def labels(self) -> dict[str, object]:
        """Everything but the values."""
        shown = asdict(replace(self, values=torch.zeros(0)))
        return {key: value for key, value in shown.items() if key != "values"}


def last_level(model: FrozenModel, network: str = "trained", **wanted: object) -> Iterator[Sample]:
    """Yield the latents of a network at the last level of each way.

    Parameters
    ----------
    model : FrozenModel
        The network.
    network : str, default "trained"
        What it is called.
    **wanted
        ``domains``, ``ways``, ``name`` on disk.

    Yields
    ------
    Sample
        One for each way and domain.

    Examples
    --------
    >>> list(last_level(None, domains=[], ways=["level0"]))
    []
    """
    for way in wanted["ways"]:
        for domain in wanted["domains"]:
            made = cell(model, domain, way, name=wanted.get("name"))
            yield Sample(network, domain, way, float(made.timesteps[-1]), made.latent)


def along_t(model: FrozenModel, domains: Sequence[str]) -> Iterator[Sample]:
    """Yield converged latents at the grid's levels nearest to `LEVELS`.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.
    domains : sequence of str
        Domains.

    Yields
    ------
    Sample
        Ways "level0" and "noise".

    Examples
    --------
    >>> list(along_t(None, []))
    []
    """
    for way in ("level0", "noise"):
        for domain in domains:
            made = cell(model, domain, way)
            for t in LEVELS:
                k = int(np.abs(made.timesteps - t).argmin())
                yield Sample("trained", domain, way, float(made.timesteps[k]), made.levels[k])


def without_network(
    model: FrozenModel, domains: Sequence[str], *, seed: int = 0
) -> Iterator[Sample]:
    """Yield pixels with invisible noise, and images under the forward noise of `LEVELS`.

    Parameters
    ----------
    model : FrozenModel
        Gives schedule and shape.
    domains : sequence of str
        Domains.
    seed : int, default 0
        Source of the noise.

    Yields
    ------
    Sample
        Ways "pixels" at t = 0 and "noised".

    Examples
    --------
    >>> list(without_network(None, []))
    []
    """
    generator = torch.Generator().manual_seed(seed)
    for domain in domains:
        images = cell(model, domain).images.double()
        for t in (0.0, *LEVELS):
            kept = float(model.schedule.alpha_bar_at(t))
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            noised = kept**0.5 * images + (1 - kept) ** 0.5 * noise
            yield Sample("none", domain, "noised" if t else "pixels", t, noised)


def drawn(like: torch.Tensor, *, seed: int = 0) -> Iterator[Sample]:
    """Yield synthetic latents whose law is known: what a test must pass, and what it must find.

    Parameters
    ----------
    like : Tensor of shape (n, C, H, W)
        Latents; "fitted" draws from the Gaussian with their mean and covariance.
    seed : int, default 0
        Source of the draws.

    Yields
    ------
    Sample
        "noise" N(0, I), "fitted" N(mean, covariance), "shell" uniform on the sphere of radius sqrt(d),
        "scales" with norms of .9 and 1.1 sqrt(d), "clusters" 30 standard deviations apart.

    Examples
    --------
    >>> [x.domain for x in drawn(torch.randn(8, 1, 4, 4))]
    ['noise', 'fitted', 'shell', 'scales', 'clusters']
    """
    rng = np.random.default_rng(seed)
    flat = like.flatten(1).double().numpy()
    n, d = flat.shape
    noise, mean = rng.standard_normal((5, n, d)), flat.mean(0)
    unit = noise[2] / np.linalg.norm(noise[2], axis=1, keepdims=True)
    side = rng.choice([-1.0, 1.0], n)[:, None]
    made = {
        "noise": noise[0],
        "fitted": mean + draw_weights(n, n, rng) @ (flat - mean),
        "shell": np.sqrt(d) * unit,
        "scales": (1 + side / 10) * noise[3],
        "clusters": noise[4] + 15 / np.sqrt(d) * side * rng.choice([-1.0, 1.0], d),
    }
    for name, values in made.items():
        yield Sample("none", name, "drawn", 0.0, torch.from_numpy(values).reshape(like.shape))


def samples(model: FrozenModel) -> Iterator[Sample]:
    """Yield all that a model is compared on.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.

    Yields
    ------
    Sample
        The trained network on its own and on unseen domains, at the last level and along t; its own
        images generated and inverted again; pixels and forward noise; for `CONTROLLED` models the
        controls and synthetic laws too.

    Examples
    --------
    >>> next(samples(load_model("no-such-model")))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    unseen = unseen_domains(model)
    domains = [own_domain(model.name), *unseen]
    yield from last_level(model, domains=domains, ways=WAYS)
    yield from along_t(model, domains)
    noise, of_states, of_images = regenerated(model)
    t = float(model.schedule.t_end)
    yield Sample("none", "noise", "drawn", t, noise)
    yield Sample("trained", domains[0], "states", t, of_states)
    yield Sample("trained", domains[0], "images", t, of_images)
    yield from without_network(model, domains)
    if model.name in CONTROLLED:
        for network, control in networks(model).items():
            name = f"{model.name}-{network}"
            ways = ("level0", "noise")
            yield from last_level(control, network, domains=domains, ways=ways, name=name)
        yield from drawn(cell(model, unseen[0]).latent)


# ------------------------------------------------------------------------------------- the tables


def gaussianity_table(model: FrozenModel, *, seed: int = 0) -> pd.DataFrame:
    """Test every sample of a model against every family that makes sense for it.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.
    seed : int, default 0
        Source of projections, halves and bootstrap.

    Returns
    -------
    DataFrame
        A row for each test, and one named "combined" for each family; along t and for the paper's loop
        only those of `KEPT`.

    Examples
    --------
    >>> gaussianity_table(load_model("no-such-model"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    parts = []
    for sample in samples(model):
        if float(sample.values.flatten(1).std(0).min()) == 0:
            continue  # a zero network leaves constant pixels constant: no law with a density
        families = FAMILIES[FAMILIES.index(sample.family) :]
        found = report(sample.values, rng=np.random.default_rng(seed), null=families)
        size = {"n": len(sample.values), "d": sample.values[0].numel()}
        joint = [
            {"name": "combined", "null": f, "pvalue": found.combined(f).pvalue, **size}
            for f in families
        ]
        rows = pd.concat([found.to_frame(), pd.DataFrame(joint)], ignore_index=True)
        rows = rows if sample.whole else rows[rows["name"].isin(KEPT)]
        parts.append(rows.drop(columns="reason").assign(model=model.name, **sample.labels))
    return pd.concat(parts, ignore_index=True)


def separability_table(model: FrozenModel, *, seed: int = 0) -> pd.DataFrame:
    """Separate the model's own held-out images from every unseen domain, in every space.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.
    seed : int, default 0
        Source of folds, permutations, bootstrap and splits.

    Returns
    -------
    DataFrame
        A row for each score; "centres" has the bias-corrected distance, with the paper's bar sigma
        d^(1/4) in `bar`; "train" stands for the model's own training images.

    Examples
    --------
    >>> separability_table(load_model("no-such-model"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    own, parts = own_domain(model.name), []
    spaces: dict[tuple[str, str, float], dict[str, torch.Tensor]] = {}
    for sample in samples(model):
        if sample.way not in ("drawn", "states", "images"):
            space = (sample.network, sample.way, sample.t)
            spaces.setdefault(space, {})[sample.domain] = sample.values
    trained = cell(model, own, split="train")
    spaces["trained", "level0", float(trained.timesteps[-1])]["train"] = trained.latent
    for (network, way, t), sets in spaces.items():
        for domain in (d for d in sets if d != own):
            rows = _separated(sets[own], sets[domain], np.random.default_rng(seed))
            labels = {"network": network, "domain": domain, "way": way, "t": t}
            parts.append(rows.assign(model=model.name, **labels))
    return pd.concat(parts, ignore_index=True)


def _separated(own: torch.Tensor, other: torch.Tensor, rng: np.random.Generator) -> pd.DataFrame:
    """Scores, centres and divergences of two sets as rows."""
    a, b = (x.flatten(1).double().numpy() for x in (own, other))
    found = separability.report(a, b, rng=rng, permutations=PERMUTATIONS, resamples=500)
    centres = found.centres
    more = [{"name": "centres", "auroc": centres.distance, "bar": centres.rule}]
    more += [{"name": x.name, "auroc": x.excess} for x in found.divergences]
    return pd.concat([found.to_frame(), pd.DataFrame(more)], ignore_index=True)


def geometry_table(model: FrozenModel) -> pd.DataFrame:
    """Measure norms, distances and angles of every sample of a model.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.

    Returns
    -------
    DataFrame
        A row for each statistic with its interval and closed form; "across" is the mean angle at an
        in-domain latent between two of the sample, "left" the share of the variance of squared
        distances that norms and mean do not explain.

    Examples
    --------
    >>> geometry_table(load_model("no-such-model"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    own = own_domain(model.name)
    parts, at_home = [], {}
    for sample in samples(model):
        flat = sample.values.flatten(1).double().numpy()
        space = (sample.network, sample.way, sample.t)
        at_home |= {space: flat} if sample.domain == own else {}
        rows = _measured(flat, at_home.get(space))
        parts.append(rows.assign(model=model.name, **sample.labels))
    return pd.concat(parts, ignore_index=True)


def _measured(flat: np.ndarray, home: np.ndarray | None) -> pd.DataFrame:
    """Statistics of one sample, and how the angle rule sees in-domain latents."""
    found = geometry.measure(flat)
    stated = {
        "norm": found.norm,
        "distance": found.distance,
        "origin_angle": found.origin_cos.degrees(),
        "vertex_angle": found.vertex_cos.degrees(),
        "effective_rank": found.effective_rank,
    }
    rows = [{"name": name, **asdict(x)} for name, x in stated.items()]
    rows.append({"name": "left", "value": _left(flat)})
    if home is not None:
        targets = geometry.RELEASED["CODE-F"].scaled(flat.shape[1])
        rules = geometry.accept(home, flat, targets, rng=np.random.default_rng(0))
        rows.append({"name": "across", "value": float(rules.means[:, 2].mean())})
    return pd.DataFrame(rows)


def _left(flat: np.ndarray) -> float:
    """Share of the variance of squared distances that both norms and the mean do not explain."""
    gram = gram_matrix(flat)
    mean = gram.mean(1) / np.sqrt(gram.mean())
    i, j = np.triu_indices(len(flat), 1)
    squares = np.diag(gram)
    distance = squares[i] + squares[j] - 2 * gram[i, j]
    known = np.stack([np.ones(len(i)), squares[i] + squares[j], mean[i] * mean[j]], axis=1)
    fit = known @ np.linalg.lstsq(known, distance, rcond=None)[0]
    return float((distance - fit).var() / distance.var())


def difference_table(model: FrozenModel) -> pd.DataFrame:
    """Compare the latents that networks give to the same images.

    Parameters
    ----------
    model : FrozenModel
        A model of the zoo.

    Returns
    -------
    DataFrame
        A row for each other model of as many channels, or control of this one, and each domain:
        `difference`, the rms difference of the centred converged latents over the rms size of this
        model's, and `means`, the distance of the mean latents over the same size. Where `other` is
        "noise", the relative rms difference, median over images, of the noise of generated images and
        their latents, clipped to [-1, 1] in `difference` and not clipped in `means`.

    Examples
    --------
    >>> difference_table(load_model("no-such-model"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    others = {x: load_model(x) for x in model_names() if x != model.name}
    others = {x: m for x, m in others.items() if m.sample_shape == model.sample_shape}
    named = {x: x for x in others}
    if model.name in CONTROLLED:
        controls = networks(model)
        others |= controls
        named |= {x: f"{model.name}-{x}" for x in controls}
    rows = []
    for domain in [own_domain(model.name), *unseen_domains(model)]:
        mine = cell(model, domain).latent.double()
        for other, network in others.items():
            theirs = cell(network, domain, name=named[other]).latent.double()
            labels = {"model": model.name, "other": other, "domain": domain}
            rows.append(labels | _difference(mine, theirs))
    noise, of_states, of_images = regenerated(model)
    labels = {"model": model.name, "other": "noise", "domain": own_domain(model.name)}
    states, images = (_off(noise, latent) for latent in (of_states, of_images))
    return pd.DataFrame([*rows, labels | {"difference": images, "means": states}])


def _off(noise: torch.Tensor, latent: torch.Tensor) -> float:
    """Median over the images of the relative rms difference of a latent and its noise."""
    off = (latent - noise).square().flatten(1).mean(1) / noise.square().flatten(1).mean(1)
    return float(off.sqrt().median())


def _difference(mine: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    """Relative rms difference of centred latents, and of their means."""
    size = (mine - mine.mean(0)).square().mean().sqrt()
    apart = mine - theirs
    centred = (apart - apart.mean(0)).square().mean().sqrt()
    means = apart.mean(0).square().mean().sqrt()
    return {"difference": float(centred / size), "means": float(means / size)}


TABLES = {
    "gaussianity": gaussianity_table,
    "separability": separability_table,
    "geometry": geometry_table,
    "differences": difference_table,
}


def table_path(name: str) -> Path:
    """Where a table of the study is kept.

    Parameters
    ----------
    name : str
        A key of `TABLES`.

    Returns
    -------
    Path
        A CSV file of ``data/results``.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> table_path("geometry").name
    'study_geometry.csv'
    """
    if name not in TABLES:
        raise ValueError(f"unknown table {name!r}; known are {', '.join(TABLES)}")
    return project_root() / "data" / "results" / f"study_{name}.csv"


def write_table(name: str, *, again: bool = False) -> Path:
    """Make a table model by model; what a run that was stopped had measured is kept.

    Parameters
    ----------
    name : str
        A key of `TABLES`.
    again : bool, default False
        Measure every model anew.

    Returns
    -------
    Path
        The table.

    Raises
    ------
    ValueError
        If the name is unknown.

    Examples
    --------
    >>> write_table("beauty")
    Traceback (most recent call last):
    ValueError: unknown table 'beauty'; known are gaussianity, separability, geometry, differences
    """
    path, parts = table_path(name), []
    for model in model_names():
        part = project_root() / "runs" / "study" / f"{name}-{model}.csv"
        if again or not part.exists():
            _write_csv(part, TABLES[name](load_model(model)))
        parts.append(pd.read_csv(part))
    _write_csv(path, pd.concat(parts, ignore_index=True))
    return path


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(index=False, float_format="%.4g", lineterminator="\n")
    write_text(path, text)
