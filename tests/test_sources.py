"""Building the sets from their packages, and splits that share nothing."""

import gzip
import hashlib
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from ood_lib import sources
from ood_lib.domains import domain_names
from ood_lib.sources import build_domain, map_roles, train_images, trainable

MAPS = ["earth", "relief"]


def shipped(root, name):
    with np.load(root / f"data/domains/{name}.npz") as archive:
        return dict(archive)


def hashes(images):
    return np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in images])


# splits share nothing


@pytest.mark.parametrize("name", domain_names())
def test_no_image_is_in_two_splits(root, name):
    data = shipped(root, name)
    digest = hashes(data["images"])
    splits = [set(digest[data["split"] == s]) for s in np.unique(data["split"])]
    assert len(set.union(*splits)) == sum(map(len, splits))


@pytest.mark.parametrize("name", ["earth", "emoji", "relief"])
def test_splits_share_no_origin(root, name):
    data = shipped(root, name)
    origins = [set(data["origin"][data["split"] == s]) for s in np.unique(data["split"])]
    assert len(set.union(*origins)) == sum(map(len, origins))


def test_no_picture_is_in_two_domains(root):
    digests = [set(hashes(shipped(root, name)["images"])) for name in domain_names()]
    assert len(set.union(*digests)) == sum(map(len, digests))


def places(root, name):
    data = shipped(root, name)
    return np.array([place.split(",") for place in data["origin"]], int), data["split"]


@pytest.mark.parametrize("name", MAPS)
def test_crops_of_a_map_do_not_overlap_and_lie_where_their_split_says(root, name):
    place, split = places(root, name)
    assert len(np.unique(place, axis=0)) == len(place)  # tiles of one grid: other place, no overlap
    assert (map_roles()[tuple(place.T)] == split).all()


def test_no_earth_crop_lies_where_relief_trained(root):
    place, _ = places(root, "earth")
    assert (map_roles()[tuple(place.T)] != "train").all()


def test_regions_of_the_map_have_one_role_each():
    roles = map_roles()
    for row in range(0, 84, 6):
        for column in range(0, 168, 6):
            assert len(np.unique(roles[row : row + 6, column : column + 6])) == 1
    assert 0.65 < (roles == "train").mean() < 0.75


def test_relief_trains_on_tiles_of_its_own_role_only():
    groups = sources._relief_groups(sources.Path("."))
    place = np.array([p.split(",") for p in groups["train"].origin], int)
    assert (map_roles()[tuple(place.T)] == "train").all()
    train = set(hashes(groups["train"].images))
    assert not train & set(hashes(np.concatenate([groups[s].images for s in ("fit", "heldout")])))


@pytest.mark.parametrize(
    ("stem", "glyph"),
    [
        ("1f44d-1f3fd", "1f44d"),
        ("2764-fe0f", "2764"),
        ("1f468-1f3fb-200d-1f680", "1f9d1-1f680"),
        ("1f6b4-1f3ff-200d-2640-fe0f", "1f6b4"),
        ("1f1e9-1f1ea", "1f1e9-1f1ea"),
        ("1f46d-1f3fb", "1f9d1-1f91d-1f9d1"),
        ("1f469-1f3fb-200d-1f91d-200d-1f468-1f3ff", "1f9d1-1f91d-1f9d1"),
        ("1f491", "1f9d1-2764-1f9d1"),
        ("1f469-200d-2764-fe0f-200d-1f48b-200d-1f468", "1f9d1-2764-1f48b-1f9d1"),
        ("1faf1-1f3fb-200d-1faf2-1f3ff", "1f91d"),
        ("1f478-1f3fd", "1fac5"),
        ("1f467", "1f9d2"),
    ],
)
def test_variants_of_an_emoji_share_a_base_glyph(stem, glyph):
    assert sources._glyph(stem) == glyph


def emoji_folder(folder):
    folder.mkdir()
    for code in range(0x1F400, 0x1F450):
        for tone in ("", "-1f3fb", "-1f3ff"):
            picture = Image.new(
                "RGBA", (64, 64), (code % 256, len(tone), ord((tone or "x")[-1]), 255)
            )
            picture.putpixel((0, 0), (0, 0, 0, 0))
            picture.save(folder / f"{code:x}{tone}.png")
    return folder


def test_emoji_are_split_by_base_glyph_and_laid_on_white(tmp_path, project):
    groups = sources._emoji_groups(emoji_folder(tmp_path / "png"))
    glyphs = [set(group.origin) for group in groups.values()]
    assert len(set.union(*glyphs)) == sum(map(len, glyphs)) == 80
    assert sum(len(group.images) for group in groups.values()) == 240
    assert all((group.images[:, 0, 0] == 255).all() for group in groups.values())
    train = train_images("emoji", source=tmp_path / "png")
    assert train.shape == (len(groups["train"].images), 32, 32, 3)


