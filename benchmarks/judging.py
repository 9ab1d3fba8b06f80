"""What the draws of a sampler are compared with: references of a domain, and held-out images."""

import numpy as np
import torch

from ood_lib.classifier import load_classifier
from ood_lib.domains import open_images
from ood_lib.features import imagenet
from ood_lib.metrics import jackknife, kid, nearest_ratio, ratio_of_shares
from ood_lib.models import FrozenModel
from ood_lib.sampling import ReferenceSet, references


def known_of(
    model: FrozenModel, domain: str, sigma: float | None, n: int, points: int | None = None
) -> ReferenceSet:
    """Get `n` references at a level, or as many as there are."""
    n = min(n, len(open_images(domain, like=model)))
    return references(model, domain, sigma=sigma, n=n, points=points)


class Judge:
    """Compares images with the references and the held-out images of a domain, in ImageNet features."""

    def __init__(self, domain: str, known: ReferenceSet) -> None:
        self.domain, self.classifier = domain, load_classifier()
        self.fit, self.real = imagenet(known.images), imagenet(known.heldout)
        self.hits = self.classifier.is_domain(known.heldout, domain)
        self.floor = kid(self.fit, self.real)

    def ratio(self, x: np.ndarray) -> np.ndarray:
        """Nearest-neighbour ratio of each image of features `x`."""
        return nearest_ratio(x, self.fit, self.real)

    def distance(self, x: np.ndarray) -> dict[str, float]:
        """KID to the held-out images with its 95 % interval, not below that of the references."""
        spread = jackknife(lambda a, b: kid(x[a], self.real[b]), len(x), len(self.real))
        return {
            "kid": max(spread.value, self.floor),
            "kid_low": spread.low,
            "kid_high": spread.high,
            "kid_floor": self.floor,
        }

    def likeness(self, images: torch.Tensor, ratio: np.ndarray) -> dict[str, float]:
        """Target share over that of held-out images, and the median nearest-neighbour ratio."""
        share = ratio_of_shares(self.classifier.is_domain(images, self.domain), self.hits)
        return {"share": share.value, "novelty": float(np.median(ratio))}
