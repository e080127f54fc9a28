# SPDX-License-Identifier: Apache-2.0
"""T5's relative bias from arbitrary positions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers.relative_bias import RelativeBias
from pallas_kernels.position_bias import relative_buckets


@pytest.fixture(scope="module")
def bias():
    module = RelativeBias(3)
    places = np.arange(5)[None]
    variables = nn.unbox(module.init(jax.random.key(0), places, places))
    # One compilation for all examples of one shape.
    return jax.jit(lambda queries, keys: module.apply(variables, queries, keys)), variables["params"]["embedding"]


def test_each_entry_is_the_table_at_its_bucket(bias):
    run, table = bias
    queries, keys = np.asarray([[3, 50]]), np.asarray([[0, 3, 4, 300], [7, 1, 2, 60]])
    out = run(queries, keys)
    assert out.shape == (2, 3, 2, 4)
    buckets = relative_buckets(keys[:, None] - queries[..., None], bidirectional=True)
    for place in np.ndindex(2, 2, 4):
        b, q, k = place
        np.testing.assert_array_equal(out[b, :, q, k], table[buckets[place]])


@settings(max_examples=20, deadline=None)
@given(kept=st.sets(st.integers(0, 199), min_size=6, max_size=6), offset=st.integers(-5, 500))
def test_survivors_keep_their_bias(bias, kept, offset):
    run, _ = bias
    full = run(np.arange(200)[None], np.arange(200)[None])
    kept = np.sort(list(kept))
    short = run(kept[None] + offset, kept[None] + offset)
    np.testing.assert_array_equal(short, full[:, :, kept][:, :, :, kept])


def test_float_positions_are_rounded(bias):
    run, _ = bias
    exact, rough = np.asarray([[0, 4, 9]]), np.asarray([[0.3, 3.6, 9.1]], np.float32)
    np.testing.assert_array_equal(run(rough, rough), run(exact, exact))


def test_the_gradient_of_the_table_counts_the_pairs_of_each_bucket():
    module, places = RelativeBias(2, bidirectional=False, num_buckets=8, max_distance=20), np.arange(12)[None]
    variables = nn.unbox(module.init(jax.random.key(0), places, places))
    grads = jax.grad(lambda v: jnp.sum(module.apply(v, places, places)))(variables)["params"]["embedding"]
    relative = np.arange(12) - np.arange(12)[:, None]
    pairs = relative_buckets(relative, bidirectional=False, num_buckets=8, max_distance=20)
    np.testing.assert_allclose(grads, np.bincount(pairs.ravel(), minlength=8)[:, None].repeat(2, 1))


def test_the_table_has_logical_axes_and_float32_under_bfloat16():
    places = np.arange(5)[None]
    module = RelativeBias(3, dtype=jnp.bfloat16)
    boxed = module.init(jax.random.key(0), places, places)["params"]["embedding"]
    assert boxed.names == ("buckets", "heads") and boxed.value.dtype == jnp.float32
    assert module.apply({"params": {"embedding": boxed.value}}, places, places).dtype == jnp.bfloat16
