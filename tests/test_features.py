"""Features of ImageNet: both runtimes alike, a real class recognised, a cache that can be trusted."""

import sys

import numpy as np
import pytest
import torch

from ood_lib import features
from ood_lib.domains import load_images, resize, to_channels
from ood_lib.features import imagenet

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def images():
    """Three images of each of four domains, in colour."""
    names = ("fashion", "galaxies", "textures", "faces")
    return torch.cat([to_channels(load_images(name, n=3), 3) for name in names])


@pytest.fixture(scope="module")
def root(tmp_path_factory, images):
    """Project folder of this module, so that its caches start empty."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("project")
        patch.setenv("OOD_ROOT", str(folder))
        yield folder


@pytest.fixture
def empty(root, tmp_path, monkeypatch):
    """The same, with no features stored yet; torch only, or the network would be converted anew."""
    monkeypatch.setenv("OOD_ROOT", str(tmp_path))
    return tmp_path / "runs" / "features"


@pytest.fixture
def refuse(monkeypatch):
    """Return a function that forbids to compute features from then on."""

    def fail(*_):
        raise AssertionError("computed again")

    return lambda: monkeypatch.setattr(features, "_compute", fail)


def test_both_runtimes_agree(root, images):
    fast, slow = imagenet(images, runtime="openvino"), imagenet(images, runtime="torch")
    assert fast.shape == slow.shape == (12, 1280)
    assert fast.dtype == slow.dtype == np.float32
    assert slow.min() == 0
    assert slow.max() > 1
    np.testing.assert_allclose(fast, slow, atol=TOLERANCE)


def test_a_cut_model_is_converted_again_and_a_whole_one_is_not(root, images, monkeypatch):
    before = imagenet(images)
    (blob,) = (root / "runs" / "openvino").iterdir()
    whole = blob.read_bytes()
    blob.write_bytes(whole[:100])
    features._compiled.cache_clear()
    np.testing.assert_allclose(features._compute(images, "openvino"), before, atol=TOLERANCE)
    assert len(blob.read_bytes()) > len(whole) // 2
    features._compiled.cache_clear()
    monkeypatch.setattr(features.import_openvino(), "convert_model", None)
    np.testing.assert_allclose(features._compute(images, "openvino"), before, atol=TOLERANCE)


@pytest.mark.parametrize("runtime", features.RUNTIMES)
def test_a_batch_is_its_images_one_by_one(root, images, runtime):
    single = [imagenet(images[i : i + 1], runtime=runtime) for i in (0, 5, 11)]
    batch = imagenet(images, runtime=runtime)
    np.testing.assert_allclose(np.concatenate(single), batch[[0, 5, 11]], atol=TOLERANCE)


def test_a_cat_is_a_cat(root):
    from skimage.data import chelsea

    photo = torch.from_numpy(chelsea().transpose(2, 0, 1)[None].copy()).float() / 255
    found = torch.from_numpy(imagenet(resize(photo, 224) * 2 - 1))
    with torch.inference_mode():
        label = features._network().network._fc(found).argmax().item()
    assert label in {281, 282, 285}  # tabby, tiger cat, Egyptian cat


def test_grey_is_repeated_and_values_beyond_the_range_are_clipped(empty, images):
    grey = to_channels(images[:2], 1)
    found = imagenet(grey, runtime="torch")
    np.testing.assert_allclose(found, imagenet(grey.repeat(1, 3, 1, 1), runtime="torch"), atol=1e-5)
    clipped = imagenet((3 * grey).clamp(-1, 1), runtime="torch")
    np.testing.assert_array_equal(imagenet(3 * grey, runtime="torch"), clipped)


def test_the_same_images_are_computed_once(empty, images, refuse):
    first = imagenet(images[:2], runtime="torch")
    refuse()
    np.testing.assert_array_equal(imagenet(images[:2].clone(), runtime="torch"), first)
    assert [path.suffix for path in empty.iterdir()] == [".npz"]
    for others in (images[1:3], images[:2].flip(0), images[:2] * 0.99):
        with pytest.raises(AssertionError, match="again"):
            imagenet(others, runtime="torch")


def test_another_runtime_or_other_weights_have_features_of_their_own(
    empty, images, refuse, monkeypatch
):
    imagenet(images[:1], runtime="torch")
    refuse()
    with pytest.raises(AssertionError, match="again"):
        imagenet(images[:1], runtime="openvino")
    monkeypatch.setattr(features, "_identity", lambda _: "other weights")
    with pytest.raises(AssertionError, match="again"):
        imagenet(images[:1], runtime="torch")


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "spoil", [flip_a_bit, lambda content: content[:200], lambda _: b"", lambda _: b"junk" * 99]
)
def test_broken_features_are_computed_again(empty, images, spoil):
    first = imagenet(images[:2], runtime="torch")
    (path,) = empty.iterdir()
    content = path.read_bytes()
    path.write_bytes(spoil(content))
    np.testing.assert_array_equal(imagenet(images[:2], runtime="torch"), first)
    with np.load(path) as archive:
        np.testing.assert_array_equal(archive["features"], first)


def test_stored_features_of_another_shape_are_computed_again(empty, images):
    first = imagenet(images[:2], runtime="torch")
    (path,) = empty.iterdir()
    np.savez(path, features=first[:1])
    np.testing.assert_array_equal(imagenet(images[:2], runtime="torch"), first)


def test_missing_packages_name_their_extra(empty, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    features._identity.cache_clear()
    with pytest.raises(ValueError, match=r"efficientnet_lite_pytorch.*ood_lib\[features\]"):
        imagenet(images[:1], runtime="torch")


def test_without_openvino_torch_takes_over(empty, images, refuse, monkeypatch):
    imagenet(images[:1], runtime="torch")
    monkeypatch.setitem(sys.modules, "openvino", None)
    refuse()
    imagenet(images[:1])
    with pytest.raises(ValueError, match=r"ood_lib\[fast\]"):
        imagenet(images[:1], runtime="openvino")


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (3, 32, 32), (1, 2, 32, 32)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="images have shape"):
        imagenet(torch.zeros(shape))


def test_nan_and_unknown_runtimes_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        imagenet(torch.full((1, 1, 32, 32), float("nan")))
    with pytest.raises(ValueError, match="onnx"):
        imagenet(torch.zeros(1, 1, 32, 32), runtime="onnx")


def test_the_network_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    features._network.cache_clear()
    features._network()
    assert torch.equal(torch.get_rng_state(), state)
