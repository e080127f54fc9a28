# SPDX-License-Identifier: Apache-2.0
"""Digit images and videos: pure functions of their index, from disjoint scans, as hard as they say."""

import time

import numpy as np
import pytest

from experiments.data import digits
from experiments.data.digits import DigitOptions, Digits, MovingDigitOptions, MovingDigits

SMALL = DigitOptions(image_size=24, scale=(0.4, 0.7), clutter=3)


def _batch(source, indices):
    return source.batch(np.asarray(indices), np.zeros((len(indices), 3), np.int64), augment=True)


def test_splits_draw_from_disjoint_scans_that_cover_the_set():
    parts = [digits.scan_indices(split) for split in ("train", "valid", "test")]
    joined = np.concatenate(parts)
    assert joined.size == np.unique(joined).size == 1797
    assert parts[0].size > 1200 and min(part.size for part in parts) > 250


def test_examples_are_pure_functions_of_seed_split_and_index():
    first, again = Digits("train", 50, SMALL), Digits("train", 999, SMALL)
    for i in (3, 17):
        for key, value in first[i].items():
            np.testing.assert_array_equal(value, again[i][key])
    batch = _batch(first, [17, 3, 17])
    np.testing.assert_array_equal(batch["image"][0], first[17]["image"])
    np.testing.assert_array_equal(batch["image"][1], first[3]["image"])
    other_seed = Digits("train", 50, DigitOptions(image_size=24, scale=(0.4, 0.7), clutter=3, seed=1))
    for other in (other_seed, Digits("valid", 50, SMALL)):
        assert (other[3]["image"] != first[3]["image"]).any()


def test_cache_changes_nothing():
    plain, cached = Digits("train", 20, SMALL), Digits("train", 20, SMALL, cache=True)
    for indices in ([0, 5, 5], [5, 19, 0], range(20)):
        for key, value in _batch(plain, list(indices)).items():
            np.testing.assert_array_equal(value, _batch(cached, list(indices))[key])
    assert not np.shares_memory(_batch(cached, [0])["label"], cached._cache["label"])


@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_and_typed(channels):
    source = Digits("train", 200, DigitOptions(image_size=24, scale=(0.4, 0.7), channels=channels))
    batch = _batch(source, range(200))
    assert batch["image"].shape == (200, 24, 24, channels) and batch["image"].dtype == np.float32
    assert batch["label"].dtype == np.int32 and set(batch["label"].tolist()) == set(range(10))
    assert batch["difficulty"].dtype == np.float32
    assert abs(batch["image"].mean()) < 0.1 and abs(batch["image"].std() - 1) < 0.1


def test_a_clean_digit_is_the_scan_it_was_made_from():
    """At the scan's own size, without clutter and noise, the canvas holds exactly one scan of the label's class."""
    source = Digits("test", 30, DigitOptions(image_size=8, scale=(1, 1), clutter=0, background=0, noise=0))
    scans, classes = digits._load_scans()
    pool = digits.scan_indices("test")
    for i in range(30):
        pixels = source[i]["image"][..., 0] * source.std + source.mean
        pixels = pixels / pixels.max()
        nearest = pool[np.abs(scans[pool] / scans[pool].max((1, 2), keepdims=True) - pixels).max((1, 2)).argmin()]
        np.testing.assert_allclose(pixels, scans[nearest] / scans[nearest].max(), atol=0.01)
        assert classes[nearest] == source[i]["label"]


def test_difficulty_follows_size_clutter_and_noise():
    source = Digits("train", 300, DigitOptions(image_size=32, background=0))
    batch = _batch(source, range(300))
    hardest, easiest = np.argsort(batch["difficulty"])[-30:], np.argsort(batch["difficulty"])[:30]
    assert 0 <= batch["difficulty"].min() < 0.3 and 0.7 < batch["difficulty"].max() <= 1

    def roughness(rows):  # noise and clutter both raise the differences between neighbouring pixels
        return np.abs(np.diff(batch["image"][rows], axis=1)).mean()

    assert roughness(hardest) > 1.5 * roughness(easiest)
    fixed = DigitOptions(image_size=16, scale=(0.5, 0.5), clutter=0, noise=0)
    assert not _batch(Digits("train", 20, fixed), range(20))["difficulty"].any()


