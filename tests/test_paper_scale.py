"""The paper's scale end to end: an AFHQ checkpoint of random weights, four images of 256x256, three calls."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference.adm_unet import ADMUNet
from typer.testing import CliRunner

from ood_lib import cli
from ood_lib.domains import load_images
from ood_lib.features import imagenet
from ood_lib.geometry import measure
from ood_lib.latents import LatentSpec, get
from ood_lib.models import load_model
from ood_lib.priors import make_prior
from ood_lib.sampling import Recipe, ReferenceSet, sample, twin

pytestmark = pytest.mark.slow
SIDE, IMAGES, POINTS = 256, 4, 4


def ood(*words):
    result = CliRunner().invoke(cli.app, [str(x) for x in words])
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoint in the layout of `afhqdog_p2.pt`, converted, and a folder of pictures."""
    root = tmp_path_factory.mktemp("paper")
    torch.manual_seed(0)
    torch.save(ADMUNet().state_dict(), root / "afhqdog_p2.pt")
    ood("convert", root / "afhqdog_p2.pt", root / "dog")
    (root / "afhqdog_p2.pt").unlink()
    (root / "pictures").mkdir()
    few = np.random.default_rng(0).integers(0, 255, (IMAGES, 4, 4, 3), dtype=np.uint8)
    for k, colours in enumerate(few):
        picture = Image.fromarray(colours).resize((300, SIDE), Image.Resampling.BICUBIC)
        picture.save(root / "pictures" / f"{k}.png")
    return root


def test_the_paper_s_scale_runs_from_a_checkpoint_to_new_images(folder, project):
    model, pictures = load_model(str(folder / "dog")), str(folder / "pictures")
    assert model.sample_shape == (3, SIDE, SIDE)
    assert model.family == "iddpm"
    ood("invert", folder / "dog", pictures, "--preset", "paper", "--points", POINTS)
    found = get(LatentSpec(model.name, pictures, preset="paper", points=POINTS), model=model)
    assert found.latent.shape == (IMAGES, 3, SIDE, SIDE)
    assert (found.nfe, found.timesteps[-1]) == (POINTS - 1, 900)
    flat = found.latent.flatten(1).double().numpy()
    assert np.isfinite(flat).all()
    assert measure(flat).norm.n == IMAGES
    drawn = make_prior("recombination").fit(flat).sample(2, np.random.default_rng(0))
    assert drawn.shape == (2, 3 * SIDE**2)
    images = load_images(pictures, like=model)
    known = ReferenceSet("pictures", found.latent, found.timesteps, images, images, "ddim")
    made = sample(model, known, Recipe("replay"), n=1, rng=np.random.default_rng(0))
    assert made.nfe == POINTS - 1
    assert torch.isfinite(made.images).all()
    assert made.images.abs().max() <= 1
    again = twin(known, Recipe("replay"), n=1, rng=np.random.default_rng(0))
    assert float((images - again).abs().amax((1, 2, 3)).min()) < 1e-5  # a replay is one of them
    assert imagenet(images).shape[0] == IMAGES
