"""Latents on disk: inverted once, shared by every chapter, checked whenever they are read.

A latent is a tuple (model, images, start, solver, grid, seed). The latents of one `LatentSpec` are a
folder of shards, one safetensors file for some hundred images each. All that a shard depends on stands
in its metadata, with the sha256 of the model's weights, of the shard's images and of the shard itself.
A shard is whole or not there: a run that was killed, or met a full disk, goes on after the last one.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ood_lib.domains import ImageRows, open_images
from ood_lib.files import project_root
from ood_lib.inversion import Inversion, invert
from ood_lib.models import FrozenModel, load_model, zero_model

__all__ = ["SHARD", "DamagedShard", "LatentSet", "LatentSpec", "get", "path_of", "read", "shards"]

SHARD = 256
_SHARD_NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


class DamagedShard(ValueError):
    """A shard that is cut short or does not match its own checksum; it can only be made again."""


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
        Level of the latents; that of the preset by default.
    points : int, optional
        Points of the grid; those of the preset by default.
    solver : str, optional
        Solver of `invert`; that of the preset by default.
    start : str, default "level0"
        Start of `invert`.
    seed : int, default 0
        Source of the noise of ``start="noise"``, together with the row of the image.
    revision : str, optional
        Branch, tag or commit, for a model of the hub.
    preset : str, default "converged"
        Preset of `invert`.
    levels : bool, default False
        Keep the states at all levels of the grid, not only the last.

    Examples
    --------
    >>> LatentSpec("ddpm-fashion-32", "digits", n=8, t_end=474).t_end
    474.0
    """

    model: str
    domain: str
    _: KW_ONLY
    split: str = "fit"
    n: int | None = None
    t_end: float | None = None
    points: int | None = None
    solver: str | None = None
    start: str = "level0"
    seed: int = 0
    revision: str | None = None
    preset: str = "converged"
    levels: bool = False

    def __post_init__(self) -> None:
        if self.t_end is not None:
            object.__setattr__(self, "t_end", float(self.t_end))


@dataclass(frozen=True)
class LatentSet:
    """Latents with the images they belong to.

    Parameters
    ----------
    latent : Tensor of shape (N, C, H, W)
        float32; float64 where there is a `companion`, because only then the way back is exact.
    images : Tensor of shape (N, C, H, W)
        float32 in [-1, 1].
    spec : LatentSpec
        How they were made.
    timesteps : ndarray of shape (points,)
        The grid.
    nfe : int
        Network calls an image, at most.
    solver : str
        Solver that was used.
    eps_at : str
        Level at which ``ddim`` asked the network.
    error_estimate : Tensor of shape (N,), optional
        As in `Inversion`.
    companion : Tensor of shape (N, C, H, W), optional
        As in `Inversion`.
    levels : Tensor of shape (points, N, C, H, W), optional
        float32 states at all timesteps, if the specification keeps them.
    first_row : int, default 0
        Row of the first image among those of the specification.
    """

    latent: torch.Tensor
    images: torch.Tensor
    spec: LatentSpec
    timesteps: np.ndarray
    nfe: int
    solver: str
    eps_at: str
    error_estimate: torch.Tensor | None = None
    companion: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    first_row: int = 0


def path_of(spec: LatentSpec) -> Path:
    """Folder of a set of latents under ``runs/latents``.

    Parameters
    ----------
    spec : LatentSpec
        Which latents.

    Returns
    -------
    Path
        A readable name with a short hash of the whole specification. How many images a shard holds
        is no part of it.

    Examples
    --------
    >>> path_of(LatentSpec("ddpm-fashion-32", "digits")).parent.name
    'ddpm-fashion-32'
    """
    key = hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:10]
    model, domain = Path(spec.model).name, Path(spec.domain).name
    level = "end" if spec.t_end is None else f"t{spec.t_end:g}"
    name = f"{domain}-{spec.split}-{level}-{spec.solver or spec.preset}-{key}"
    return project_root() / "runs" / "latents" / model / name


