"""The study: which cells it has, and that its controls are what they say."""

import numpy as np
import pytest
import torch

from ood_lib import study
from ood_lib.models import load_model, model_names, zero_model


@pytest.fixture
def like():
    """Latents whose law is not isotropic."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 1, 16, 16, generator=generator) * torch.linspace(0.5, 2, 16) + 1


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_five_domains_that_it_never_saw(name):
    model = load_model(name)
    unseen = study.unseen_domains(model)
    assert len(set(unseen)) == 5
    assert study.own_domain(name) not in unseen


def test_an_unknown_way_or_table_is_named():
    with pytest.raises(ValueError, match=r"'soon'.*level0, noise, paper, t900"):
        study.cell(None, "digits", "soon")
    with pytest.raises(ValueError, match=r"'beauty'.*gaussianity"):
        study.table_path("beauty")


def test_the_zero_network_gives_its_noise_back(fashion):
    noise, of_states, of_images = study.regenerated(zero_model(fashion), 3)
    assert (noise - of_states).abs().max() < 1e-9
    assert (noise - of_images).square().mean() > 0.1  # far outside [-1, 1], so the clipping shows


def test_generated_noise_depends_on_the_seed_alone(fashion):
    zero = zero_model(fashion)
    first = study.regenerated(zero, 2, seed=4)[0]
    assert torch.equal(first, study.regenerated(zero, 4, seed=4)[0][:2])
    assert not torch.equal(first, study.regenerated(zero, 2, seed=5)[0])


def test_synthetic_latents_have_the_laws_that_they_are_named_after(like):
    made = {x.domain: x.values.flatten(1).numpy() for x in study.drawn(like)}
    d = like[0].numel()
    norms = {name: np.linalg.norm(values, axis=1) / np.sqrt(d) for name, values in made.items()}
    assert np.allclose(norms["shell"], 1)
    large = norms["scales"] > 1
    assert norms["scales"][large].mean() == pytest.approx(1.1, abs=0.03)
    assert norms["scales"][~large].mean() == pytest.approx(0.9, abs=0.03)
    first, second = made["clusters"][0], made["clusters"]
    apart = np.linalg.norm(second - first, axis=1) ** 2 - 2 * d
    assert (np.abs(apart) < 400).any()
    assert (np.abs(apart - 900) < 400).any()
    assert np.allclose(made["fitted"].mean(0), like.flatten(1).numpy().mean(0), atol=1.5)


def test_forward_noise_keeps_its_share_of_the_image(fashion, monkeypatch):
    images = torch.rand(50, *fashion.sample_shape) * 2 - 1
    kept = study.LatentSet(images, images, None, np.array([0.0]), 0, "ab2", "current")
    monkeypatch.setattr(study, "cell", lambda *_, **__: kept)
    for sample in study.without_network(fashion, ["digits"]):
        share = float(fashion.schedule.alpha_bar_at(sample.t))
        slope = (sample.values * images).sum() / images.square().sum()
        assert slope == pytest.approx(share**0.5, abs=0.02)


def test_a_distance_that_is_all_norm_leaves_nothing():
    rng = np.random.default_rng(0)
    flat = np.diag(rng.uniform(1, 2, 30))
    assert study._left(flat) < 1e-12
    clustered = rng.standard_normal((30, 2000)) * 0.1
    clustered[:15, 0] += 5
    clustered[15:, 1] += 5
    assert study._left(clustered) > 0.3


def test_rows_carry_the_names_of_their_cell(like):
    sample = study.Sample("trained", "digits", "noise", 300.0, like)
    assert sample.family == "F1"
    assert sample.labels == {"network": "trained", "domain": "digits", "way": "noise", "t": 300.0}
    rows = study._measured(like.flatten(1).double().numpy(), like.flatten(1).double().numpy() + 1)
    assert set(rows.name) >= {"norm", "distance", "vertex_angle", "across", "left"}
    vertex = rows.set_index("name").loc["across", "value"]
    assert 30 < vertex < 90


def test_the_difference_of_latents_is_relative_and_leaves_the_means_out(like):
    assert study._difference(like, like) == {"difference": 0, "means": 0}
    moved = study._difference(like, like + 1)
    assert moved["difference"] == pytest.approx(0, abs=1e-6)
    spread = float((like - like.mean(0)).square().mean().sqrt())
    assert moved["means"] == pytest.approx(1 / spread, rel=1e-5)
    assert study._difference(like, -like)["difference"] == pytest.approx(2, rel=1e-5)


def test_the_affine_share_is_one_for_a_filter_and_none_for_a_fold():
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(20, 3, 12, 12, generator=rng)
    kernel = torch.randn(3, 3, 5, 5, generator=rng)
    filtered = torch.nn.functional.conv2d(images, kernel, padding=2) + images[0]
    assert study.affine_share(images, filtered) == pytest.approx(1, abs=1e-6)
    assert abs(study.affine_share(images, images.abs(), width=3)) < 0.1


def test_the_affine_share_counts_what_noise_leaves():
    rng = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 40, 1, 16, 16, generator=rng)
    assert study.affine_share(images, images + noise, width=3) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (4, 1, 8, 9)])
def test_the_affine_share_needs_pairs(shape):
    with pytest.raises(ValueError, match="4 or more"):
        study.affine_share(torch.zeros(shape), torch.zeros(shape[0], 1, 8, 8))
