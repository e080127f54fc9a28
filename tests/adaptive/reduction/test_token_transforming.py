# SPDX-License-Identifier: Apache-2.0
"""The matrix form: pruning, merging and both in turn are special cases of it; the many-to-many method against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import registry
from adaptive.reduction import combine, match, select
from adaptive.tokens import DenseReduction, Signals, TokenSet

BATCH, LENGTH, WIDTH = 2, 12, 5
# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def draw(seed, lengths=(LENGTH, 9)):
    rng = np.random.default_rng(seed)
    mask = jnp.asarray(np.arange(LENGTH) < np.array(lengths)[:, None])
    tokens = TokenSet.create(
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32),
        mask=mask,
        mass=jnp.asarray(rng.integers(1, 5, (BATCH, LENGTH))),
    )
    attention = rng.random((BATCH, LENGTH)).astype(np.float32)
    keys = rng.normal(size=(BATCH, LENGTH, 4)).astype(np.float32)
    return tokens, Signals(keys=jnp.asarray(keys), cls_attention=jnp.asarray(attention), cls_token=True)


@functools.partial(_jit, static_argnums=(2, 3))
def prune_then_merge(tokens, signals, pruned, merged):
    """DiffRate's step from existing parts: `(pruning, merge of what it leaves)`, plain means, destinations by attention."""
    first = select.prune(signals.cls_attention, tokens, signals, pruned)
    left = first.apply(tokens)
    attention = first.reduce(signals.cls_attention)
    keep = select.prune(attention, left, signals, merged)
    _, nearest = match.nearest_slot(left.features, keep.slots, cls_token=True)
    assign = jnp.where(keep.assign >= 0, keep.assign, jnp.where(left.valid, nearest, -1))
    return first, combine.weighted_mean(keep.slots, assign, left.valid)


transform = _jit(combine.transform)
product = _jit(lambda rows, partition: combine.transform(rows).then(combine.transform(partition)))


def one_hot(slots, length):
    return np.eye(length, dtype=np.float32)[np.maximum(slots, 0)] * (np.asarray(slots) >= 0)[..., None]


@_jit
def effect(reduction, tokens):
    reduced = reduction.apply(tokens)
    return reduction.matrix(), reduced, reduction.restore(reduced.features)


def check_same(dense, reduction, tokens):
    """Both do the same to features, mass, positions and origin, and restore alike."""
    assert isinstance(dense, DenseReduction)
    (matrix, got, restored), (want_matrix, want, want_restored) = (effect(r, tokens) for r in (dense, reduction))
    np.testing.assert_allclose(matrix, want_matrix, atol=1e-6)
    np.testing.assert_allclose(got.features, want.features, atol=1e-5)
    np.testing.assert_allclose(got.mass, want.mass, rtol=1e-6)
    np.testing.assert_allclose(got.coords, want.coords, atol=1e-5)
    np.testing.assert_array_equal(got.origin, want.origin)
    np.testing.assert_allclose(restored, want_restored, atol=1e-5)


def test_pruning_is_rows_of_the_identity():
    tokens, signals = draw(0)
    pruning = registry.get("class_attention")(tokens, signals, 7)
    check_same(combine.transform(jnp.asarray(one_hot(pruning.slots, LENGTH))), pruning, tokens)


def test_tome_is_a_partition_weighted_by_mass():
    tokens, signals = draw(1)
    merge = registry.get("tome")(tokens, signals, 8)
    partition = np.swapaxes(one_hot(merge.assign, 8), 1, 2)
    assert np.all(partition.sum(1) == 1)
    check_same(combine.transform(jnp.asarray(partition), tokens.mass), merge, tokens)


def test_evit_is_pruning_with_a_row_of_attention():
    tokens, signals = draw(2)
    fused = registry.get("evit")(tokens, signals, 6)
    heads = one_hot(fused.slots, LENGTH)
    gone = np.asarray(tokens.valid) & (heads.sum(1) == 0)
    heads[:, -1] = gone
    weight = np.where(gone, np.asarray(signals.cls_attention), 1.0)
    check_same(combine.transform(jnp.asarray(heads), jnp.asarray(weight)), fused, tokens)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(10, 6), (12, 4)]))
def test_pruning_and_then_merging_is_a_product_of_two_such_matrices(seed, counts):
    tokens, signals = draw(seed)
    pruned, merged = counts
    first, second = prune_then_merge(tokens, signals, pruned, merged)
    both = _jit(lambda first, second: first.then(second))(first, second)
    rows = one_hot(first.slots, LENGTH)
    partition = np.swapaxes(one_hot(second.assign, merged), 1, 2)
    chain = product(jnp.asarray(rows), jnp.asarray(partition))
    check_same(chain, both, tokens)
    # As one matrix: diag(A 1)^-1 A on what was not pruned, 0 on what was.
    check_same(transform(jnp.asarray(partition @ rows)), both, tokens)
    columns = np.asarray(chain.share()).sum(1)
    np.testing.assert_allclose(columns, rows.sum(1), atol=1e-6)