def shards(
    spec: LatentSpec,
    *,
    model: FrozenModel | None = None,
    device: str = "cpu",
    backend: str = "auto",
    precision: str = "fp32",
    shard: int = SHARD,
    batch_size: int = 64,
    progress: bool = False,
) -> Iterator[LatentSet]:
    """Read latents shard by shard; what is missing or damaged is inverted and written on the way.

    Memory holds one shard at a time. Several processes may do this with the same specification at
    once: each shard is made by one of them.

    Parameters
    ----------
    spec : LatentSpec
        Which latents.
    model : FrozenModel, optional
        The model of `spec`, if it is loaded already, on `device`.
    device : str, default "cpu"
        A torch device to invert on; what is returned is on the CPU.
    backend, precision : str, default "auto", "fp32"
        As in `load_model`. They are no part of the specification, but stand with each shard.
    shard : int, default 256
        Images in a shard that is made now; those on disk are read as they are. The latents do not
        depend on it.
    batch_size : int, default 64
        Images in a network call; the latents do not depend on it beyond rounding.
    progress : bool, default False
        Show a progress bar of the images.

    Returns
    -------
    iterator of LatentSet
        In the order of the images.

    Raises
    ------
    ValueError
        If the specification is wrong, or a shard on disk belongs to other latents.
    OSError
        If a shard cannot be written; those before it are kept.

    Warns
    -----
    RuntimeWarning
        If a shard is damaged. It is made again.

    Examples
    --------
    >>> shards(LatentSpec("no-such-model", "digits"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    model = model or load_model(
        spec.model, revision=spec.revision, device=device, backend=backend, precision=precision
    )
    return _stream(_job(spec, model, device, shard, batch_size), progress)


def get(
    spec: LatentSpec,
    *,
    model: FrozenModel | None = None,
    device: str = "cpu",
    backend: str = "auto",
    precision: str = "fp32",
    shard: int = SHARD,
    batch_size: int = 64,
    progress: bool = False,
) -> LatentSet:
    """Read all latents from disk; what is missing or damaged is inverted and written before.

    Parameters
    ----------
    spec, model, device, backend, precision, shard, batch_size, progress
        As in `shards`.

    Returns
    -------
    LatentSet
        Latents and images.

    Raises
    ------
    ValueError
        If the specification is wrong, or a shard on disk belongs to other latents.
    OSError
        If a shard cannot be written; those before it are kept.

    Warns
    -----
    RuntimeWarning
        If a shard is damaged. It is made again.

    Examples
    --------
    >>> get(LatentSpec("no-such-model", "digits"))
    Traceback (most recent call last):
    ValueError: unknown model 'no-such-model'; known are ...
    """
    parts = list(
        shards(
            spec,
            model=model,
            device=device,
            backend=backend,
            precision=precision,
            shard=shard,
            batch_size=batch_size,
            progress=progress,
        )
    )
    return LatentSet(
        _join([p.latent for p in parts]),
        _join([p.images for p in parts]),
        spec,
        parts[0].timesteps,
        max(p.nfe for p in parts),
        parts[0].solver,
        parts[0].eps_at,
        _join([p.error_estimate for p in parts]),
        _join([p.companion for p in parts]),
        _join([p.levels for p in parts], dim=1),
    )


def _join(parts: list[torch.Tensor | None], dim: int = 0) -> torch.Tensor | None:
    if any(part is None for part in parts):
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ------------------------------------------------------------------------------- what is to be made


@dataclass(frozen=True)
class _Job:
    """Everything that making and checking the shards of a specification takes."""

    spec: LatentSpec
    model: FrozenModel
    images: ImageRows
    grid: np.ndarray
    identity: dict[str, str]
    folder: Path
    device: str
    shard: int
    batch_size: int


def _job(spec: LatentSpec, model: FrozenModel, device: str, shard: int, batch_size: int) -> _Job:
    """Check all that can be wrong before anything is written."""
    if shard < 1:
        raise ValueError(f"a shard of {shard} images was asked for; use 1 or more")
    folder = path_of(spec)
    images = open_images(spec.domain, n=spec.n, split=spec.split, like=model)
    if not folder.exists():
        images.read(0, min(shard, len(images)))
    # a network that answers zero settles solver and grid, and objects to wrong ones, at no cost
    blank = torch.zeros(1, *model.sample_shape)
    settled = _invert(spec, zero_model(model), blank, 0, batch_size)
    identity = {
        "spec": json.dumps(asdict(spec), sort_keys=True),
        "preset": spec.preset,
        "start": settled.start,
        "solver": settled.solver,
        "eps_at": settled.eps_at,
        "model_sha256": _model_sha256(model),
    }
    return _Job(spec, model, images, settled.timesteps, identity, folder, device, shard, batch_size)


def _model_sha256(model: FrozenModel) -> str:
    """Fingerprint of a model: its schedule and weights, or its answers where it has no weights.

    The weights count to the precision of bf16, so that a model has one fingerprint in all precisions.
    """
    digest = hashlib.sha256(model.schedule.alpha_bar.tobytes())
    if model.network is not None:
        for key, value in sorted(model.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(value.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy())
    else:
        probe = torch.randn(2, *model.sample_shape, generator=torch.Generator().manual_seed(0))
        for t in np.linspace(0, model.schedule.num_train_timesteps - 1, 3):
            digest.update(model.eps(probe, float(t)).numpy())
    return digest.hexdigest()


def _generator(seed: int, row: int) -> torch.Generator:
    """Make the source of an image's noise: it depends on nothing but the seed and the image's row.

    torch keeps 32 bits of a seed. The odd factor spreads the rows over them and gives no two rows
    the same.
    """
    origin = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((origin + 0x9E3779B1 * row) % 2**32)


def _invert(
    spec: LatentSpec, model: FrozenModel, images: torch.Tensor, row: int, batch_size: int
) -> Inversion:
    """Invert images of which the first stands in `row`."""
    rows = range(row, row + len(images))
    return invert(
        model,
        images,
        preset=spec.preset,
        solver=spec.solver,
        points=spec.points,
        t_end=spec.t_end,
        start=spec.start,
        generator=[_generator(spec.seed, r) for r in rows] if spec.start == "noise" else None,
        keep_levels=spec.levels,
        batch_size=batch_size,
    )


# -------------------------------------------------------------------------------- one shard at a time


def _rows_of(path: Path) -> tuple[int, int]:
    """First row of a shard, and the row after its last."""
    first, last = _SHARD_NAME.fullmatch(path.name).groups()
    return int(first), int(last) + 1


def _on_disk(folder: Path) -> dict[int, Path]:
    """Shards of a folder by their first row."""
    found = folder.iterdir() if folder.is_dir() else ()
    return {_rows_of(p)[0]: p for p in sorted(found) if _SHARD_NAME.fullmatch(p.name)}


def _next_shard(job: _Job, first: int) -> Path:
    """Shard that begins in row `first`: the one on disk, or one that ends before the next on disk."""
    found, n = _on_disk(job.folder), len(job.images)
    later = [row for row in found if row > first]
    stop = min([first + job.shard, n, *later])
    path = found.get(first, job.folder / f"{first:06d}-{stop - 1:06d}.safetensors")
    if _rows_of(path)[1] > n:
        raise ValueError(
            f"{path} was made of more images than the {n} that {job.spec.domain!r} holds now; "
            "remove it and run again"
        )
    return path


def _stream(job: _Job, progress: bool) -> Iterator[LatentSet]:
    n = len(job.images)
    found = sum(stop - first for first, stop in map(_rows_of, _on_disk(job.folder).values()))
    bar = tqdm(
        total=n,
        initial=min(n, found),
        disable=not progress,
        desc=job.folder.parent.name,
        unit=" images",
    )
    with bar:
        first = 0
        while first < n:
            part = _shard(job, first, bar)
            first += len(part.latent)
            yield part
            del part  # not to hold two shards while the next one is made


def _shard(job: _Job, first: int, bar: tqdm) -> LatentSet:
    """Read the shard that begins in row `first`, or make it, while no other process does."""
    with suppress(DamagedShard):
        if (there := _load(job, _next_shard(job, first))) is not None:
            return there
    with _alone(job.folder, bar):
        path = _next_shard(job, first)
        there = _look_again(job, path, bar)
        return _make(job, path, bar) if there is None else there


def _look_again(job: _Job, path: Path, bar: tqdm) -> LatentSet | None:
    """Read a shard that another process may have made meanwhile; a damaged one is not there."""
    try:
        there = _load(job, path)
    except DamagedShard as damage:
        warnings.warn(f"{damage}; it is made again", RuntimeWarning, stacklevel=5)
        first, stop = _rows_of(path)
        bar.update(first - stop)  # it was counted as done
        return None
    bar.update(0 if there is None else len(there.latent))
    return there


@contextmanager
def _alone(folder: Path, bar: tqdm) -> Iterator[None]:
    """Keep other processes from making shards of the same folder, and clear what a kill left there."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        bar.set_postfix_str("waiting for another run")
        lock.acquire()
        bar.set_postfix_str("")
    try:
        for left in (*folder.glob("*.part"), *folder.glob(".tmp*")):
            left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _load(job: _Job, path: Path) -> LatentSet | None:
    if not path.exists():
        return None
    tensors, said = read(path)
    first, stop = _rows_of(path)
    images = job.images.read(first, stop)
    _check(path, said, {**job.identity, **_about(images, first)}, job.grid)
    if said.get("network_dtype") == "torch.bfloat16" != str(job.model.dtype):
        raise ValueError(
            f"{path} was made in bf16, which is off by 2 % in each call; ask for precision='bf16', or "
            "remove it and run again"
        )
    return _latent_set(job, images, first, tensors, said)


