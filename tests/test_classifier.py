"""The domain classifier: the committed one keeps its record, training is seeded, garbage is garbage."""

import hashlib
import json

import numpy as np
import pytest
import torch

from ood_lib import classifier as module
from ood_lib.classifier import (
    KINDS,
    NONE,
    UNSEEN,
    held_out_confusion,
    load_classifier,
    none_images,
    recall_of_none,
    train_classifier,
    unseen_garbage,
)
from ood_lib.domains import domain_names, load_images, to_channels

# Written before the committed classifier was trained.
LEAST_DOMAIN, LEAST_GREY, LEAST_NONE = 0.9, 0.75, 0.75


@pytest.fixture(scope="module")
def committed():
    """The classifier in data/classifier."""
    return load_classifier()


@pytest.fixture(scope="module")
def record(root):
    return json.loads((root / "data" / "classifier" / "record.json").read_text())


def test_the_record_is_that_of_the_files_here(root, record):
    assert record["classes"] == [*domain_names(), NONE]
    for name, sha256 in record["data_sha256"].items():
        content = (root / "data" / "domains" / f"{name}.npz").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sha256, f"{name} changed: train again"
    assert (root / "data" / "classifier" / "classifier.safetensors").stat().st_size < 1e6


def test_held_out_counts_are_those_of_the_record(committed, record):
    found = held_out_confusion(committed, seed=record["seed"])
    assert found.keys() == record["confusion"].keys()
    for row, counts in found.items():  # rounding of another processor may turn an image in doubt
        assert np.abs(np.subtract(counts, record["confusion"][row])).sum() <= 4, row


def test_accuracies_follow_from_the_counts_and_reach_what_was_asked(record):
    for row, counts in record["confusion"].items():
        truth = record["classes"].index(row.split(",")[0])
        accuracy = counts[truth] / sum(counts)
        assert record["accuracy"][row] == pytest.approx(accuracy, abs=1e-4)
        least = LEAST_GREY if row.endswith("grey") else LEAST_DOMAIN
        assert accuracy >= (LEAST_NONE if row.startswith(NONE) else least), row


def test_fresh_noise_is_none(committed):
    rng = torch.Generator().manual_seed(7)
    for channels in (1, 3):
        noise = torch.randn(200, channels, 32, 32, generator=rng)
        assert committed.share(noise, NONE).value > 0.95
        assert committed.share(0.3 * noise, NONE).value > 0.95


def test_a_grey_image_and_the_same_in_three_channels_are_one(committed):
    grey = load_images("digits", split="heldout", n=30)
    np.testing.assert_array_equal(
        committed.probabilities(grey), committed.probabilities(to_channels(grey, 3))
    )
    np.testing.assert_array_equal(
        committed.features(grey), committed.features(grey.repeat(1, 3, 1, 1))
    )


def test_probabilities_features_and_booleans_belong_together(committed):
    images = load_images("galaxies", split="heldout", n=20)
    found, features = committed.probabilities(images), committed.features(images)
    assert found.shape == (20, len(committed.classes))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    with torch.inference_mode():
        again = committed.network.head(torch.from_numpy(features)).softmax(1)
    np.testing.assert_allclose(found, again, atol=1e-5)
    for i, name in enumerate(committed.classes):
        np.testing.assert_array_equal(committed.is_domain(images, name), found.argmax(1) == i)
    share = committed.share(images, "galaxies")
    assert share.low < share.value == committed.is_domain(images, "galaxies").mean()
    np.testing.assert_allclose(committed.probabilities(images[3:4]), found[3:4], atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 2, 32, 32), (3, 32, 32)])
