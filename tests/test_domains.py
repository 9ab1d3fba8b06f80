"""Shipped sets, folders of every kind of picture, local datasets, and what is said of the rest."""

import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ood_lib.domains import (
    domain_names,
    load_images,
    open_images,
    project_root,
    resize,
    to_channels,
)
from ood_lib.models import FrozenModel

SHIPPED = sorted(
    ["animals", "digits", "earth", "emoji", "faces", "fashion", "galaxies", "relief", "textures"]
)


def model_like(schedule, *shape):
    """Any model that takes images of this shape."""
    return FrozenModel("like", "analytic", schedule, shape, lambda x, t: torch.zeros_like(x))


def grey(value, size=(16, 16)):
    return Image.new("L", size, value)


# the shipped sets


@pytest.fixture(scope="module")
def sets(root):
    """Arrays of every shipped domain, and the datasheet."""
    folder = root / "data" / "domains"
    arrays = {}
    for path in folder.glob("*.npz"):
        with np.load(path) as archive:
            arrays[path.stem] = (archive["images"], archive["split"])
    return arrays, json.loads((folder / "datasheet.json").read_text())


def test_nine_domains_are_shipped_with_a_datasheet(sets):
    assert domain_names() == sorted(sets[1]) == SHIPPED
    assert all(
        {"origin", "licence", "counts", "sha256", "build"} <= set(e) for e in sets[1].values()
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_set_is_what_its_datasheet_says(root, sets, name):
    (images, split), entry = sets[0][name], sets[1][name]
    path = root / "data" / "domains" / f"{name}.npz"
    assert path.stat().st_size < 3 * 2**20
    assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
    assert images.dtype == np.uint8
    assert images.shape[1:3] == (32, 32)
    assert images.shape[3] in (1, 3)
    assert list(images.shape[1:]) == entry["shape"]
    counts = dict(zip(*(a.tolist() for a in np.unique(split, return_counts=True)), strict=True))
    assert counts == entry["counts"]
    assert 256 <= len(images) <= 1000 or (name, len(images)) == ("faces", 100)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_image_stands_twice_in_a_domain(sets, name):
    images, _ = sets[0][name]
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


@pytest.mark.parametrize("name", ["textures", "galaxies", "faces"])
def test_no_border_was_added(sets, name):
    """A constant frame would tell two domains apart by itself."""
    images = sets[0][name][0].astype(float)
    ring = np.ones((32, 32), bool)
    ring[1:-1, 1:-1] = False
    assert (images[:, ring].std(axis=1) > 0).all()
    for edge in (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]):
        assert (edge.reshape(len(images), -1).std(axis=1) > 0).mean() > 0.99


@pytest.mark.parametrize("name", ["fashion", "digits"])
def test_a_resized_set_fills_its_frame(sets, name):
    """28x28 pixels were resized, not padded: Fashion-MNIST reaches its edges, digits keep their margin."""
    images, _ = sets[0][name]
    span = (images.max(axis=(0, 3)) > 30).any(axis=0)
    inner = (~span).sum()
    assert inner == 0 if name == "fashion" else inner <= 10


def test_the_splits_of_the_folds_are_disjoint_and_make_the_whole():
    parts = [load_images("fashion", split=s) for s in ("fit", "heldout", "train")]
    assert len(load_images("fashion", split="all")) == sum(map(len, parts))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_images_fill_the_range_of_a_model(name):
    images = load_images(name, split="all")
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.7
    assert 0.7 < images.max() <= 1


