# SPDX-License-Identifier: Apache-2.0
"""Static patterns against their definitions pair by pair, and Radial attention against published and derived counts."""

import numpy as np
import pytest

from adaptive.sparsity import patterns
from adaptive.sparsity.radial import radial

N = 100
ROW, COLUMN = np.arange(N)[:, None], np.arange(N)[None, :]


def _mask(index):
    return np.asarray(index.token_mask()[0, 0])


@pytest.mark.parametrize(("sink", "window"), [(4, 24), (0, 1), (20, 200)])
@pytest.mark.parametrize("causal", [True, False])
def test_sink_window(sink, window, causal):
    index = patterns.sink_window(N, sink=sink, window=window, causal=causal, block=16)
    sinks, ahead = sink > COLUMN, COLUMN - ROW
    seen = ((-window < ahead) | sinks) & (ahead <= 0) if causal else (abs(ahead) < window) | sinks
    np.testing.assert_array_equal(_mask(index), seen)
    assert np.all(_mask(index).diagonal())


def test_a_window_costs_the_same_for_every_length():
    counts = [int(np.max(patterns.sink_window(n, window=64, block=16).counts)) for n in (400, 800)]
    assert counts == [6, 6]


@pytest.mark.parametrize("global_tokens", [0, 1, 17])
def test_longformer(global_tokens):
    index = patterns.longformer(N, window=20, global_tokens=global_tokens, block=16)
    seen = (abs(ROW - COLUMN) <= 10) | (global_tokens > ROW) | (global_tokens > COLUMN)
    np.testing.assert_array_equal(_mask(index), seen)


def test_bigbird_has_its_window_its_global_and_as_many_random_blocks():
    index = patterns.bigbird(64 * 20, seed=3)
    listed = np.asarray(index.block_mask()[0, 0])
    places = np.arange(20)
    assert np.all(listed[[0, 19]]) and np.all(listed[:, [0, 19]])
    assert np.all(listed[abs(places[:, None] - places) <= 1])
    # Rows 2 to 17: 3 of the window, 2 global, 3 random.
    assert listed[2:18].sum(1).tolist() == [8] * 16
    assert not np.array_equal(listed, patterns.bigbird(64 * 20, seed=4).block_mask()[0, 0])
    np.testing.assert_array_equal(listed, patterns.bigbird(64 * 20, seed=3).block_mask()[0, 0])
    assert patterns.bigbird(64 * 4, random_blocks=9).counts.tolist() == [[[4] * 4]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: patterns.sink_window(N, window=0), "window at least 1; got 4 and 0"),
        (lambda: patterns.longformer(N, window=5), "even and positive.*got 5"),
        (lambda: patterns.bigbird(N, window=2), "odd.*got 2"),
        (lambda: radial(2, 100), "no whole number of blocks of 128"),
        (lambda: radial(2, 128, model="mochi"), "model='mochi'"),
        (lambda: radial(2, 128, text=5), "text=5 tokens go with model='hunyuan'"),
        (lambda: radial(0, 128), "must be positive"),
    ],
)
def test_what_is_no_pattern_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "kept", "blocks", "least", "most", "symmetric"),
    [
        (dict(frames=18, tokens=3840, decay=0.2), 83728, 540, 92, 162, False),
        (dict(frames=18, tokens=3840, decay=1.0), 125656, 540, 126, 270, False),
        (dict(frames=36, tokens=3840, decay=0.2), 227200, 1080, 124, 216, False),
        (dict(frames=30, tokens=3840, decay=0.95, model="hunyuan", text=256), 226056, 902, 146, 902, True),
        (dict(frames=16, tokens=512, decay=0.5, model="hunyuan"), 2516, 64, 28, 51, True),
        (dict(frames=8, tokens=256, decay=1.0), 232, 16, 12, 16, False),
    ],
)
def test_golden_densities_of_radial_attention(options, kept, blocks, least, most, symmetric):
    index = radial(**options)
    assert (int(index.counts.sum()), index.key_blocks) == (kept, blocks)
    assert (index.counts.min(), index.counts.max()) == (least, most)
    np.testing.assert_allclose(index.density(), kept / blocks**2, rtol=1e-5)
    mask = np.asarray(index.block_mask()[0, 0])
    assert np.array_equal(mask, mask.T) == symmetric


@pytest.mark.parametrize(
    ("decay", "distances"),
    [(1.0, {1: 900, 2: 438, 4: 250, 8: 144, 16: 88, 32: 88, 33: 0, 34: 88}), (0.2, {1: 900, 2: 88, 8: 88})],
)
def test_blocks_of_pairs_of_frames(decay, distances):
    """A frame of 3,840 tokens is 30 blocks; the last frame as query, as the first is a sink as key."""
    mask = np.asarray(radial(36, 3840, decay=decay).block_mask()[0, 0]).reshape(36, 30, 36, 30)
    assert {distance: int(mask[35, :, 35 - distance].sum()) for distance in distances} == distances
    assert mask[35, :, 0].all()


def test_density_falls_with_frames_and_a_wide_window_sees_all():
    densities = [float(radial(frames, 512).density()) for frames in (4, 8, 16)]
    assert densities == sorted(densities, reverse=True) and densities[-1] < densities[0]
    assert int(radial(8, 3840, decay=1e9).counts.sum()) == 240**2
