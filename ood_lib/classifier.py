"""A small classifier of the shipped domains, with a class of its own for what is none of them.

A classifier of two domains must call noise one of the two. This one is shown garbage as well, so a
share of images called a digit counts only what looks like one. It sees every image in colour or in grey
at random, so that models of one and of three channels are judged alike and colour alone decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm.auto import trange

from ood_lib.domains import domain_names, to_channels
from ood_lib.files import project_root, write_json
from ood_lib.metrics import Interval, ratio_of_shares
from ood_lib.priors import FullGaussian

__all__ = [
    "KINDS",
    "NONE",
    "UNSEEN",
    "DomainClassifier",
    "held_out_confusion",
    "load_classifier",
    "none_images",
    "recall_of_none",
    "train_classifier",
    "unseen_garbage",
]

SIDE = 32
NONE = "none"
KINDS = ("gaussian", "phase", "white", "smooth", "overlay")
UNSEEN = ("rows", "pepper", "gratings", "flat", "woven", "warped")  # never trained on
UPRIGHT = ("digits",)  # a mirrored digit is no digit
WIDTHS = (24, 48, 80, 96, 96)
EACH = 8  # images a domain in a batch
TRAIN_EACH, HELD_OUT_EACH = 200, 40  # garbage images a domain and kind
CHUNK = 256


def _network(classes: int) -> nn.Sequential:
    """Five convolutions, the mean over pixels, one linear layer; sees 33 x 33 pixels at once."""
    layers, before = [], 3
    for width, stride in zip(WIDTHS, (1, 2, 2, 2, 1), strict=True):
        convolution = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(OrderedDict(body=body, head=nn.Linear(before, classes)))
    return network.to(memory_format=torch.channels_last)  # a third faster on a CPU


@dataclass(frozen=True, eq=False)
class DomainClassifier:
    """A trained classifier of images into domains and "none".

    Parameters
    ----------
    network : torch.nn.Module
        Maps (N, 3, 32, 32) to logits; its part ``body`` to the features before the last layer.
    classes : tuple of str
        Names of the domains, then "none".

    Examples
    --------
    >>> classifier = DomainClassifier(_network(2).eval(), ("digits", "none"))
    >>> classifier.probabilities(torch.zeros(4, 1, 32, 32)).shape
    (4, 2)
    """

    network: nn.Module
    classes: tuple[str, ...]

    def features(self, images: torch.Tensor) -> np.ndarray:
        """Features before the last layer, (N, 96) float32, for KID and PRDC.

        Use them where ImageNet knows little: grey digits, clothes, silhouettes.
        """
        return _apply(self.network.body, images)

    def probabilities(self, images: torch.Tensor) -> np.ndarray:
        """Probability of each class, (N, K) float32, for images (N, 1 or 3, 32, 32) in [-1, 1]."""
        return _apply(lambda x: self.network(x).softmax(1), images)

    def is_domain(self, images: torch.Tensor, domain: str) -> np.ndarray:
        """Whether `domain` is the most probable class of each image, (N,) booleans."""
        if domain not in self.classes:
            raise ValueError(f"class {domain!r} is not known; known are {', '.join(self.classes)}")
        return self.probabilities(images).argmax(1) == self.classes.index(domain)

    def share(self, images: torch.Tensor, domain: str) -> Interval:
        """Share of images called `domain`, with its Wilson interval."""
        return ratio_of_shares(self.is_domain(images, domain))


@torch.inference_mode()
def _apply(function: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> np.ndarray:
    """Evaluate on images of one or three channels, in chunks."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2:] != (SIDE, SIDE):
        raise ValueError(
            f"images have shape {tuple(images.shape)}, the classifier takes (N, 1, {SIDE}, {SIDE}) "
            f"or (N, 3, {SIDE}, {SIDE}); resize them by ood_lib.domains.resize"
        )
    rgb = to_channels(images.detach().cpu().float().clamp(-1, 1), 3)
    return torch.cat([function(chunk) for chunk in rgb.split(CHUNK)]).numpy()


def _read(name: str, *splits: str) -> torch.Tensor:
    """Images of a shipped domain, (N, 3, 32, 32) in [-1, 1]."""
    with np.load(project_root() / "data" / "domains" / f"{name}.npz") as archive:
        chosen = archive["images"][np.isin(archive["split"], splits)]
    return to_channels(torch.tensor(chosen.transpose(0, 3, 1, 2)).float() / 127.5 - 1, 3)


