"""Latents on disk: written once, complete, and refused when anything about them is not as it should be."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ood_lib import latents
from ood_lib.domains import load_images
from ood_lib.inversion import invert
from ood_lib.latents import LatentSpec, path_of
from ood_lib.models import FrozenModel, load_model, random_model, zero_model
from ood_lib.schedule import uniform_log_sigma


@pytest.fixture
def spec(project, picture_folder):
    """Six pictures under the tiny model, three points."""
    return LatentSpec("tiny", str(picture_folder), points=3, t_end=700.0)


@pytest.fixture
def inversions(monkeypatch):
    """List that grows by one with every inversion."""
    done = []

    def counted(*args, **kwargs):
        done.append(kwargs)
        return invert(*args, **kwargs)

    monkeypatch.setattr(latents, "invert", counted)
    return done


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_the_latents_are_those_of_invert(spec, tiny):
    images = load_images(spec.domain, like=tiny)
    grid = uniform_log_sigma(tiny.schedule, 3, t_end=700)
    expected = invert(tiny, images, timesteps=grid)
    made = latents.get(spec)
    assert torch.equal(made.latent, expected.latent.float())
    assert torch.equal(made.images, images)
    assert (made.nfe, made.spec, made.timesteps.tolist()) == (expected.nfe, spec, grid.tolist())


def test_a_second_call_reads_what_the_first_wrote(spec, inversions):
    first, second = latents.get(spec), latents.get(spec)
    assert len(inversions) == 1
    assert torch.equal(first.latent, second.latent)
    assert np.array_equal(first.timesteps, second.timesteps)
    assert (first.nfe, first.spec) == (second.nfe, second.spec)


def test_the_model_may_be_passed_in(spec, inversions):
    latents.get(spec)
    latents.get(spec, model=load_model("tiny"))
    assert len(inversions) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"n": 4},
        {"points": 4},
        {"t_end": 900.0},
        {"solver": "heun"},
        {"start": "sigma0"},
        {"start": "noise"},
        {"seed": 1},
        {"split": "all"},
    ],
    ids=str,
)
def test_every_part_of_a_specification_has_its_own_file(spec, change):
    assert path_of(LatentSpec(**{**asdict(spec), **change})) != path_of(spec)


def test_equal_levels_share_a_file_however_they_are_written():
    whole, fractional = (LatentSpec("tiny", "faces", t_end=t) for t in (999, 999.0))
    assert path_of(whole) == path_of(fractional)


def test_folders_of_one_name_do_not_share_a_file(project):
    assert path_of(LatentSpec("tiny", "a/pictures")) != path_of(LatentSpec("tiny", "b/pictures"))
    assert path_of(LatentSpec("a/tiny", "faces")) != path_of(LatentSpec("b/tiny", "faces"))


def test_the_metadata_say_everything_that_the_latents_depend_on(spec):
    latents.get(spec)
    found = metadata_of(path_of(spec))
    assert json.loads(found["spec"]) == asdict(spec)
    grid = json.loads(found["timesteps"])
    assert (len(grid), grid[0], grid[-1], found["nfe"]) == (3, 0, 700, "2")
    assert all(len(found[f"{part}_sha256"]) == 64 for part in ("model", "images"))
    assert len(found["checksum"]) == 64
    assert "float64" in found["precision"]
    assert load_file(path_of(spec))["latent"].dtype == torch.float32


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_comes_from_the_seed(spec, seed):
    noisy = LatentSpec(**{**asdict(spec), "start": "noise", "seed": seed})
    first = latents.get(noisy).latent
    path_of(noisy).unlink()
    assert torch.equal(first, latents.get(noisy).latent)
    other = LatentSpec(**{**asdict(noisy), "seed": seed + 1})
    assert not torch.equal(first, latents.get(other).latent)


# damage


def test_an_interrupted_write_leaves_no_file_behind_that_could_be_read(spec, monkeypatch):
    def die_half_way(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(latents, "save_file", die_half_way)
        with pytest.raises(KeyboardInterrupt):
            latents.get(spec)
    assert not path_of(spec).exists()
    assert len(latents.get(spec).latent) == 6
    assert [p.name for p in path_of(spec).parent.iterdir()] == [path_of(spec).name]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1], ids=str)
def test_a_cut_file_is_named(spec, keep):
    latents.get(spec)
    path = path_of(spec)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=path.name):
        latents.get(spec)


def test_a_flipped_bit_anywhere_is_found(spec, tiny):
    """Also in the metadata: the grid and the calls are part of what a latent is."""
    latents.get(spec, model=tiny)
    path = path_of(spec)
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 80).astype(int):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=path.name):
            latents.get(spec, model=tiny)


@pytest.mark.parametrize(("key", "value"), [("timesteps", "[0.0, 1.0, 2.0]"), ("nfe", "7")])
def test_a_false_grid_or_count_is_found(spec, key, value):
    latents.get(spec)
    path = path_of(spec)
    save_file(load_file(path), path, metadata={**metadata_of(path), key: value})
    with pytest.raises(ValueError, match=path.name):
        latents.get(spec)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["no metadata", "others"])
def test_a_file_of_somebody_else_is_named(spec, metadata):
    latents.get(spec)
    path = path_of(spec)
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match=path.name):
        latents.get(spec)


@pytest.mark.parametrize("key", ["checksum", "timesteps", "nfe", "model_sha256", "spec"])
def test_lacking_metadata_are_named(spec, key):
    latents.get(spec)
    path = path_of(spec)
    rest = {k: v for k, v in metadata_of(path).items() if k != key}
    save_file(load_file(path), path, metadata=rest)
    with pytest.raises(ValueError, match=path.name):
        latents.get(spec)


def test_a_file_of_other_weights_is_refused(spec, tiny):
    latents.get(spec)
    with pytest.raises(ValueError, match="model"):
        latents.get(spec, model=random_model(tiny, seed=9))


def test_a_file_of_another_model_without_weights_is_refused(spec, tiny):
    """The zero model and a model in closed form have no network, but they are not the same model."""
    latents.get(spec, model=zero_model(tiny))
    other = FrozenModel(
        "one", "analytic", tiny.schedule, tiny.sample_shape, lambda x, t: torch.ones_like(x)
    )
    with pytest.raises(ValueError, match="model"):
        latents.get(spec, model=other)


def test_a_file_of_other_images_is_refused(spec, picture_folder):
    latents.get(spec)
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(picture_folder / "0.png")
    with pytest.raises(ValueError, match="images"):
        latents.get(spec)


def test_a_file_of_another_setting_is_refused(spec):
    latents.get(spec)
    other = LatentSpec(**{**asdict(spec), "points": 4})
    shutil.copy(path_of(spec), path_of(other))
    with pytest.raises(ValueError, match="spec"):
        latents.get(other)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": "nope"}, "known are tiny"),
        ({"domain": "nope"}, "known are faces"),
        ({"solver": "euler"}, "ddim, heun, ab2"),
        ({"start": "zero"}, "level0, sigma0, noise"),
        ({"points": 1}, "n >= 2"),
        ({"t_end": 1000.0}, "999"),
        ({"n": 7}, "7 images"),
        ({"n": 0}, "0 images"),
    ],
    ids=str,
)
def test_a_wrong_specification_is_named_and_leaves_nothing(project, spec, change, text):
    with pytest.raises(ValueError, match=text):
        latents.get(LatentSpec(**{**asdict(spec), **change}))
    assert not list(project.rglob("*.safetensors*"))