def test_other_shapes_are_refused(committed, shape):
    with pytest.raises(ValueError, match=r"\(N, 3, 32, 32\)") as error:
        committed.probabilities(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_unknown_classes_and_empty_folders_are_refused(committed, tmp_path):
    with pytest.raises(ValueError, match="moon"):
        committed.is_domain(torch.zeros(1, 1, 32, 32), "moon")
    with pytest.raises(ValueError, match="ood classifier train"):
        load_classifier(tmp_path)


@pytest.fixture
def two(project, monkeypatch):
    """Project with two shipped domains and little garbage."""
    rng = np.random.default_rng(0)
    split = np.repeat(["fit", "heldout", "train"], 8)
    bright = rng.integers(128, 256, (24, 32, 32, 3), dtype=np.uint8)
    np.savez(project / "data" / "domains" / "bright.npz", images=bright, split=split)
    monkeypatch.setattr(module, "TRAIN_EACH", 8)
    monkeypatch.setattr(module, "HELD_OUT_EACH", 4)
    return project


def files(folder):
    record = json.loads((folder / "record.json").read_text())
    del record["wall_seconds"]
    return (folder / "classifier.safetensors").read_bytes(), record


def test_training_is_seeded_and_leaves_the_random_state_alone(two):
    state = torch.get_rng_state()
    first, again, other = (
        files(train_classifier(two / f"{i}", seed=seed, steps=3))
        for i, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first[0] != other[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert load_classifier(two / "0").classes == ("bright", "faces", NONE)


def test_the_record_counts_every_held_out_image(two):
    _, record = files(train_classifier(two / "made", steps=1))
    assert record["training_images"] == {"bright": 16, "faces": 50}
    totals = {row: sum(counts) for row, counts in record["confusion"].items()}
    real = {"bright": 8, "faces": 50}
    assert totals == real | {f"{name}, grey": n for name, n in real.items()} | {
        f"{NONE}, {kind}": 8 for kind in KINDS
    }
    assert all(name in (two / "made" / "README.md").read_text() for name in (*real, *KINDS))


def test_training_takes_fit_and_train_and_not_what_it_is_judged_on(two):
    path = two / "data" / "domains" / "bright.npz"
    before = files(train_classifier(two / "a", steps=2))
    with np.load(path) as archive:
        images, split = archive["images"], archive["split"]
    for part, same in (("heldout", True), ("train", False), ("fit", False)):
        chosen = (split == part)[:, None, None, None]
        np.savez(path, images=np.where(chosen, 255 - images, images), split=split)
        assert (files(train_classifier(two / "b", steps=2))[0] == before[0]) is same, part


def test_one_domain_or_no_step_is_refused(project):
    with pytest.raises(ValueError, match="two domains"):
        train_classifier(project / "made", steps=1)
    with pytest.raises(ValueError, match="steps is 0"):
        train_classifier(project / "made", steps=0)


@pytest.fixture(scope="module")
def domains():
    """Two laws of faint noise, one dark and one bright, so that no garbage is clipped."""
    rng = torch.Generator().manual_seed(0)
    return {m: m + 0.05 * torch.randn(40, 3, 32, 32, generator=rng) for m in (-0.4, 0.4)}


def test_garbage_keeps_of_its_domain_what_it_should(domains):
    made = none_images(domains, each=200, rng=np.random.default_rng(0))
    assert made.keys() == set(KINDS)
    assert {x.shape for x in made.values()} == {(400, 3, 32, 32)}
    for kind in ("gaussian", "phase"):
        np.testing.assert_allclose(made[kind][:200].mean(), -0.4, atol=0.02)
        np.testing.assert_allclose(made[kind][200:].mean(), 0.4, atol=0.02)
    draws, truth = made["gaussian"][:200].flatten(1), domains[-0.4].flatten(1)
    error = truth.std() / np.sqrt(40)
    assert (draws.mean(0) - truth.mean(0)).abs().max() < 6 * error / np.sqrt(5)
    assert float(draws.var(0).mean()) == pytest.approx(float(truth.var(0).mean()), rel=0.05)
    assert made["overlay"].mean((1, 2, 3)).abs().max() < 0.15  # both a bright and a dark image
    assert made["overlay"].mean((1, 2, 3)).std() > 0.02


def test_scrambled_phases_keep_the_amplitudes_and_turn_grey_into_grey(domains):
    images = domains[0.4].numpy()
    made = module._scrambled(images, np.random.default_rng(0))
    amplitude, truth = (np.abs(np.fft.fft2(x)) for x in (made, images))
    np.testing.assert_allclose(amplitude, truth, atol=1e-4)
    assert np.abs(made - images).max() > 0.05
    grey = module._scrambled(images[:, :1].repeat(3, 1), np.random.default_rng(0))
    np.testing.assert_allclose(grey[:, 0], grey[:, 2], atol=1e-9)


def test_white_noise_has_no_neighbours_and_smooth_noise_has(domains):
    made = none_images(domains, each=50, rng=np.random.default_rng(0))

    def likeness(x):
        centred = (x - x.mean((2, 3), keepdim=True))[..., 1:-1]
        ahead = (x - x.mean((2, 3), keepdim=True))[..., 2:]
        return ((centred * ahead).mean() / centred.square().mean()).item()

    assert abs(likeness(made["white"])) < 0.05
    assert likeness(made["smooth"]) > 0.7
    for kind in ("white", "smooth"):
        spread = made[kind].std(1).mean((1, 2))
        assert spread[::2].max() < 1e-6 < spread[1::2].min()


def test_shifts_reflect_and_small_changes_stay_small():
    ramp = torch.arange(32.0).expand(1, 3, 32, 32) / 16 - 1
    moved = module._shifted(ramp.repeat(50, 1, 1, 1), 2, torch.Generator().manual_seed(0))
    gaps = (moved - ramp)[..., 3:-3].mean((1, 2, 3)) * 16
    assert set(gaps.round().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert (moved - ramp).abs().max() <= 4 / 16  # nothing but the image itself comes in
    images = load_images("relief", n=100)
    upright = torch.zeros(100, dtype=torch.bool)
    made = module._augmented(images, upright, torch.Generator().manual_seed(0))
    assert -1 <= made.min() < made.max() <= 1
    grey = (made.std(1).amax((1, 2)) < 1e-6).float().mean()
    assert 0.35 < grey < 0.65


def test_only_images_that_may_be_mirrored_are():
    images = torch.zeros(60, 3, 32, 32)
    images[..., :16] = 0.8
    mirror = torch.arange(60) < 30
    made = module._augmented(images, mirror, torch.Generator().manual_seed(0)).mean((1, 2))
    turned = made[:, 20:].mean(1) > made[:, :12].mean(1)
    assert 5 < turned[:30].sum() < 25
    assert not turned[30:].any()


def test_half_a_classifier_is_refused(root, tmp_path):
    for name in ("record.json", "classifier.safetensors"):
        (tmp_path / name).write_bytes((root / "data/classifier" / name).read_bytes())
    (tmp_path / "classifier.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="holds no whole classifier"):
        load_classifier(tmp_path)
    (tmp_path / "classifier.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no whole classifier"):
        load_classifier(tmp_path)


@pytest.fixture(scope="module")
def unseen(domains):
    return unseen_garbage(domains, each=30, rng=np.random.default_rng(0))


def test_unseen_garbage_is_of_other_kinds_than_the_training(domains, unseen):
    assert tuple(unseen) == UNSEEN
    assert not set(UNSEEN) & set(KINDS)
    assert {x.shape for x in unseen.values()} == {(60, 3, 32, 32)}
    assert all(-1 <= x.min() < x.max() <= 1 for x in unseen.values())
    again = unseen_garbage(domains, each=30, rng=np.random.default_rng(0))
    assert all(torch.equal(unseen[kind], again[kind]) for kind in UNSEEN)


def test_unseen_garbage_is_what_its_name_says(domains, unseen):
    for kind in ("rows", "warped"):  # pixels of one domain each, in the order of the domains
        np.testing.assert_allclose(unseen[kind][:30].mean(), -0.4, atol=0.02)
        np.testing.assert_allclose(unseen[kind][30:].mean(), 0.4, atol=0.02)
    lost = (unseen["pepper"].abs() == 1).all(1).float().mean().item()
    assert lost == pytest.approx(0.4, abs=0.01)
    assert unseen["flat"].std((2, 3)).max() < 1e-6
    assert unseen["gratings"].std(1).max() < 1e-6
    power = (
        np.abs(np.fft.fft2(unseen["gratings"][:, 0].numpy() * np.outer(*[np.hanning(32)] * 2))) ** 2
    )
    peak = np.sort(power.reshape(60, -1), axis=1)[:, -20:].sum(1) / power.sum((1, 2))
    assert np.median(peak) > 0.9  # one wave
    strips = unseen["woven"].mean(1).unflatten(2, (8, 4)).mean((1, 3))
    for first, sign in ((0, -1), (1, 1)):
        assert (sign * strips[:30, first::2]).min() > 0.3


def test_rolled_rows_keep_their_pixels_and_lose_their_order():
    images = load_images("digits", n=20).repeat(1, 3, 1, 1).numpy()
    made = module._rolled(images, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(made, axis=3), np.sort(images, axis=3))
    np.testing.assert_array_equal(made[:, 0], made[:, 2])
    assert np.abs(made - images).max() == pytest.approx(2, abs=0.1)


def test_warps_take_neighbours_along_and_reflect_at_the_border():
    ramp = np.broadcast_to(np.arange(32.0), (40, 3, 32, 32))
    made = module._warped(ramp, np.random.default_rng(0))
    assert set(np.unique(made)) <= set(range(32))
    inner = made[:, :, 12:20, 12:20] - ramp[:, :, 12:20, 12:20]
    assert 4 < inner.std() < 8
    assert np.median(np.abs(np.diff(made, axis=2))) <= 3


@pytest.mark.parametrize("channels", [1, 3])
def test_recall_of_none_counts_what_the_classifier_calls_none(committed, channels):
    found = recall_of_none(committed, channels=channels, each=5, seed=3)
    real = {name: module._read(name, "heldout") for name in domain_names()}
    garbage = unseen_garbage(real, each=5, rng=np.random.default_rng((3, 2)))
    assert tuple(found) == UNSEEN
    for kind, images in garbage.items():
        called = committed.probabilities(to_channels(images, channels)).argmax(1)
        none = committed.classes.index(NONE)
        assert found[kind].value == pytest.approx((called == none).mean()), kind
        assert found[kind].low <= found[kind].value <= found[kind].high
    with pytest.raises(ValueError, match="channels"):
        recall_of_none(committed, channels=2, each=1)