def test_the_first_images_or_a_random_choice_that_a_generator_repeats():
    whole = load_images("digits")
    assert torch.equal(load_images("digits", n=5), whole[:5])
    first, again, other = (
        load_images("digits", n=20, rng=np.random.default_rng(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(torch.unique(first.flatten(1), dim=0)) == 20
    assert (whole.flatten(1) == first[3].flatten()).all(1).any()


# rows


@pytest.mark.parametrize("kind", ["shipped", "folder", "dataset"])
def test_rows_are_those_of_the_whole(kind, picture_folder, tmp_path, schedule):
    names = {"shipped": "digits", "folder": str(picture_folder)}
    if kind == "dataset":
        names[kind] = local_dataset(tmp_path / "set", [grey(20 * i) for i in range(6)])
    like = model_like(schedule, 3, 12, 12)
    whole, rows = (load(names[kind], n=6, like=like) for load in (load_images, open_images))
    assert len(rows) == 6
    assert torch.equal(rows.read(), whole)
    assert torch.equal(torch.cat([rows.read(0, 1), rows.read(1, 4), rows.read(4)]), whole)


def test_only_the_rows_that_are_asked_for_are_decoded(picture_folder):
    (picture_folder / "3.png").write_bytes(b"no picture")
    rows = open_images(str(picture_folder))
    assert len(rows.read(0, 3)) == 3
    with pytest.raises(ValueError, match=r"3\.png is not a readable image"):
        rows.read(2, 4)


def test_a_random_choice_keeps_its_rows():
    whole = load_images("digits", n=20, rng=np.random.default_rng(1))
    rows = open_images("digits", n=20, rng=np.random.default_rng(1))
    assert torch.equal(rows.read(7, 9), whole[7:9])


@pytest.mark.parametrize(("first", "stop"), [(-1, 2), (3, 3), (4, 3), (0, 7), (6, None)])
def test_rows_that_are_not_there_are_named(picture_folder, first, stop):
    with pytest.raises(ValueError, match=rf"rows {first} to .* it has rows 0 to 6"):
        open_images(str(picture_folder)).read(first, stop)


# resizing and channels


@settings(deadline=None, max_examples=40)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([8, 16, 32]), st.floats(0, 1))
def test_a_constant_picture_stays_constant_at_every_size(height, width, side, value):
    made = resize(torch.full((1, 1, height, width), value), side)
    assert made.shape == (1, 1, side, side)
    torch.testing.assert_close(made, torch.full_like(made, value), atol=1e-5, rtol=0)


def test_resizing_crops_the_centre():
    picture = torch.zeros(1, 1, 32, 96)
    picture[..., 32:64] = 0.5
    assert (resize(picture, 32) == 0.5).all()
    assert (resize(picture.mT, 32) == 0.5).all()


def test_resizing_is_antialiased_and_stays_in_range():
    """A checkerboard of single pixels becomes grey, not black and white or a moire."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    made = resize(board[None, None].float(), 16)
    torch.testing.assert_close(
        made[..., 2:-2, 2:-2], torch.full((1, 1, 12, 12), 0.5), atol=0.02, rtol=0
    )
    step = resize((torch.arange(60) > 29).float().expand(1, 1, 60, 60), 32)
    assert (step.min(), step.max()) == (0, 1)


def test_the_right_size_is_left_as_it_is():
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(resize(x, 16), x)


def test_grey_and_colour_convert_by_rec_601():
    colour = torch.eye(3).view(3, 3, 1, 1)
    assert to_channels(colour, 1).flatten().tolist() == pytest.approx([0.299, 0.587, 0.114])
    x = torch.rand(2, 1, 4, 4)
    assert torch.equal(to_channels(x, 3), torch.cat([x, x, x], 1))
    torch.testing.assert_close(to_channels(to_channels(x, 3), 1), x)


@pytest.mark.parametrize(("given", "wanted"), [(2, 1), (4, 3), (1, 2), (3, 4), (1, 0)])
def test_other_channel_counts_are_named(given, wanted):
    with pytest.raises(ValueError, match=f"{given} channels and {wanted} are wanted.*1.*3"):
        to_channels(torch.zeros(1, given, 8, 8), wanted)


def test_images_are_converted_to_what_the_model_takes(schedule):
    assert load_images("galaxies", n=2, like=model_like(schedule, 1, 16, 16)).shape == (
        2,
        1,
        16,
        16,
    )
    made = load_images("digits", n=2, like=model_like(schedule, 3, 32, 32))
    assert torch.equal(made, load_images("digits", n=2).repeat(1, 3, 1, 1))


def test_a_model_of_four_channels_is_refused(schedule):
    with pytest.raises(ValueError, match="4 are wanted"):
        load_images("digits", n=2, like=model_like(schedule, 4, 32, 32))


# folders


def palette():
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return image


def deep(value):
    return Image.fromarray(np.full((16, 16), value, np.uint16))


PICTURES = {
    "grey.png": (grey(128), [128 / 255]),
    "grey.jpg": (grey(128), [128 / 255]),
    "one bit.png": (Image.new("1", (16, 16), 1), [1]),
    "rgb.png": (Image.new("RGB", (16, 16), (255, 0, 51)), [1, 0, 0.2]),
    "rgb.jpeg": (Image.new("RGB", (16, 16), (200, 200, 200)), [200 / 255] * 3),
    "upper case.PNG": (grey(64), [64 / 255]),
    "cmyk.jpg": (Image.new("CMYK", (16, 16), (0, 0, 0, 255)), [0, 0, 0]),
    "clear.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 0)), [1, 1, 1]),
    "half clear.png": (Image.new("RGBA", (16, 16), (0, 0, 0, 102)), [0.6, 0.6, 0.6]),
    "grey and alpha.png": (Image.new("LA", (16, 16), (255, 255)), [1, 1, 1]),
    "palette.png": (palette(), [1, 0, 0]),
    "palette.gif": (palette(), [1, 0, 0]),
    "16 bit white.png": (deep(65535), [1]),
    "16 bit grey.png": (deep(13107), [0.2]),
    "16 bit.tif": (deep(13107), [0.2]),
    "black.bmp": (grey(0), [0]),
    "wide.webp": (Image.new("RGB", (40, 16), (0, 0, 0)), [0, 0, 0]),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_common_kind_of_picture_is_read(tmp_path, name):
    image, value = PICTURES[name]
    image.save(tmp_path / name)
    made = load_images(str(tmp_path))
    expected = (
        torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1).expand(1, len(value), 16, 16) * 2
        - 1
    )
    torch.testing.assert_close(made, expected, atol=0.02, rtol=0)


def deep_pgm(path):
    path.write_bytes(b"P5\n16 16\n65535\n" + np.full((16, 16), 13107, ">u2").tobytes())


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("16 bit.pgm", deep_pgm),
        ("float.tif", lambda p: Image.fromarray(np.full((16, 16), 0.2, np.float32)).save(p)),
    ],
)
def test_deep_pictures_are_read_to_scale_or_refused(tmp_path, name, write):
    write(tmp_path / name)
    try:
        made = load_images(str(tmp_path))
    except ValueError as refused:
        made = None
        text = str(refused)
    if made is None:
        assert name in text
    else:
        torch.testing.assert_close(made, torch.full_like(made, -0.6), atol=1e-3, rtol=0)


def test_a_mixed_folder_comes_to_one_size_and_channel_count(tmp_path, schedule):
    for i, (image, _) in enumerate(PICTURES.values()):
        image.convert("RGB").resize((10 + 3 * i, 40 - i)).save(tmp_path / f"{i}.png")
    made = load_images(str(tmp_path), like=model_like(schedule, 1, 12, 12))
    assert made.shape == (len(PICTURES), 1, 12, 12)
    assert load_images(str(tmp_path), n=4).shape[1:2] == (3,)


def test_files_are_read_in_the_order_of_their_names_with_subfolders(tmp_path):
    for i, name in enumerate(["b.png", "a.png", "sub/c.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        grey(60 * i).save(tmp_path / name)
    (tmp_path / ".DS_Store").write_text("hidden files do not count")
    made = load_images(str(tmp_path))
    np.testing.assert_allclose((made[:, 0, 0, 0] + 1) / 2 * 255, [60, 0, 120], atol=0.01)
    assert len(load_images(str(tmp_path), n=2)) == 2


def test_a_picture_is_cropped_at_its_centre(tmp_path):
    pixels = np.zeros((16, 48), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load_images(str(tmp_path)) == 1).all()


def test_what_is_loaded_can_be_written_to(tmp_path):
    grey(10).save(tmp_path / "a.png")
    images = load_images(str(tmp_path))
    images += 1
    assert images.is_contiguous()


# what is wrong with a folder


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("notes.txt", b"hello", "notes.txt is not an image file"),
        ("text.png", b"hello", "text.png is not a readable image"),
        ("empty.jpg", b"", "empty.jpg is not a readable image"),
        ("cut.png", "cut", "cut.png is not a readable image"),
        ("flipped.png", "flip", "flipped.png is not a readable image"),
    ],
)
def test_a_file_that_is_no_picture_is_named(picture_folder, name, content, text):
    good = (picture_folder / "0.png").read_bytes()
    if content == "cut":
        content = good[: len(good) // 2]
    elif content == "flip":
        content = good[:45] + bytes([good[45] ^ 255]) + good[46:]
    (picture_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_images(str(picture_folder))


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images.*png"):
        load_images(str(tmp_path))


@pytest.mark.parametrize("size", [(5, 5), (5, 50), (50, 7), (1, 1)])
def test_a_picture_under_eight_pixels_is_named(tmp_path, size):
    grey(9, size).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels.*8x8"):
        load_images(str(tmp_path))


def test_a_small_picture_among_others_is_found_by_its_file(picture_folder):
    grey(9, (5, 5)).save(picture_folder / "small.png")
    with pytest.raises(ValueError, match=r"small\.png"):
        load_images(str(picture_folder))


@pytest.mark.parametrize("name", ["nope", "Digits"])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="digits, earth, emoji, faces, fashion"):
        load_images(name)


@pytest.mark.parametrize("name", ["no-such/dataset", "/no/such/folder"])
def test_a_dataset_or_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=name):
        load_images(name)


@pytest.mark.parametrize("n", [0, -1, 373])
def test_a_wrong_number_of_images_is_named_with_the_right_ones(n):
    with pytest.raises(ValueError, match=f"{n} images.*'digits' holds 372.*1 to 372"):
        load_images("digits", n=n)


def test_too_many_images_of_a_folder(picture_folder):
    with pytest.raises(ValueError, match=r"7 images.*holds 6"):
        load_images(str(picture_folder), n=7)


@pytest.mark.parametrize(
    ("name", "split", "known"),
    [("digits", "test", "fit, heldout, train, all"), ("faces", "train", "fit, heldout, all")],
)
def test_an_unknown_split_lists_the_known_ones(name, split, known):
    with pytest.raises(ValueError, match=f"'{split}'.*{known}"):
        load_images(name, split=split)


# Hugging Face datasets


def local_dataset(folder, images, *, splits=None, column="picture"):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({column: datasets.Image(), "label": datasets.Value("int64")})
    data = {column: images, "label": list(range(len(images)))}
    made = datasets.Dataset.from_dict(data, features=features)
    if splits:
        made = datasets.DatasetDict({s: made for s in splits})
    made.save_to_disk(str(folder))
    return str(folder)


def test_a_local_dataset_is_read_whatever_its_column_is_called(tmp_path, schedule):
    name = local_dataset(tmp_path / "set", [grey(0), grey(255, (20, 30)), grey(51)])
    made = load_images(name, like=model_like(schedule, 1, 8, 8))
    assert made.shape == (3, 1, 8, 8)
    np.testing.assert_allclose(made.mean(dim=(1, 2, 3)), [-1, 1, -0.6], atol=1e-5)
    assert len(load_images(name, n=2)) == 2


def test_a_split_of_a_local_dataset(tmp_path):
    name = local_dataset(tmp_path / "set", [grey(0)] * 2, splits=["train", "test"])
    assert len(load_images(name, split="test")) == 2
    with pytest.raises(ValueError, match=r"'fit'.*train.*test"):
        load_images(name, split="fit")


def test_a_dataset_without_images_lists_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="no image column; its columns are text"):
        load_images(str(tmp_path / "set"))


def test_a_corrupt_image_in_a_dataset_is_named(tmp_path):
    images = [{"bytes": b"no image", "path": None}]
    name = local_dataset(tmp_path / "set", images)
    with pytest.raises(ValueError, match=r"set.*not a readable image"):
        load_images(name)


def test_a_missing_image_in_a_dataset_is_named(tmp_path):
    name = local_dataset(tmp_path / "set", [grey(0), None])
    with pytest.raises(ValueError, match="set"):
        load_images(name)


# where the project is


def test_the_project_is_found_from_anywhere(tmp_path, monkeypatch, root, project):
    assert project_root() == project
    monkeypatch.delenv("OOD_ROOT")
    monkeypatch.chdir(tmp_path)
    assert project_root() == root
    monkeypatch.chdir(root / "tests")
    assert project_root() == root
