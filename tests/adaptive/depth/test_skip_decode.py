# SPDX-License-Identifier: Apache-2.0
"""Exit schedules by position: published figures, nested layers, and schedules that a cache cannot serve."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.depth import skip_decode
from adaptive.tokens import Signals, TokenSet


def test_the_counts_of_the_published_example():
    """24 layers, from all of them down to 6, over 8 tokens."""
    assert skip_decode.layer_counts(24, most=24, least=6, horizon=8) == (24, 21, 19, 16, 14, 11, 9, 6)


@settings(max_examples=50, deadline=None)
@given(layers=st.integers(2, 40), data=st.data(), horizon=st.integers(1, 30), bottom=st.integers(0, 2))
def test_layers_are_nested_so_that_every_layer_finds_the_keys_of_all_tokens_before(layers, data, horizon, bottom):
    least = data.draw(st.integers(max(bottom, 1), layers))
    most = data.draw(st.integers(least, layers))
    counts = skip_decode.layer_counts(layers, most=most, least=least, horizon=horizon, bottom=bottom)
    assert counts[0] == most and (counts[-1] == least or horizon == 1)
    active = skip_decode.active_layers(counts, layers, bottom=bottom)
    np.testing.assert_array_equal(active.sum(1), counts)
    assert np.all(active[1:] <= active[:-1])
    assert active[:, :bottom].all()


def test_the_lowest_layer_and_the_highest_ones_stay():
    active = skip_decode.active_layers((4, 3, 1), 5)
    np.testing.assert_array_equal(active, [[1, 0, 1, 1, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0]])


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(4, 40), speedup=st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 4.0]))
def test_a_target_is_met_on_average(layers, speedup):
    counts = skip_decode.counts_for_speedup(layers, speedup, horizon=65)
    # Ends are whole layers, so the mean is off by a quarter of one at most; rounding on the line by less.
    assert abs(np.mean(counts) - layers / speedup) <= 0.5


def test_a_speedup_of_one_is_all_layers():
    assert set(skip_decode.counts_for_speedup(12, 1.0, horizon=9)) == {12}


def test_evenly_spaced_layers_of_the_published_code():
    """24 layers at twice the speed: K = 12 of them, the first, the last, and even ones from below."""
    assert skip_decode.evenly_spaced(24, 2.0) == (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 23)
    assert skip_decode.evenly_spaced(6, 1.0) == (0, 1, 2, 3, 4, 5)


def test_the_registered_method_reads_positions_and_leaves_padding_out():
    tokens = TokenSet.create(
        jnp.zeros((1, 4, 2)),
        mask=jnp.asarray([[True] * 3 + [False]]),
        coords=jnp.asarray([[[-2.0], [1.0], [9.0], [0.0]]]),
    )
    runs = registry.get("skip_decode")(tokens, Signals(), counts=(3, 2, 1), layers=3)
    np.testing.assert_array_equal(runs, [[[1, 1, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]])


@pytest.mark.parametrize(
    ("counts", "layers", "bottom", "message"),
    [
        ((4, 3, 4), 4, 1, r"token 2 has 4 layers after 3.*got \(4, 3, 4\)"),
        ((5,), 4, 1, r"every token runs 1..4 layers.*got \(5,\)"),
        ((3, 1), 4, 2, "every token runs 2..4 layers, the 2 at the bottom included"),
        ((3, 0), 4, 0, r"every token runs 1..4 layers"),
        ((), 4, 1, r"got \(\)"),
        ((4,), 4, 5, r"bottom must lie in 0..4 \(the layers\); got 5"),
    ],
)
def test_schedules_that_cannot_be_decoded_are_refused(counts, layers, bottom, message):
    with pytest.raises(ValueError, match=message):
        skip_decode.check_counts(counts, layers, bottom=bottom)


def test_targets_that_cannot_be_met_are_refused():
    for speedup in (0.5, 13.0):
        with pytest.raises(ValueError, match=f"speedup must lie in 1..12 for 12 layers; got {speedup}"):
            skip_decode.counts_for_speedup(12, speedup, horizon=4)
    with pytest.raises(ValueError, match=r"1..6, so that two of 12 layers stay; got 7"):
        skip_decode.evenly_spaced(12, 7)
    with pytest.raises(ValueError, match="horizon must be at least 1 token; got 0"):
        skip_decode.layer_counts(4, most=4, least=1, horizon=0)
