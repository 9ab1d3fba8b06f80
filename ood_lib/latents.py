"""Latents on disk: inverted once, shared by every chapter, checked whenever they are read.

A latent is a tuple (model, images, start, solver, grid, seed); all of it stands in the file's metadata,
with the sha256 of the model's weights, of the images and of the latents themselves.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ood_lib.domains import load_images, project_root
from ood_lib.inversion import invert
from ood_lib.models import FrozenModel, load_model
from ood_lib.schedule import uniform_log_sigma

__all__ = ["LatentSet", "LatentSpec", "get", "path_of", "read"]


@dataclass(frozen=True)
class LatentSpec:
    """Which latents: the model, the images, and how they are inverted.

    Parameters
    ----------
    model : str
        Name for `load_model`.
    domain : str
        Name for `load_images`.
    split : str, default "fit"
        Split of the domain.
    n : int, optional
        First `n` images; all by default.
    t_end : float, optional
        Level of the latents; the last level of the model's schedule with sigma up to 160 by default.
    points : int, default 24
        Points of the grid, uniform in log sigma.
    solver : str, default "ab2"
        Solver of `invert`.
    start : str, default "level0"
        Start of `invert`.
    seed : int, default 0
        Source of the noise of ``start="noise"``.
    revision : str, optional
        Branch, tag or commit, for a model of the hub.

    Examples
    --------
    >>> LatentSpec("ddpm-fashion-32", "digits", n=8, t_end=474).t_end
    474.0
    """

    model: str
    domain: str
    split: str = "fit"
    n: int | None = None
    t_end: float | None = None
    points: int = 24
    solver: str = "ab2"
    start: str = "level0"
    seed: int = 0
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.t_end is not None:
            object.__setattr__(self, "t_end", float(self.t_end))


@dataclass(frozen=True)
class LatentSet:
    """Latents with the images they belong to.

    Parameters
    ----------
    latent : Tensor of shape (N, C, H, W)
        float32.
    images : Tensor of shape (N, C, H, W)
        float32 in [-1, 1].
    spec : LatentSpec
        How they were made.
    timesteps : ndarray of shape (points,)
        The grid.
    nfe : int
        Network calls an image.
    """

    latent: torch.Tensor
    images: torch.Tensor
    spec: LatentSpec
    timesteps: np.ndarray
    nfe: int


def path_of(spec: LatentSpec) -> Path:
    """File of a set of latents under ``runs/latents``.

    Parameters
    ----------
    spec : LatentSpec
        Which latents.

    Returns
    -------
    Path
        A readable name with a short hash of the whole specification.

    Examples
    --------
    >>> path_of(LatentSpec("ddpm-fashion-32", "digits")).parent.name
    'ddpm-fashion-32'
    """
    key = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:10]
    model, domain = Path(spec.model).name, Path(spec.domain).name
    level = "end" if spec.t_end is None else f"t{spec.t_end:g}"
    name = f"{domain}-{spec.split}-{level}-{spec.solver}-{key}.safetensors"
    return project_root() / "runs" / "latents" / model / name


def _sha256(array: torch.Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(array.numpy()).tobytes()).hexdigest()


def _model_sha256(model: FrozenModel) -> str:
    """Fingerprint of a model: its schedule and weights, or its answers where it has no weights."""
    digest = hashlib.sha256(model.schedule.alpha_bar.tobytes())
    if model.network is not None:
        for key, value in sorted(model.network.state_dict().items()):
            digest.update(key.encode() + value.cpu().numpy().tobytes())
    else:
        probe = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        for t in np.linspace(0, model.schedule.num_train_timesteps - 1, 3):
            digest.update(model.eps(probe, float(t)).numpy().tobytes())
    return digest.hexdigest()


def _checksum(latent: torch.Tensor, metadata: dict[str, str]) -> str:
    """Checksum of the latents and of everything that is said about them."""
    said = {key: value for key, value in metadata.items() if key != "checksum"}
    text = json.dumps([said, list(latent.shape), str(latent.dtype)], sort_keys=True)
    return hashlib.sha256(text.encode() + latent.numpy().tobytes()).hexdigest()


def _identity(spec: LatentSpec, model: FrozenModel, images: torch.Tensor) -> dict[str, str]:
    return {
        "spec": json.dumps(asdict(spec), sort_keys=True),
        "model_sha256": _model_sha256(model),
        "images_sha256": _sha256(images),
        "precision": "state float64, network float32, stored float32",
    }


def read(path: Path, expected: dict[str, str]) -> tuple[torch.Tensor, dict[str, str]]:
    """Read a file of latents and check it against what it should hold.

    Parameters
    ----------
    path : Path
        A file written by `get`.
    expected : dict
        Metadata that must match: specification and hashes of model and images.

    Returns
    -------
    tuple
        The latents and the metadata of the file.

    Raises
    ------
    ValueError
        If the file is damaged or belongs to another model, other images or another setting.

    Examples
    --------
    >>> read(Path("missing.safetensors"), {})
    Traceback (most recent call last):
    ValueError: missing.safetensors cannot be read as latents (...); remove it and run again
    """
    try:
        with safe_open(path, "pt") as file:
            metadata, latent = file.metadata() or {}, file.get_tensor("latent")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as latents ({error}); remove it and run again"
        ) from error
    wrong = [key for key, value in expected.items() if metadata.get(key) != value]
    if wrong:
        raise ValueError(f"{path} was made with another {wrong[0]}; remove it and run again")
    if metadata.get("checksum") != _checksum(latent, metadata):
        raise ValueError(f"{path} does not match its own checksum; remove it and run again")
    return latent, metadata


def get(
    spec: LatentSpec,
    *,
    model: FrozenModel | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    progress: bool = False,
) -> LatentSet:
    """Read latents from disk, or invert the images and write them.

    Parameters
    ----------
    spec : LatentSpec
        Which latents.
    model : FrozenModel, optional
        The model of `spec`, if it is loaded already, on `device`.
    device : str, default "cpu"
        A torch device to invert on; what is returned is on the CPU.
    batch_size : int, default 64
        Images in a network call; the latents do not depend on it.
    progress : bool, default False
        Show a progress bar while inverting.

    Returns
    -------
    LatentSet
        Latents and images.

    Raises
    ------
    ValueError
        If the specification is wrong or the file on disk does not belong to it.

    Examples
    --------
    >>> get(LatentSpec("no-such-model", "digits"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    model = model or load_model(spec.model, revision=spec.revision, device=device)
    images = load_images(spec.domain, n=spec.n, split=spec.split, like=model)
    identity, path = _identity(spec, model, images), path_of(spec)
    if not path.exists():
        _write(path, identity, spec, model, images.to(device), batch_size, progress)
    latent, metadata = read(path, identity)
    return LatentSet(
        latent, images, spec, np.array(json.loads(metadata["timesteps"])), int(metadata["nfe"])
    )


def _write(
    path: Path,
    identity: dict[str, str],
    spec: LatentSpec,
    model: FrozenModel,
    images: torch.Tensor,
    batch_size: int,
    progress: bool,
) -> None:
    grid = uniform_log_sigma(model.schedule, spec.points, t_end=spec.t_end)
    generator = torch.Generator().manual_seed(spec.seed)
    made = invert(
        model,
        images,
        timesteps=grid,
        solver=spec.solver,
        start=spec.start,
        generator=generator,
        batch_size=batch_size,
        progress=progress,
    )
    latent = made.latent.cpu().float().contiguous()
    metadata = {**identity, "timesteps": json.dumps(grid.tolist()), "nfe": str(made.nfe)}
    metadata["checksum"] = _checksum(latent, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    save_file({"latent": latent}, partial, metadata=metadata)
    partial.replace(path)
