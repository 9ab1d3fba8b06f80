"""Images of a domain: shipped sets, image folders, Hugging Face datasets.

Every image takes the same road: decode, centre-crop to a square, antialiased bicubic resize,
luminance or repetition for the channels, scale to [-1, 1]. Nothing is ever padded: a constant border
would separate two domains by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from ood_lib.files import project_root

if TYPE_CHECKING:
    from ood_lib.models import FrozenModel

__all__ = [
    "LUMA",
    "MIN_SIDE",
    "SPLITS",
    "ImageRows",
    "did_you_mean",
    "domain_names",
    "folder_files",
    "load_images",
    "open_images",
    "resize",
    "to_bytes",
    "to_channels",
    "to_float",
]

MIN_SIDE = 8
SPLITS = ("fit", "heldout", "train")
LUMA = (0.299, 0.587, 0.114)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


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


def to_float(array: np.ndarray) -> torch.Tensor:
    """Turn stored pixels into a batch of images.

    Parameters
    ----------
    array : ndarray of shape (N, H, W, C)
        uint8 pixels.

    Returns
    -------
    Tensor of shape (N, C, H, W)
        float32 in [0, 1].

    Examples
    --------
    >>> to_float(np.full((1, 8, 8, 3), 255, np.uint8)).shape
    torch.Size([1, 3, 8, 8])
    """
    return torch.tensor(array.transpose(0, 3, 1, 2)).float() / 255


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Turn images into pixels as a file holds them.

    Parameters
    ----------
    images : Tensor of shape (N, C, H, W)
        In [-1, 1]; what lies beyond is clipped.

    Returns
    -------
    ndarray of shape (N, C, H, W)
        uint8.

    Examples
    --------
    >>> to_bytes(torch.tensor([-2.0, 0.0, 1.0]).reshape(1, 1, 1, 3)).tolist()
    [[[[0, 128, 255]]]]
    """
    return images.clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End of a sentence that refuses an unknown name.

    Parameters
    ----------
    name : str
        What came.
    known : iterable of str
        What could have come.

    Returns
    -------
    str
        The nearest known name, or all of them where none is near.

    Examples
    --------
    >>> did_you_mean("digit", ["digits", "faces"])
    "; did you mean 'digits'?"
    """
    known = list(known)
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known) or 'none'}"


Reader = Callable[[np.ndarray, int | None, int | None], torch.Tensor]


@dataclass(frozen=True)
class ImageRows:
    """Images of a domain that are decoded only when they are read, some rows at a time.

    Made by `open_images`. Memory holds the rows that were asked for and, of a shipped domain, its
    stored bytes; of a folder only the names.

    Parameters
    ----------
    name : str
        The domain.
    chosen : ndarray of shape (N,)
        Places of the images in their source.
    decode : callable
        ``(places, side, channels) -> images (n, C, H, W) in [0, 1]``.
    side, channels : int, optional
        What every image is brought to; those of the first image that is read by default.

    Examples
    --------
    >>> rows = open_images("digits")
    >>> len(rows), rows.read(300, 304).shape
    (372, torch.Size([4, 1, 32, 32]))
    """

    name: str
    chosen: np.ndarray
    decode: Reader
    side: int | None = None
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, first: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read the images `first` to `stop`, the last one left out.

        Parameters
        ----------
        first : int, default 0
            First row.
        stop : int, optional
            Row after the last; all that are left by default.

        Returns
        -------
        Tensor of shape (stop - first, C, H, W)
            float32 in [-1, 1].

        Raises
        ------
        ValueError
            If there are no such rows, or a file is not a readable image of `MIN_SIDE` pixels or more.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= first < stop <= len(self):
            raise ValueError(
                f"rows {first} to {stop} of {self.name!r} were asked for; it has rows 0 to {len(self)}"
            )
        return self.take(np.arange(first, stop))

    def take(self, rows: np.ndarray) -> torch.Tensor:
        """Read some images, in any order.

        Parameters
        ----------
        rows : ndarray of int, shape (n,)
            Rows, one or more.

        Returns
        -------
        Tensor of shape (n, C, H, W)
            float32 in [-1, 1].

        Raises
        ------
        ValueError
            If a file is not a readable image of `MIN_SIDE` pixels or more.
        """
        return self.decode(self.chosen[rows], self.side, self.channels) * 2 - 1


def _open_shipped(name: str, split: str, root: Path) -> tuple[int, Reader]:
    with np.load(root / "data" / "domains" / f"{name}.npz") as archive:
        images, splits = archive["images"], archive["split"]
    known = [s for s in SPLITS if (splits == s).any()]
    if split not in (*known, "all"):
        raise ValueError(
            f"domain {name!r} has no split {split!r}; it has {', '.join([*known, 'all'])}"
        )
    stored = images if split == "all" else images[splits == split]

    def decode(places: np.ndarray, side: int | None, channels: int | None) -> torch.Tensor:
        made = to_float(stored[places])
        return to_channels(resize(made, side or made.shape[-1]), channels or made.shape[1])

    return len(stored), decode


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
    return to_float(array.reshape(1, *array.shape[:2], -1))


def _open(label: str, source: Path | BytesIO | None) -> torch.Tensor:
    """Decode one image file; `label` names it in the error."""
    try:
        with Image.open(source) as image:
            return _decode(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, AttributeError) as error:
        raise ValueError(f"{label} is not a readable image ({error}); mend or remove it") from error


def folder_files(folder: Path) -> list[Path]:
    """List the image files of a folder and of the folders in it, in the order in which they are read.

    Parameters
    ----------
    folder : Path
        The folder; names that begin with a dot do not count.

    Returns
    -------
    list of Path
        Sorted.

    Raises
    ------
    ValueError
        If it holds another kind of file, or no image.

    Examples
    --------
    >>> folder_files(Path("no-such-folder"))
    Traceback (most recent call last):
    ValueError: no-such-folder holds no images; put .png, ... files in it
    """
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


def _open_folder(folder: Path) -> tuple[int, Reader]:
    files = folder_files(folder)

    def decode(places: np.ndarray, side: int | None, channels: int | None) -> torch.Tensor:
        chosen = (files[i] for i in places.tolist())
        return _one_size(((str(path), path) for path in chosen), side, channels)

    return len(files), decode


def _open_dataset(name: str, split: str) -> tuple[int, Reader]:
    """Open a Hugging Face dataset; its images stay undecoded until they are read."""
    data = _read_dataset(name, split)
    from datasets import Image as ImageColumn

    columns = [c for c, kind in data.features.items() if isinstance(kind, ImageColumn)]
    if not columns:
        raise ValueError(
            f"dataset {name!r} has no image column; its columns are {', '.join(data.features)}"
        )
    data = data.cast_column(columns[0], ImageColumn(decode=False))

    def files(places: np.ndarray) -> Iterator[tuple[str, Path | BytesIO | None]]:
        for i in places.tolist():
            stored = data[i][columns[0]] or {}
            content, path = stored.get("bytes"), stored.get("path")
            yield f"image {i} of {name}", BytesIO(content) if content else path and Path(path)

    return len(data), lambda places, side, channels: _one_size(files(places), side, channels)


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


def open_images(
    name: str,
    *,
    n: int | None = None,
    split: str = "fit",
    like: FrozenModel | None = None,
    rng: np.random.Generator | None = None,
) -> ImageRows:
    """Open a domain to read its images some rows at a time.

    Parameters
    ----------
    name, n, split, like, rng
        As in `load_images`.

    Returns
    -------
    ImageRows
        The images, not decoded yet.

    Raises
    ------
    ValueError
        If the name, the split or `n` is unknown or too large, or a folder is empty.

    Examples
    --------
    >>> len(open_images("digits", n=40))
    40
    """
    root = project_root()
    if name in domain_names(root):
        count, decode = _open_shipped(name, split, root)
    elif _is_image_folder(name):
        count, decode = _open_folder(Path(name))
    elif name and (Path(name).is_dir() or "/" in name):
        count, decode = _open_dataset(name, split)
    else:
        known = ", ".join(domain_names(root))
        raise ValueError(
            f"unknown domain {name!r}; known are {known}, or give a folder or owner/dataset"
        )
    side, channels = (None, None) if like is None else (like.sample_shape[1], like.sample_shape[0])
    return ImageRows(name, _choose(count, n, rng, name), decode, side, channels)


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
    return open_images(name, n=n, split=split, like=like, rng=rng).read()