def test_several_digits_light_up_more_and_clutter_stays_redundant():
    def lit(**kwargs):
        options = DigitOptions(image_size=48, scale=(0.25, 0.25), background=0, noise=0, **kwargs)
        pixels = np.stack([Digits("train", 40, options)._raw(i)[0] for i in range(40)])
        return (pixels > 60).mean()

    one, three, cluttered = lit(clutter=0), lit(clutter=0, digits=3), lit(clutter=20)
    assert one < 0.05 and 2 * one < three < 0.15 and cluttered > 1.5 * one


def test_moving_digits_bounce_inside_a_still_scene():
    options = MovingDigitOptions(image_size=24, frames=30, scale=(0.5, 0.5), clutter=0, background=0, noise=0)
    source = MovingDigits("train", 10, options)
    batch = _batch(source, range(10))
    assert batch["video"].shape == (10, 30, 24, 24, 1) and batch["video"].dtype == np.float32
    pixels = np.stack([source._raw(i)[0] for i in range(10)]).astype(float)[..., 0]
    # the whole digit stays on the canvas: its light is conserved from frame to frame
    light = pixels.sum((2, 3))
    np.testing.assert_allclose(light, light[:, :1] * np.ones(30), rtol=1e-12)
    # it moves, by at most the top speed (and a pixel of rounding) a frame
    grid = np.arange(24)
    row = (pixels.sum(3) * grid).sum(2) / light
    column = (pixels.sum(2) * grid).sum(2) / light
    steps = np.hypot(np.diff(row, axis=1), np.diff(column, axis=1))
    assert steps.max() < options.speed[1] + 1.5 and steps.mean() > 0.3
    # and turns: over 30 frames some direction reverses
    assert (np.diff(np.sign(np.diff(row, axis=1)[np.abs(np.diff(row, axis=1)) > 0])) != 0).any()


def test_video_background_is_redundant_in_time():
    source = MovingDigits("train", 20, MovingDigitOptions(noise=0, clutter=6))
    pixels = np.stack([source._raw(i)[0] for i in range(20)])
    still = (pixels == pixels[:, :1]).all(axis=(1, 4))
    assert still.mean() > 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 4}, "image_size=4"),
        ({"digits": 0}, "digits=0"),
        ({"clutter": -1}, "clutter=-1"),
        ({"noise": 2.0}, "noise=2.0"),
        ({"scale": (0.5, 0.2)}, "scale"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"scale": (0.01, 0.5)}, "pixels"),
        ({"frames": 0}, "frames=0"),
        ({"speed": (2.0, 1.0)}, "speed"),
    ],
)
def test_bad_options_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MovingDigitOptions(**kwargs)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="'dev'"):
        Digits("dev", 5)
    with pytest.raises(ValueError, match="examples=0"):
        Digits("train", 0)
    with pytest.raises(ValueError, match="digits=500"):
        Digits("train", 5, DigitOptions(digits=500))
    with pytest.raises(ValueError, match=r"GiB.*data\.cache"):
        Digits("train", 10**8, SMALL, cache=True)
    with pytest.raises(IndexError):
        Digits("train", 5, SMALL)[5]


def test_an_example_takes_less_than_a_millisecond():
    source = Digits("train", 250)  # the default canvas, 64 x 64; the best of several, for the machine may be busy
    best = min(_timed(source, range(start, start + 50)) for start in range(0, 250, 50))
    assert best / 50 < 1e-3


def _timed(source, indices):
    start = time.perf_counter()
    for i in indices:
        source[i]
    return time.perf_counter() - start
