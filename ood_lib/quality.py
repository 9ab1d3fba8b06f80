"""Quality on record: how close a frozen model's samples are to held-out images of its own domain.

Four sets of images, equal in number, are measured against the same held-out images with the same
features: samples of the model, samples of the model at a tenth of its training, draws of the
Gaussian fitted to the training pixels, and training images themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ood_lib.classifier import load_classifier
from ood_lib.domains import load_images, to_bytes
from ood_lib.features import imagenet
from ood_lib.files import project_root, write_json
from ood_lib.inversion import generate
from ood_lib.metrics import Interval, jackknife, kid, prdc
from ood_lib.models import FrozenModel, load_model, pipeline_folder
from ood_lib.priors import make_prior
from ood_lib.schedule import uniform_log_sigma
from ood_lib.sources import train_images

__all__ = ["draw_samples", "kid_ratio", "measure_quality", "quality_of", "summary_of"]

POINTS = 40
SMALLEST = 1e-6  # of a KID that is divided by
GAUSSIAN_FIT = 10_000  # training images that the pixel Gaussian is fitted to, at most


def draw_samples(
    model: FrozenModel, n: int, *, seed: int = 0, points: int = POINTS
) -> torch.Tensor:
    """Draw images from a model: standard normal noise, deterministic path, two-step solver.

    Parameters
    ----------
    model : FrozenModel
        The model.
    n : int
        How many.
    seed : int, default 0
        Source of the noise.
    points : int, default 40
        Points of the grid, evenly spaced in log sigma; one network call less.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        float32 in [-1, 1], rounded to 8 bits as stored images are.

    Examples
    --------
    >>> draw_samples(load_model("ddpm-fashion-32"), 1, points=2).shape
    torch.Size([1, 1, 32, 32])
    """
    noise = torch.randn((n, *model.sample_shape), generator=torch.Generator().manual_seed(seed))
    grid = uniform_log_sigma(model.schedule, points)
    return _as_stored(generate(model, noise, timesteps=grid, solver="ab2").images)


def _as_stored(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(to_bytes(images.float())).float() / 127.5 - 1


def _to_images(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def _measure(features: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """KID with its jackknife interval, and precision, recall, density, coverage.

    Equal rows of both sets are left out together, so the interval covers the draw of both.
    """
    interval = jackknife(lambda rows: kid(features[rows], reference[rows]), len(features))
    shares = prdc(features, reference)
    return {
        "kid": [float(f"{x:.4g}") for x in interval],
        **{k: round(getattr(shares, k), 4) for k in ("precision", "recall", "density", "coverage")},
    }


def _measure_lines(
    lines: Mapping[str, torch.Tensor], reference: torch.Tensor, domain: str
) -> dict[str, Any]:
    """Measure each set of images in both feature spaces, with its share of the domain."""
    classifier = load_classifier()
    spaces = {"imagenet": imagenet, "domains": classifier.features}
    known = {space: of(reference) for space, of in spaces.items()}
    return {
        name: {space: _measure(of(images), known[space]) for space, of in spaces.items()}
        | {"share": round(float(classifier.is_domain(images, domain).mean()), 4)}
        for name, images in lines.items()
    }


def quality_of(name: str) -> dict[str, Any]:
    """Read the quality on record of a model.

    Parameters
    ----------
    name : str
        A model that `measure_quality` has measured.

    Returns
    -------
    dict
        Settings, hashes, and one entry a line under "lines": "model", "early", "gaussian", "train".

    Raises
    ------
    ValueError
        If there is no record.

    Examples
    --------
    >>> sorted(quality_of("ddpm-fashion-32")["lines"])
    ['early', 'gaussian', 'model', 'train']
    """
    path = pipeline_folder(name) / "quality.json"
    if not path.is_file():
        raise ValueError(f"{path} is not there; make it with: ood quality {name}")
    return json.loads(path.read_text())


def summary_of(name: str) -> str:
    """Quality of a model in a few words, or what measures it.

    Parameters
    ----------
    name : str
        A model of ``data/zoo``.

    Returns
    -------
    str
        KID of the samples and of the pixel Gaussian, precision, recall, share of the domain.

    Examples
    --------
    >>> summary_of("ddpm-fashion-32").split()[0]
    'KID'
    """
    if not (pipeline_folder(name) / "quality.json").is_file():
        return f"not measured: ood quality {name}"
    record = quality_of(name)
    ours, gaussian = (record["lines"][line][record["space"]] for line in ("model", "gaussian"))
    return (
        f"KID {ours['kid'][0]:.3g} (pixel Gaussian {gaussian['kid'][0]:.3g})  precision "
        f"{ours['precision']:.2f}  recall {ours['recall']:.2f}  called {record['domain']} "
        f"{record['lines']['model']['share']:.2f}"
    )


def kid_ratio(record: Mapping[str, Any], over: str, *, space: str | None = None) -> Interval:
    """KID of the model's samples over that of another line of its record.

    Parameters
    ----------
    record : mapping
        What `quality_of` reads.
    over : {"early", "gaussian", "train"}
        The line to divide by.
    space : {"imagenet", "domains"}, optional
        The features; those of the record by default.

    Returns
    -------
    Interval
        It joins the ends of both intervals, so it covers at least 95 %. A negative KID counts as
        zero; where the other may be zero, the upper end is very large.

    Examples
    --------
    >>> line = {"imagenet": {"kid": [2.0, 1.0, 3.0]}}
    >>> kid_ratio({"space": "imagenet", "lines": {"model": line, "early": line}}, "early").value
    1.0
    """
    space = space or record["space"]
    top, base = (np.array(record["lines"][x][space]["kid"]) for x in ("model", over))
    top, base = top.clip(0), base.clip(SMALLEST)
    return Interval(*(top / base[[0, 2, 1]]).tolist())


def measure_quality(
    name: str, *, source: Path | None = None, n: int = 372, seed: int = 0, early: Path | None = None
) -> Path:
    """Measure a model of the zoo and write ``quality.json`` into its folder.

    Parameters
    ----------
    name : str
        A model of ``data/zoo``.
    source : Path, optional
        Folder with the files of its training domain, as for `train_images`.
    n : int, default 372
        Images in each set and in the reference, the held-out images of the domain.
    seed : int, default 0
        Source of every draw.
    early : Path, optional
        Weights at a tenth of the training; where `train` left them by default. If there is no such
        file, that line of the record on disk is kept.

    Returns
    -------
    Path
        The record.

    Raises
    ------
    ValueError
        If the model is unknown, more images are asked for than are held out, or the line of the early
        weights can neither be measured nor kept.

    Notes
    -----
    KID: Binkowski et al. 2018, arXiv:1801.01401. Precision and recall: Kynkaanniemi et al. 2019,
    arXiv:1904.06991. Density and coverage: Naeem et al. 2020, arXiv:2002.09797.

    Examples
    --------
    >>> measure_quality("no-such-model")
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    path, model = pipeline_folder(name) / "quality.json", load_model(name)
    settings = _settings(path.parent, n, seed)
    domain = settings["domain"]
    held_out = load_images(domain, n=n, split="heldout", like=model)
    early = early or project_root() / "runs" / "training" / name / "ema_10_percent.safetensors"
    kept = None if early.is_file() else _kept_line(path, settings, early)
    lines = {"model": draw_samples(model, n, seed=seed), **_references(model, settings, source)}
    if kept is None:
        model.network.load_state_dict(load_file(early))
        lines["early"] = draw_samples(model, n, seed=seed)
    measured = _measure_lines(lines, held_out, domain)
    measured["early"] = kept or {**measured["early"], "weights_sha256": _sha256(early)}
    record = {
        **settings,
        # ImageNet knows little of grey digits and clothes
        "space": "imagenet" if model.sample_shape[0] == 3 else "domains",
        "held_out_share": round(float(load_classifier().is_domain(held_out, domain).mean()), 4),
        "lines": measured,
    }
    write_json(path, record)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _settings(folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Collect the settings and the hashes of the files that the numbers depend on."""
    run = json.loads((folder / "training.json").read_text())
    data = project_root() / "data"
    files = {
        "weights": folder / "unet" / "diffusion_pytorch_model.safetensors",
        "held_out": data / "domains" / f"{run['domain']}.npz",
        "classifier": data / "classifier" / "classifier.safetensors",
    }
    hashes = {f"{name}_sha256": _sha256(path) for name, path in files.items()}
    return {
        "domain": run["domain"],
        "n": n,
        "seed": seed,
        "solver": "ab2",
        "points": POINTS,
        "gaussian_fit": GAUSSIAN_FIT,
        "training_sha256": run["data_sha256"],
        **hashes,
    }


def _references(
    model: FrozenModel, settings: Mapping[str, Any], source: Path | None
) -> dict[str, torch.Tensor]:
    """Training images, and draws of the Gaussian fitted to their pixels."""
    pixels, n = train_images(settings["domain"], source=source), settings["n"]
    found = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    if found != settings["training_sha256"]:
        raise ValueError(
            f"the training images of {settings['domain']!r} are not those of {model.name!r} (sha256 "
            f"{found:.8}, not {settings['training_sha256']:.8}); give their folder with --source"
        )
    rng = np.random.default_rng(settings["seed"])
    train = _to_images(pixels[rng.permutation(len(pixels))[:GAUSSIAN_FIT]])
    drawn = make_prior("full covariance").fit(train.flatten(1).numpy()).sample(n, rng)
    gaussian = _as_stored(torch.from_numpy(drawn).view(n, *model.sample_shape))
    return {"gaussian": gaussian, "train": train[:n]}


def _kept_line(path: Path, settings: Mapping[str, Any], early: Path) -> dict[str, Any]:
    record = json.loads(path.read_text()) if path.is_file() else {}
    if {key: record.get(key) for key in settings} != settings:
        raise ValueError(
            f"{early} is not there, and {path} holds no line of it measured with these settings; "
            "train the model again, or give the weights with --early"
        )
    return record["lines"]["early"]