def test_an_emoji_folder_without_pictures_is_named(tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"none holds no emoji.*img/google/64"):
        build_domain("emoji", source=tmp_path / "none", out=tmp_path)


def animal_file(folder, content):
    path = folder / "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(content))
    return folder


def test_animals_come_out_of_a_pickle_of_arrays_once_each(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (900, 28, 28), dtype=np.uint8)
    twice = np.concatenate([pixels, pixels[:50]])
    folder = animal_file(tmp_path / "in", pickle.dumps(twice))
    with np.load(build_domain("animals", source=folder, out=tmp_path)) as archive:
        assert len(archive["images"]) == len(np.unique(archive["images"], axis=0)) == 744


def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "ran",))

    folder = animal_file(tmp_path / "in", pickle.dumps(Payload()))
    with pytest.raises(ValueError, match="only numpy arrays are read"):
        build_domain("animals", source=folder, out=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_what_can_be_trained_on_is_listed():
    assert trainable() == ["digits", "emoji", "fashion", "relief"]


# building the sets


def idx_folder(folder, *, test=800, train=300, packed=False):
    """Fashion-MNIST's own file format, with numbered pictures."""
    folder.mkdir()
    for kind, count in (("t10k", test), ("train", train)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:] = (np.arange(count) % 251)[:, None, None]
        data = np.array([2051, count, 28, 28], ">i4").tobytes() + pixels.tobytes()
        path = folder / f"{kind}-images-idx3-ubyte"
        if packed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
        else:
            path.write_bytes(data)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_set_is_built_from_idx_files_with_its_datasheet(tmp_path, packed):
    path = build_domain("fashion", source=idx_folder(tmp_path / "in", packed=packed), out=tmp_path)
    with np.load(path) as archive:
        images, split = archive["images"], archive["split"]
    entry = json.loads((tmp_path / "datasheet.json").read_text())["fashion"]
    assert entry["counts"] == {"fit": 372, "heldout": 372, "train": 256}
    assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert images.shape == (1000, 32, 32, 1)
    assert (images == images[:, :1, :1]).all()
    assert (np.unique(split) == ["fit", "heldout", "train"]).all()


def test_building_twice_gives_the_same_file(tmp_path):
    source = idx_folder(tmp_path / "in")
    first = build_domain("digits", source=source, out=tmp_path).read_bytes()
    assert build_domain("digits", source=source, out=tmp_path).read_bytes() == first


@pytest.mark.parametrize("name", ["faces", "textures", "galaxies", "relief", "earth"])
def test_the_shipped_sets_are_what_their_builder_gives(tmp_path, root, name):
    with (
        np.load(build_domain(name, out=tmp_path)) as ours,
        np.load(root / f"data/domains/{name}.npz") as theirs,
    ):
        assert (ours["split"] == theirs["split"]).all()
        gap = np.abs(ours["images"].astype(int) - theirs["images"].astype(int))
    assert gap.max() <= 1  # resizing may round differently on another processor


def test_an_unknown_builder_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'moon'.*digits, earth, emoji, faces, fashion"):
        build_domain("moon", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_sources_are_named_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not there.*fashion-mnist"):
        build_domain("fashion", source=tmp_path / "nowhere", out=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"idx3-ubyte is not there.*fashion-mnist"):
        build_domain("fashion", source=tmp_path / "empty", out=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_the_training_set_is_resized_once(project, tmp_path, monkeypatch):
    source = idx_folder(tmp_path / "in", train=7)
    first = train_images("fashion", source=source)
    assert (first.shape, first.dtype) == ((7, 32, 32, 1), np.uint8)
    assert (first[:, 5, 5, 0] == np.arange(7)).all()
    monkeypatch.setattr(sources, "_read_idx", None)
    assert np.array_equal(train_images("fashion", source=source), first)


@pytest.mark.parametrize(
    ("name", "text"), [("faces", "no training set; digits, emoji"), ("moon", "'moon'")]
)
def test_only_some_domains_have_a_training_set(name, text):
    with pytest.raises(ValueError, match=text):
        train_images(name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_idx_file_is_named(tmp_path, packed):
    folder = idx_folder(tmp_path / "in", packed=packed)
    path = folder / ("t10k-images-idx3-ubyte" + (".gz" if packed else ""))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte is cut"):
        build_domain("fashion", source=folder, out=tmp_path)


def test_another_source_is_another_training_set(project, tmp_path):
    first = train_images("fashion", source=idx_folder(tmp_path / "a", train=7))
    other = train_images("fashion", source=idx_folder(tmp_path / "b", train=9))
    assert (len(first), len(other)) == (7, 9)