def _names() -> list[str]:
    names = domain_names()
    if len(names) < 2:
        raise ValueError(
            f"a classifier needs two domains or more, {project_root() / 'data' / 'domains'} holds "
            f"{len(names)}; build them by ood domains build"
        )
    return names


def _gaussian(images: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    prior = FullGaussian().fit(images.reshape(len(images), -1))
    return prior.sample(n, rng).reshape(n, *images.shape[1:])


def _scrambled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn every phase by that of white noise, one draw for all channels; amplitudes stay."""
    noise = np.fft.fft2(rng.standard_normal((len(images), 1, SIDE, SIDE)))
    turn = noise / np.abs(noise)
    turn[..., 0, 0] = 1  # the mean stays
    return np.fft.ifft2(np.fft.fft2(images) * turn).real


def _noise(n: int, smooth: bool, rng: np.random.Generator) -> np.ndarray:
    """White noise, or noise blurred over 1 to 6 pixels; every second image is grey."""
    noise = rng.standard_normal((n, 3, SIDE, SIDE))
    noise[::2] = noise[::2, :1]
    if smooth:
        squares = np.add.outer(*[np.fft.fftfreq(SIDE) ** 2] * 2)
        blur = np.exp(-2 * (np.pi * rng.uniform(1, 6, (n, 1, 1, 1))) ** 2 * squares)
        noise = np.fft.ifft2(np.fft.fft2(noise) * blur).real
        noise /= noise.std((1, 2, 3), keepdims=True)
    return rng.uniform(-0.7, 0.7, (n, 1, 1, 1)) + rng.uniform(0.1, 0.8, (n, 1, 1, 1)) * noise


def _overlays(domains: list[np.ndarray], each: int, rng: np.random.Generator) -> np.ndarray:
    """Blends of an image of each domain with one of another domain."""
    first, second = _two_domains(len(domains), each, rng)
    a, b = _draw(domains, first, rng), _draw(domains, second, rng)
    weight = rng.uniform(0.35, 0.65, (len(first), 1, 1, 1))
    return weight * a + (1 - weight) * b


def _two_domains(count: int, each: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of domains, each in turn, and of another one beside each."""
    first = np.repeat(np.arange(count), each)
    return first, (first + rng.integers(1, count, len(first))) % count


def _draw(domains: list[np.ndarray], which: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw an image of each domain that is named."""
    return np.stack([rng.choice(domains[d]) for d in which])


def none_images(
    domains: dict[str, torch.Tensor], *, each: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Garbage that resembles the domains: what the class "none" is made of.

    Parameters
    ----------
    domains : dict of str to Tensor of shape (N, 3, 32, 32)
        Images of two domains or more, in [-1, 1].
    each : int
        Images a domain and kind.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    dict of str to Tensor of shape (each * number of domains, 3, 32, 32)
        By kind: "gaussian", draws of the Gaussian fitted to the pixels of each domain; "phase", images
        with scrambled phases; "white" and "smooth" noise; "overlay", blends of images of two domains.

    Examples
    --------
    >>> two = {name: torch.rand(9, 3, 32, 32) for name in ("a", "b")}
    >>> none_images(two, each=3, rng=np.random.default_rng(0))["overlay"].shape
    torch.Size([6, 3, 32, 32])
    """
    arrays = [images.numpy() for images in domains.values()]
    made = {
        "gaussian": np.concatenate([_gaussian(x, each, rng) for x in arrays]),
        "phase": _scrambled(np.concatenate([rng.choice(x, each) for x in arrays]), rng),
        "white": _noise(each * len(arrays), False, rng),
        "smooth": _noise(each * len(arrays), True, rng),
        "overlay": _overlays(arrays, each, rng),
    }
    return {kind: torch.from_numpy(x).float().clamp(-1, 1) for kind, x in made.items()}


def _rolled(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift every row of pixels round by a random number."""
    columns = rng.integers(0, SIDE, (len(images), 1, SIDE, 1)) + np.arange(SIDE)
    return np.take_along_axis(images, np.broadcast_to(columns % SIDE, images.shape), axis=3)


def _gratings(n: int, rng: np.random.Generator) -> np.ndarray:
    """Grey waves of one direction and a period of 4 to 16 pixels."""
    angle, period, start = rng.uniform([0, 4, 0], [np.pi, 16, 2 * np.pi], (n, 3)).T[..., None, None]
    row, column = np.mgrid[:SIDE, :SIDE]
    wave = np.sin(2 * np.pi * (row * np.sin(angle) + column * np.cos(angle)) / period + start)
    return (0.8 * wave)[:, None].repeat(3, axis=1)


def _warped(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move every pixel by about 6 pixels, neighbours alike; what comes in is reflected."""
    field = gaussian_filter(rng.standard_normal((2, len(images), SIDE, SIDE)), (0, 0, 2, 2))
    moved = np.mgrid[:SIDE, :SIDE][:, None] + 6 * field / field.std()
    row, column = np.abs((np.rint(moved).astype(int) + SIDE - 1) % (2 * SIDE - 2) - SIDE + 1)
    return images[np.arange(len(images))[:, None, None], :, row, column].transpose(0, 3, 1, 2)


def unseen_garbage(
    domains: dict[str, torch.Tensor], *, each: int, rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """Garbage of kinds that no classifier here is trained on, to judge the class "none" by.

    Parameters
    ----------
    domains : dict of str to Tensor of shape (N, 3, 32, 32)
        Images of two domains or more, in [-1, 1].
    each : int
        Images a domain and kind.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    dict of str to Tensor of shape (each * number of domains, 3, 32, 32)
        By kind: "rows", images with each row shifted at random; "pepper", 40 % of the pixels turned
        black or white; "gratings", waves; "flat", one colour; "woven", strips of two images of
        different domains in turn; "warped", strongly and smoothly. In the order of the domains.

    Examples
    --------
    >>> two = {name: torch.rand(9, 3, 32, 32) for name in ("a", "b")}
    >>> unseen_garbage(two, each=3, rng=np.random.default_rng(0))["rows"].shape
    torch.Size([6, 3, 32, 32])
    """
    arrays = [images.numpy() for images in domains.values()]
    which, other = _two_domains(len(arrays), each, rng)
    n = len(which)
    lost = rng.random((n, 1, SIDE, SIDE)) < 0.4
    strips = np.arange(SIDE) // 4 % 2 == 0
    made = {
        "rows": _rolled(_draw(arrays, which, rng), rng),
        "pepper": np.where(lost, rng.choice([-1, 1], lost.shape), _draw(arrays, which, rng)),
        "gratings": _gratings(n, rng),
        "flat": np.broadcast_to(rng.uniform(-1, 1, (n, 3, 1, 1)), (n, 3, SIDE, SIDE)).copy(),
        "woven": np.where(strips, _draw(arrays, which, rng), _draw(arrays, other, rng)),
        "warped": _warped(_draw(arrays, which, rng), rng),
    }
    return {kind: torch.from_numpy(x).float().clamp(-1, 1) for kind, x in made.items()}


def recall_of_none(
    classifier: DomainClassifier, *, channels: int, each: int = HELD_OUT_EACH, seed: int = 0
) -> dict[str, Interval]:
    """Share of garbage of each unseen kind that is called none.

    Parameters
    ----------
    classifier : DomainClassifier
        Judged on garbage made from held-out images of every domain that it knows.
    channels : {1, 3}
        Grey or colour.
    each : int, default 40
        Images a domain and kind.
    seed : int, default 0
        Source of the garbage; the same images for either number of channels.

    Returns
    -------
    dict of str to Interval
        A share for each kind of `unseen_garbage`, with its Wilson interval.

    Raises
    ------
    ValueError
        If there are neither 1 nor 3 channels.

    Examples
    --------
    >>> untrained = DomainClassifier(_network(3).eval(), ("faces", "galaxies", "none"))
    >>> tuple(recall_of_none(untrained, channels=1, each=2)) == UNSEEN
    True
    """
    held_out = {name: _read(name, "heldout") for name in classifier.classes[:-1]}
    garbage = unseen_garbage(held_out, each=each, rng=np.random.default_rng((seed, 2)))
    return {
        kind: classifier.share(to_channels(images, channels), NONE)
        for kind, images in garbage.items()
    }


def _shifted(images: torch.Tensor, reach: int, rng: torch.Generator) -> torch.Tensor:
    """Shift each image by up to `reach` pixels; what comes in is reflected."""
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows, cols = (
        torch.randint(2 * reach + 1, (len(images), 1), generator=rng) + torch.arange(SIDE)
        for _ in range(2)
    )
    which = torch.arange(len(images))[:, None, None]
    return padded[which, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def _augmented(images: torch.Tensor, mirror: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Shift, mirror, change contrast and cast a little, add a little noise, turn half of them grey."""

    def draw(channels: int, reach: float) -> torch.Tensor:
        return reach * (2 * torch.rand((len(images), channels, 1, 1), generator=rng) - 1)

    out = _shifted(images, 2, rng)
    out = torch.where((draw(1, 1) > 0) & mirror[:, None, None, None], out.flip(3), out)
    out = out * (1 + draw(1, 0.2) + draw(3, 0.05)) + draw(1, 0.1) + draw(3, 0.05)
    out = out + draw(1, 0.1) * torch.randn(out.shape, generator=rng)
    grey = to_channels(to_channels(out, 1), 3)
    return torch.where(draw(1, 1) > 0, grey, out).clamp(-1, 1)


def _fit(pools: dict[str, torch.Tensor], seed: int, steps: int) -> nn.Sequential:
    """Train on batches with as many images of each domain, and three times as many of none."""
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _network(len(pools)).train()
    counts = torch.tensor([EACH * (3 if name == NONE else 1) for name in pools])
    labels = torch.arange(len(pools)).repeat_interleave(counts)
    mirror = torch.tensor([name not in UPRIGHT for name in pools])[labels]
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in trange(steps, unit="batch", mininterval=5):
        chosen = [
            pool[torch.randint(len(pool), (int(count),), generator=rng)]
            for pool, count in zip(pools.values(), counts, strict=True)
        ]
        loss = F.cross_entropy(network(_augmented(torch.cat(chosen), mirror, rng)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()
    return network.eval()


def held_out_confusion(classifier: DomainClassifier, *, seed: int = 0) -> dict[str, list[int]]:
    """Count the classes that held-out images are given.

    Parameters
    ----------
    classifier : DomainClassifier
        Judged on every domain that it knows.
    seed : int, default 0
        Source of the garbage, which is made from held-out images.

    Returns
    -------
    dict of str to list of int
        A row for each domain, for each domain turned grey (``NAME, grey``; the same counts where it is
        grey already) and for each kind of garbage (``none, KIND``); a number for each class.

    Examples
    --------
    >>> untrained = DomainClassifier(_network(3).eval(), ("faces", "galaxies", "none"))
    >>> sum(held_out_confusion(untrained)["faces"])
    50
    """
    names = classifier.classes[:-1]
    real = {name: _read(name, "heldout") for name in names}
    grey = {f"{name}, grey": to_channels(images, 1) for name, images in real.items()}
    rng = np.random.default_rng((seed, 1))
    garbage = none_images(real, each=HELD_OUT_EACH, rng=rng)
    sets = real | grey | {f"{NONE}, {kind}": images for kind, images in garbage.items()}
    return {
        row: np.bincount(
            classifier.probabilities(images).argmax(1), minlength=len(classifier.classes)
        ).tolist()
        for row, images in sets.items()
    }


def _accuracy(confusion: dict[str, list[int]], classes: tuple[str, ...]) -> dict[str, float]:
    """Share of each row of a confusion matrix that is called what it is."""
    return {
        row: round(counts[classes.index(row.split(",")[0])] / sum(counts), 4)
        for row, counts in confusion.items()
    }


def _sha256(name: str) -> str:
    path = project_root() / "data" / "domains" / f"{name}.npz"
    return hashlib.sha256(path.read_bytes()).hexdigest()


CARD = """---
license: mit
tags: [image-classification]
---

# Domain classifier

Tells the domains of images shipped here apart, and from garbage. Read it with
`ood_lib.classifier.load_classifier()`; made by `ood classifier train`.

| | |
|---|---|
| input | 32x32 pixels in [-1, 1], RGB; grey is repeated |
| network | five convolutions, widths {widths}, then the mean over pixels and one linear layer |
| parameters | {parameters:,} |
| trained on | the splits fit and train in `data/domains`, each domain as often as any other |
| training | {steps:,} batches of {batch}, seed {seed} |
| changes | small shifts, mirroring, contrast, casts and noise; half of the images in grey |

Shares of held-out images that are called what they are, in colour where they have any and in grey:

{domains}

Shares of garbage that is called none. Each kind is made from held-out images of every domain: draws of
the Gaussian fitted to their pixels, scrambled phases, white and smooth noise, blends of two domains.

{garbage}

The whole confusion matrix is in `record.json`.

**Use.** Shares of a domain among samples of a diffusion model; features for KID and PRDC.
**Limits.** It tells these domains from each other and from the garbage it was shown. A share counts
what resembles a domain more than it resembles garbage; it does not say how good an image is. Some
garbage cannot be told from a domain, nor by eye: land and its own scrambled phases, a blend of an
image with an almost black one, draws of a Gaussian fitted to few faces.
"""


def _card(record: dict) -> str:
    """Write out the model card from the record."""
    accuracy, names = record["accuracy"], record["classes"][:-1]
    domains = [f"| {n} | {accuracy[n]:.3f} | {accuracy[f'{n}, grey']:.3f} |" for n in names]
    garbage = [f"| {kind} | {accuracy[f'{NONE}, {kind}']:.3f} |" for kind in KINDS]
    return CARD.format_map(
        record
        | {
            "widths": ", ".join(map(str, WIDTHS)),
            "batch": EACH * (len(names) + 3),
            "domains": "\n".join(["| domain | as it is | grey |", "|---|---|---|", *domains]),
            "garbage": "\n".join(["| kind | none |", "|---|---|", *garbage]),
        }
    )


def train_classifier(out: Path, *, seed: int = 0, steps: int = 3000) -> Path:
    """Train the classifier on the shipped domains and judge it on their held-out images.

    Parameters
    ----------
    out : Path
        Folder for ``classifier.safetensors``, ``record.json`` and the card ``README.md``.
    seed : int, default 0
        Source of the initial weights, the batches and the garbage. The same seed gives the same
        weights on the same machine with as many threads.
    steps : int, default 3000
        Batches.

    Returns
    -------
    Path
        `out`.

    Raises
    ------
    ValueError
        If fewer than two domains are shipped or `steps` is under 1.

    Examples
    --------
    >>> train_classifier(Path("nowhere"), steps=0)
    Traceback (most recent call last):
    ValueError: steps is 0; use 1 or more
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; use 1 or more")
    started, names = time.perf_counter(), _names()
    seen = {name: _read(name, "fit", "train") for name in names}
    garbage = none_images(seen, each=TRAIN_EACH, rng=np.random.default_rng((seed, 0)))
    network = _fit(seen | {NONE: torch.cat(list(garbage.values()))}, seed, steps)
    classifier = DomainClassifier(network, (*names, NONE))
    confusion = held_out_confusion(classifier, seed=seed)
    record = {
        "classes": classifier.classes,
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in network.parameters()),
        "training_images": {name: len(images) for name, images in seen.items()},
        "data_sha256": {name: _sha256(name) for name in names},
        "accuracy": _accuracy(confusion, classifier.classes),
        "confusion": confusion,
        "torch": torch.__version__.split("+")[0],
        "wall_seconds": round(time.perf_counter() - started),
    }
    return _save(network, record, out)


def _save(network: nn.Module, record: dict, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: w.contiguous() for name, w in network.state_dict().items()}
    save_file(weights, out / "classifier.safetensors")
    write_json(out / "record.json", record)
    (out / "README.md").write_text(_card(record))
    return out


def load_classifier(folder: Path | None = None) -> DomainClassifier:
    """Read a trained classifier.

    Parameters
    ----------
    folder : Path, optional
        A folder written by `train_classifier`; ``data/classifier`` by default.

    Returns
    -------
    DomainClassifier
        Ready to judge.

    Raises
    ------
    ValueError
        If the folder holds no classifier, or part of one.

    Examples
    --------
    >>> load_classifier().classes[-1]
    'none'
    """
    folder = folder or project_root() / "data" / "classifier"
    if not (folder / "record.json").is_file():
        raise ValueError(f"{folder} has no record.json; make it by ood classifier train")
    classes = tuple(json.loads((folder / "record.json").read_text())["classes"])
    network = _network(len(classes))
    try:
        network.load_state_dict(load_file(folder / "classifier.safetensors"))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{folder} holds no whole classifier ({error}); make it by ood classifier train"
        ) from error
    return DomainClassifier(network.eval(), classes)