def test_a_row_of_zeros_is_an_empty_slot_and_a_column_of_zeros_a_dropped_token():
    affinity = jnp.asarray([[[1.0, 1, 0, 0], [0, 1, 3, 0], [0, 0, 0, 0]]])
    tokens = TokenSet.create(jnp.arange(4.0)[None, :, None], mass=jnp.asarray([[1.0, 2, 1, 5]]))
    got = combine.transform(affinity).apply(tokens)
    np.testing.assert_allclose(got.features[0, :, 0], [0.5, 1.75, 0])
    np.testing.assert_allclose(got.mass, [[2, 2, 0]])
    np.testing.assert_array_equal(got.origin, [[0, 0, 1, -1]])


def numpy_many_to_many(tokens, signals, row, budget, temperature, importance, own):
    valid = np.asarray(tokens.valid[row])
    attention, keys = (np.asarray(array[row], np.float64) for array in (signals.cls_attention, signals.keys))
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    real = [i for i in range(1, LENGTH) if valid[i]]
    heads = [0, *sorted(sorted(real, key=lambda i: -attention[i])[: budget - 1])]
    matrix = np.zeros((budget, LENGTH))
    matrix[0, 0] = 1
    for slot, head in list(enumerate(heads))[1:]:
        weights = np.array([np.exp(keys[head] @ keys[j] / temperature) * attention[j] ** importance for j in real])
        matrix[slot, real] = (1 - own) * weights / weights.sum()
        matrix[slot, head] += own
    return matrix


@pytest.mark.parametrize(("temperature", "importance", "own"), [(0.1, 1.0, 0.5), (0.5, 0.0, 0.0), (0.05, 2.0, 0.9)])
def test_many_to_many_equals_its_formula(temperature, importance, own):
    tokens, signals = draw(3)
    hyper = dict(temperature=temperature, importance=importance, own=own)
    out = _jit(lambda t, s: registry.get("many_to_many")(t, s, 6, **hyper))(tokens, signals)
    for row in range(BATCH):
        want = numpy_many_to_many(tokens, signals, row, 6, temperature, importance, own)
        np.testing.assert_allclose(out.matrix()[row], want, atol=1e-6)


def test_many_to_many_that_keeps_all_of_its_own_is_pruning():
    tokens, signals = draw(4)
    check_same(
        registry.get("many_to_many")(tokens, signals, 7, own=1.0),
        registry.get("class_attention")(tokens, signals, 7),
        tokens,
    )


def test_constant_tokens_stay_constant_and_order_does_not_matter():
    tokens, signals = draw(5, lengths=(LENGTH, LENGTH))
    method = _jit(lambda t, s: registry.get("many_to_many")(t, s, 6))
    constant = tokens.replace(features=jnp.ones_like(tokens.features))
    np.testing.assert_allclose(method(constant, signals).apply(constant).features, 1.0, atol=1e-6)
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(LENGTH - 1)])
    moved, moved_signals = jax.tree.map(lambda leaf: leaf[:, order], (tokens, signals))
    features = [method(t, s).apply(t).features for t, s in ((tokens, signals), (moved, moved_signals))]
    # The same slots, in the order of their heads.
    by_first = [np.sort(np.asarray(f)[..., 0], axis=1) for f in features]
    np.testing.assert_allclose(by_first[0], by_first[1], atol=1e-6)


def test_balancing_evens_out_what_tokens_contribute():
    tokens, signals = draw(6, lengths=(LENGTH, LENGTH))
    spread = []
    for balance in (0, 1, 20):
        hyper = dict(own=0.0, balance=balance)
        out = _jit(lambda t, s, hyper=hyper: registry.get("many_to_many")(t, s, 6, **hyper))(tokens, signals)
        np.testing.assert_allclose(np.asarray(out.matrix()).sum(2), 1.0, atol=1e-5)
        spread.append(np.ptp(np.asarray(out.matrix())[:, 1:, 1:].sum(1), axis=-1).max())
    assert spread[2] < 0.05 * spread[0] and spread[1] < spread[0]


@pytest.mark.parametrize("hyper", [dict(temperature=0.0), dict(own=1.5), dict(own=-0.1), dict(balance=-1)])
def test_hyper_parameters_out_of_range_are_errors(hyper):
    with pytest.raises(ValueError, match=r"temperature must be positive, own in \[0, 1\] and balance 0 or more; got"):
        registry.get("many_to_many")(*draw(0), 6, **hyper)
