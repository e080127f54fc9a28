# SPDX-License-Identifier: Apache-2.0
"""The GPU kernel of matching: several turns and tiles, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.bipartite_match import STATISTICS, bipartite_match, gpu


@pytest.mark.parametrize("statistic", STATISTICS)
def test_running_over_turns_and_tiles_changes_nothing(statistic, monkeypatch):
    monkeypatch.setattr(gpu, "_TURN", 4)
    monkeypatch.setattr(gpu, "_SHORT", 8)
    rng = np.random.default_rng(0)
    # Small integers: many ties, and products that are exact.
    left, right = (jnp.asarray(rng.integers(-1, 2, size=(8, rows, 5)), jnp.float32) for rows in (9, 11))
    bias = np.where(rng.random((8, 11)) < np.linspace(0, 1, 8)[:, None], -np.inf, 0).astype(np.float32)
    run = functools.partial(bipartite_match, metric="dot", statistic=statistic)
    ours, theirs = (
        jax.jit(functools.partial(run, implementation=name))(left, right, bias=bias)
        for name in ("gpu_interpret", "xla")
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (jnp.ones((1, 4, 320)), jnp.ones((1, 4, 320)), r"up to 256 channels; got rows \(1, 4, 320\)"),
        (jnp.ones((1, 4, 8)), jnp.ones((1, 4, 8), jnp.bfloat16), "rows of one dtype; got float32 and bfloat16"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(left, right, message):
    with pytest.raises(NotImplementedError, match=message):
        bipartite_match(left, right, implementation="gpu")