def _make(job: _Job, path: Path, bar: tqdm) -> LatentSet:
    first, stop = _rows_of(path)
    images, made = job.images.read(first, stop), []
    for row in range(first, stop, job.batch_size):
        batch = images[row - first : row - first + job.batch_size]
        made.append(_invert(job.spec, job.model, batch.to(job.device), row, job.batch_size))
        bar.update(len(batch))
    tensors = _tensors(made)
    said = {
        **job.identity,
        **_about(images, first),
        "timesteps": json.dumps(job.grid.tolist()),
        "nfe": str(max(part.nfe for part in made)),
        "error_estimate": _summary(tensors.get("error_estimate")),
        "backend": job.model.backend,
        "network_dtype": str(job.model.dtype),
        "state_dtype": str(made[0].latent.dtype),
    }
    _write(path, tensors, said)
    return _latent_set(job, images, first, tensors, said)


def _tensors(made: list[Inversion]) -> dict[str, torch.Tensor]:
    """Join what a shard keeps of its batches."""
    wide = torch.float32 if made[0].companion is None else torch.float64
    kept = {"latent": wide, "companion": wide, "error_estimate": torch.float32}
    joined = {
        key: _join([_stored(getattr(part, key), dtype) for part in made])
        for key, dtype in kept.items()
    }
    joined["levels"] = _join([_stored(part.levels, torch.float32) for part in made], dim=1)
    return {key: value.contiguous() for key, value in joined.items() if value is not None}


