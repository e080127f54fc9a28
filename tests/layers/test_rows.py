# SPDX-License-Identifier: Apache-2.0
"""Parts that run on some rows of a batch: those rows alone, whatever their number, and few compiled forms."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.rows import on_rows, row_rungs, update_rows


def test_rungs_are_none_eighths_and_powers_of_two_below():
    assert [row_rungs(rows) for rows in (1, 2, 6)] == [(0, 1), (0, 1, 2), (0, 1, 2, 3, 4, 5, 6)]
    assert row_rungs(64) == (0, 1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)


@pytest.mark.parametrize("rows", [1, 6])
def test_rows_that_run_change_and_the_others_do_not(rows):
    seen = []

    def double(module, x, offset, factor):
        seen.append(len(x))
        return (x + offset[:, None]) * factor

    def whole(module, runs, x, offset):
        return update_rows(module, double, runs, x, offset, jnp.float32(2))

    run = jax.jit(lambda *inputs: nn.Dense(1).apply({}, *inputs, method=whole))
    rng = np.random.default_rng(0)
    for number in range(rows + 1):
        runs = rng.permutation(np.arange(rows) < number)
        x, offset = rng.normal(size=(rows, 3)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
        found = np.asarray(run(runs, x, offset))
        np.testing.assert_array_equal(found, np.where(runs[:, None], (x + offset[:, None]) * 2, x))
    # Compiled once for each rung, not again for each number of rows.
    assert sorted(set(seen)) == sorted(set(row_rungs(rows)) - {0})


def test_the_smallest_branch_that_holds_the_rows_runs():
    model = nn.Dense(1)
    taken = jax.jit(
        lambda runs: model.apply(
            {}, method=lambda module: on_rows(module, lambda count: lambda *_: jnp.int32(count), runs)
        )
    )
    assert [int(taken(jnp.arange(16) < number)) for number in range(7)] == [0, 1, 2, 4, 4, 6, 6]
