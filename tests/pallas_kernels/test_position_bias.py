# SPDX-License-Identifier: Apache-2.0
"""T5's relative buckets, and the bias as a table with positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.position_bias import PositionBias, relative_buckets


def _logarithmic(relative, bidirectional, num_buckets, max_distance):
    """The bucket of one relative position as the T5 paper's code computes it."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        bucket, relative = (num_buckets if relative > 0 else 0), abs(relative)
    else:
        relative = max(-relative, 0)
    exact = num_buckets // 2
    if relative < exact:
        return bucket + relative
    # The small term undoes the rounding of logarithms whose quotient is a whole number.
    steps = np.log(relative / exact) / np.log(max_distance / exact) * (num_buckets - exact)
    return bucket + min(exact + int(steps + 1e-9), num_buckets - 1)


def test_check_values():
    encoder = relative_buckets(
        np.asarray([-200, -128, -64, -20, -8, -7, -1, 0, 1, 7, 8, 20, 64, 128]), bidirectional=True
    )
    assert encoder.tolist() == [15, 15, 14, 10, 8, 7, 1, 0, 17, 23, 24, 26, 30, 31]
    decoder = relative_buckets(np.asarray([1, 0, -1, -15, -16, -50, -127]), bidirectional=False)
    assert decoder.tolist() == [0, 0, 1, 15, 16, 24, 31]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000)])
def test_buckets_equal_the_logarithmic_formula(bidirectional, num_buckets, max_distance):
    relative = np.arange(-1100, 1101)
    ours = relative_buckets(relative, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance)
    expected = [_logarithmic(int(r), bidirectional, num_buckets, max_distance) for r in relative]
    np.testing.assert_array_equal(ours, expected)
    assert ours.min() == 0 and ours.max() == num_buckets - 1


def test_buckets_that_leave_no_logarithmic_range_are_refused():
    with pytest.raises(ValueError, match="max_distance=8"):
        relative_buckets(np.zeros(1, int), bidirectional=True, max_distance=8)
    with pytest.raises(ValueError, match="num_buckets=2"):
        relative_buckets(np.zeros(1, int), bidirectional=True, num_buckets=2)


def _bias(bidirectional, num_buckets, max_distance):
    table = np.random.default_rng(0).normal(size=(num_buckets, 2)).astype(np.float32)
    positions = np.arange(3, dtype=np.int32)[None]
    return PositionBias(table, positions, positions, bidirectional, max_distance)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (64, 1000), (40, 24)])
def test_steps_are_the_buckets(bidirectional, num_buckets, max_distance):
    steps = _bias(bidirectional, num_buckets, max_distance).steps()
    relative = np.arange(-1100, 1101)
    expected = [_logarithmic(int(r), bidirectional, num_buckets, max_distance) for r in relative]
    found = np.asarray(steps.buckets)[np.searchsorted(steps.places, relative, side="right")]
    np.testing.assert_array_equal(found, expected)
    assert len(set(steps.buckets)) == len(steps.buckets) == len(steps.places) + 1
    # No window of the same width holds more changes than the one that is chosen.
    first = steps.window(128)
    most = max(len(steps.inside(other, 128)) for other in range(-1100, 1100))
    assert len(steps.inside(first, 128)) == most


def test_the_bias_of_some_queries_is_a_part_of_the_whole():
    rng = np.random.default_rng(0)
    positions = [np.sort(rng.choice(300, (2, size)), axis=1).astype(np.int32) for size in (6, 9)]
    bias = PositionBias(rng.normal(size=(32, 3)).astype(np.float32), *positions)
    dense = jax.jit(lambda bias: bias.dense())(bias)
    assert dense.shape == bias.shape == (2, 3, 6, 9)
    np.testing.assert_array_equal(bias.queries(slice(2, 5)).dense(), dense[:, :, 2:5])
    for b, h, q, k in np.ndindex(2, 3, 6, 9):
        bucket = _logarithmic(int(positions[1][b, k] - positions[0][b, q]), True, 32, 128)
        assert dense[b, h, q, k] == jnp.asarray(bias.table)[bucket, h]