def _stored(value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if value is None else value.cpu().to(dtype)


def _latent_set(
    job: _Job,
    images: torch.Tensor,
    first: int,
    tensors: dict[str, torch.Tensor],
    said: dict[str, str],
) -> LatentSet:
    return LatentSet(
        tensors["latent"],
        images,
        job.spec,
        np.array(json.loads(said["timesteps"])),
        int(said["nfe"]),
        said["solver"],
        said["eps_at"],
        tensors.get("error_estimate"),
        tensors.get("companion"),
        tensors.get("levels"),
        first,
    )


# ----------------------------------------------------------------------------------------- the files


def _about(images: torch.Tensor, first: int) -> dict[str, str]:
    """Say which images a shard belongs to."""
    digest = hashlib.sha256(np.ascontiguousarray(images.numpy())).hexdigest()
    return {"rows": json.dumps([first, first + len(images) - 1]), "images_sha256": digest}


def _summary(error: torch.Tensor | None) -> str:
    if error is None:
        return "null"
    return json.dumps({"median": float(error.median()), "max": float(error.max())})


def _checksum(tensors: dict[str, torch.Tensor], said: dict[str, str]) -> str:
    """Checksum of the tensors and of everything that is said about them."""
    said = {key: value for key, value in said.items() if key != "checksum"}
    kinds = {key: [list(value.shape), str(value.dtype)] for key, value in tensors.items()}
    digest = hashlib.sha256(json.dumps([said, kinds], sort_keys=True).encode())
    for key in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[key].numpy()))
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read one shard and verify its checksum.

    Parameters
    ----------
    path : Path
        A file that `shards` or `get` wrote.

    Returns
    -------
    tuple
        The tensors by name: ``latent``, and where they were kept ``error_estimate``, ``companion``
        and ``levels``; and the metadata.

    Raises
    ------
    DamagedShard
        If the file is cut short or does not match its checksum.
    ValueError
        If it is another kind of file.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "000000-000255.safetensors"
    ...     _ = path.write_bytes(b"half a shard")
    ...     read(path)
    Traceback (most recent call last):
    ood_lib.latents.DamagedShard: ...000000-000255.safetensors is damaged (...)
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedShard(f"{path} is damaged ({error})") from error
    if "checksum" not in said:
        raise ValueError(f"{path} is no shard of latents; put it elsewhere and run again")
    if said["checksum"] != _checksum(tensors, said):
        raise DamagedShard(f"{path} is damaged (it does not match its own checksum)")
    return tensors, said


def _check(path: Path, said: dict[str, str], expected: dict[str, str], grid: np.ndarray) -> None:
    """Refuse a whole shard that belongs to other latents; it may be somebody's work."""
    wrong = [key for key, value in expected.items() if said.get(key) != value]
    found = np.array(json.loads(said.get("timesteps", "[]")))
    # machines differ in the last digit of a logarithm
    if found.shape != grid.shape or not np.allclose(found, grid, rtol=1e-9, atol=1e-6):
        wrong.append("timesteps")
    if wrong:
        what = wrong[0].removesuffix("_sha256")
        raise ValueError(
            f"{path} was made with another {what} ({_short(said.get(wrong[0]))}, not "
            f"{_short(expected.get(wrong[0], grid.tolist()))}); remove it, or put it elsewhere, and "
            "run again"
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _write(path: Path, tensors: dict[str, torch.Tensor], said: dict[str, str]) -> None:
    """Write a shard under another name first: under its own it is whole."""
    said["checksum"] = _checksum(tensors, said)
    partial = path.with_name(path.name + ".part")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # that of any new file; safetensors would hide it from others
        save_file(tensors, partial, metadata=said)
        partial.chmod(mode)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written ({error}); the shards before it are kept: make room and run "
            "again"
        ) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
