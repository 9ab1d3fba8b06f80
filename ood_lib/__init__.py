"""Frozen diffusion models on images they never saw: inversion, statistics at d >> n, latent priors."""

from ood_lib.domains import load_images
from ood_lib.inversion import generate, invert, roundtrip
from ood_lib.models import load_model

__all__ = ["generate", "invert", "load_images", "load_model", "roundtrip"]
