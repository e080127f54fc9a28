# SPDX-License-Identifier: Apache-2.0
"""Image sources: true pixels, repeatable augmentation, and clear refusals."""

import numpy as np
import pytest
from PIL import Image

from experiments.data.images import ImageFolder, ImageOptions, TfdsImages, prepare

PLAIN = ImageOptions(image_size=10, mean=0.0, std=1.0, flip=False, crop="none")


def _entropy(count, seed=0):
    return np.stack([np.full(count, seed), np.arange(count)], axis=1)


def _pixels(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_an_image_of_the_right_size_is_untouched():
    pixels = _pixels(10, 10)
    np.testing.assert_array_equal(prepare(pixels, PLAIN, None), pixels)


def test_the_centre_is_cut_out_of_oblong_images():
    pixels = _pixels(10, 16)
    np.testing.assert_array_equal(prepare(pixels, PLAIN, None), pixels[:, 3:13])


def test_resizing_keeps_a_gradient():
    ramp = np.repeat(np.linspace(0, 250, 40).astype(np.uint8)[None, :, None], 40, axis=0)
    out = prepare(ramp, ImageOptions(image_size=10, channels=3), None)
    assert out.shape == (10, 10, 3)
    np.testing.assert_allclose(out[0, :, 0], ramp[0, :, 0].reshape(10, 4).mean(1), atol=8)
    assert (out[..., 0] == out[..., 2]).all()


def test_colour_and_alpha_become_grey():
    out = prepare(_pixels(10, 10, 4), ImageOptions(image_size=10, channels=1), None)
    assert out.shape == (10, 10, 1)


def test_flip_and_shift_are_flips_and_shifts():
    pixels = _pixels(6, 6)
    options = ImageOptions(image_size=6, crop="pad", crop_padding=1)
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)))
    expected = {}
    for top in range(3):
        for left in range(3):
            piece = padded[top : top + 6, left : left + 6]
            expected[piece.tobytes()] = (top, left, "as it is")
            expected[piece[:, ::-1].tobytes()] = (top, left, "flipped")
    seen = {expected[prepare(pixels, options, np.random.default_rng(i)).tobytes()] for i in range(300)}
    assert len(seen) == 18


def test_resized_crops_stay_inside_and_differ():
    options = ImageOptions(image_size=8, crop="resized", flip=False)
    pixels = np.full((30, 20, 3), 77, np.uint8)
    assert (prepare(pixels, options, np.random.default_rng(0)) == 77).all()
    crops = {prepare(_pixels(30, 20), options, np.random.default_rng(i)).tobytes() for i in range(20)}
    assert len(crops) == 20


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        prepare(np.zeros((5, 5, 3), np.float32), PLAIN, None)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"image_size": 0},
        {"channels": 2},
        {"crop": "centre"},
        {"crop_padding": -1},
        {"mean": (0.1, 0.2)},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_bad_options_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        ImageOptions(**kwargs)


# -- Folders ----------------------------------------------------------------------------------------------------------


def test_folder_labels_and_pixels(image_folder):
    source = ImageFolder(str(image_folder), options=PLAIN)
    assert len(source) == 24 and source.class_names == ("ant", "bee") and source.classes == 2
    batch = source.batch(np.arange(24), _entropy(24), augment=False)
    assert batch["image"].shape == (24, 10, 10, 3) and batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["label"], np.repeat([0, 1], 12).astype(np.int32))
    assert (batch["image"][:12].mean((1, 2, 3)) < 0.3).all() and (batch["image"][12:].mean((1, 2, 3)) > 0.5).all()
    first = np.asarray(Image.open(image_folder / "ant" / "0.png"))[:, 2:12] / 255
    np.testing.assert_allclose(batch["image"][0], first, rtol=1e-6)


def test_normalisation_is_for_each_channel(image_folder):
    options = ImageOptions(image_size=10, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0), flip=False, crop="none")
    plain = ImageFolder(str(image_folder), options=PLAIN).batch(np.arange(3), _entropy(3), augment=False)["image"]
    scaled = ImageFolder(str(image_folder), options=options).batch(np.arange(3), _entropy(3), augment=False)["image"]
    np.testing.assert_allclose(scaled, (plain - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 1, 2]), atol=1e-6)


def test_augmentation_depends_on_the_rows_entropy_alone(image_folder):
    source = ImageFolder(str(image_folder), options=ImageOptions(image_size=10))
    together = source.batch(np.arange(6), _entropy(6), augment=True)["image"]
    alone = source.batch(np.array([4]), _entropy(6)[4:5], augment=True)["image"]
    np.testing.assert_array_equal(together[4], alone[0])
    assert (together != source.batch(np.arange(6), _entropy(6, seed=1), augment=True)["image"]).any()


def test_folder_splits_are_disjoint_and_cover_it(image_folder):
    files = [
        set(ImageFolder(str(image_folder), split=split, valid_fraction=0.3)._files)
        for split in ("train", "valid", "test")
    ]
    assert all(files) and sum(len(f) for f in files) == len(set.union(*files)) == 24


def test_bad_folders_are_refused(tmp_path, image_folder):
    with pytest.raises(ValueError, match="does not exist"):
        ImageFolder(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        ImageFolder("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is empty"):
        ImageFolder(str(tmp_path / "empty"))
    (image_folder / "cow").mkdir()
    (image_folder / "cow" / "readme.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"cow.*holds no image"):
        ImageFolder(str(image_folder))
    with pytest.raises(ValueError, match="split of image folder"):
        (image_folder / "cow" / "readme.txt").rename(image_folder / "cow" / "readme.png")
        ImageFolder(str(image_folder), split="valid", valid_fraction=1e-9)


def test_a_damaged_image_is_named(image_folder):
    (image_folder / "ant" / "0.png").write_bytes(b"not a picture")
    source = ImageFolder(str(image_folder), options=PLAIN)
    with pytest.raises(ValueError, match=r"0\.png.*cannot be read"):
        source.batch(np.array([0]), _entropy(1), augment=False)


# -- TFDS -------------------------------------------------------------------------------------------------------------


def test_cifar10(cifar_dir):
    source = TfdsImages("cifar10", data_dir=cifar_dir, split="test", options=ImageOptions())
    assert len(source) == 10_000 and source.classes == 10
    batch = source.batch(np.arange(200), _entropy(200), augment=False)
    assert batch["image"].shape == (200, 32, 32, 3) and batch["image"].dtype == np.float32
    assert set(batch["label"].tolist()) == set(range(10))
    assert -1 <= batch["image"].min() < -0.9 and 0.9 < batch["image"].max() <= 1
    again = source.batch(np.arange(200), _entropy(200), augment=False)
    np.testing.assert_array_equal(batch["image"], again["image"])


def test_cifar10_subsplits_are_disjoint(cifar_dir):
    parts = [TfdsImages("cifar10", data_dir=cifar_dir, split=s) for s in ("train[:95%]", "train[95%:]")]
    assert [len(p) for p in parts] == [47_500, 2_500]
    ids = [{p._source[i]["id"] for i in range(0, len(p), 100)} for p in parts]
    assert not ids[0] & ids[1]


def test_cifar10_bad_fields(cifar_dir):
    with pytest.raises(ValueError, match=r"'picture'.*data\.image_key"):
        TfdsImages("cifar10", data_dir=cifar_dir, image_key="picture")
    with pytest.raises(ValueError, match=r"'class'.*data\.label_key"):
        TfdsImages("cifar10", data_dir=cifar_dir, label_key="class")
