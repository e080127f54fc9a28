# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of merging where a row takes several programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.merge import gpu, reference


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_rows_wider_than_a_program_are_whole(monkeypatch, dtype):
    monkeypatch.setattr(gpu, "_WIDE", 8)
    rng = np.random.default_rng(0)
    values, moved = (jnp.asarray(rng.integers(-9, 9, size=(2, rows, 21)), dtype) for rows in (14, 6))
    assign = rng.integers(-1, 6, size=(2, 14)).astype(np.int32)
    # One slot without a token, and one of nearly all.
    assign[0] = np.where(assign[0] == 2, 3, assign[0])
    assign[1, 2:] = 5
    weight = rng.integers(1, 4, size=(2, 14)).astype(np.float32)

    @jax.jit
    def run(values, moved):
        merged = gpu.merge(values, assign, weight, slots=6, interpret=True)
        return merged, gpu.restore(moved, assign, interpret=True)

    merged, spread = run(values, moved)
    assert merged.dtype == spread.dtype == values.dtype
    # Sums of small integers are exact.
    np.testing.assert_array_equal(merged, reference.merge(values, assign, weight, 6))
    np.testing.assert_array_equal(spread, reference.restore(moved, assign))
