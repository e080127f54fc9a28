# SPDX-License-Identifier: Apache-2.0
"""Pairs: every implementation against a loop-written merge of the most similar even tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.bipartite_match import pair_up, pairs_tpu
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret")
BATCH = 2


def draw(length, seed):
    """Similarities with ties, partners and masses with zeros, which are padding."""
    rng = np.random.default_rng(seed)
    even, odd = -(-length // 2), length // 2
    similarity = np.round(rng.normal(size=(BATCH, even)), 1).astype(np.float32)
    partner = rng.integers(0, odd, (BATCH, even)).astype(np.int32)
    return similarity, partner, rng.integers(0, 9, (BATCH, length)).astype(np.float32)


def loop(similarity, partner, mass, removed, threshold, ordered, protected):
    """Heads, slots and weights of one sequence, by sorting and appending."""
    even, length = len(similarity), len(mass)
    similarity = np.where(mass[::2] == 0, np.inf, similarity)
    if protected:
        similarity[0] = -np.inf
    order = sorted(range(even), key=lambda token: (-similarity[token], token))
    merged = order[:removed] + [t for t in order[removed:] if threshold is not None and similarity[t] > threshold]
    stay = [token for token in order if token not in merged]
    groups = [[2 * token] for token in (sorted(stay) if ordered else stay)]
    groups += [[2 * k + 1] + [2 * t for t in merged if partner[t] == k] for k in range(length // 2)]
    heads = [group[0] for group in groups] + [-1] * (length - removed - len(groups))
    assign, weight = np.zeros(length, int), np.zeros(length)
    for slot, group in enumerate(groups):
        total = mass[group].sum()
        assign[group], weight[group] = slot, mass[group] / (total or 1.0)
    return np.array(heads), assign, weight


@functools.partial(jax.jit, static_argnames=("removed", "threshold", "ordered", "protected", "implementation"))
def run(similarity, partner, mass, **options):
    return pair_up(similarity, partner, mass, **options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("length", "removed", "threshold", "ordered", "protected"),
    [
        (13, 3, None, True, True),
        (13, 3, None, False, False),
        (14, 7, None, True, False),
        (14, 0, None, True, True),
        (17, 2, 0.2, False, False),
        (150, 9, 0.5, True, True),
        # Several registers of tokens and of those that join.
        (601, 140, None, True, True),
        (601, 140, None, False, False),
    ],
)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_equals_a_loop(implementation, length, removed, threshold, ordered, protected, seed):
    arrays = draw(length, seed)
    options = {"removed": removed, "threshold": threshold, "ordered": ordered, "protected": protected}
    got = run(*map(jnp.asarray, arrays), implementation=implementation, **options)
    for row in range(BATCH):
        heads, assign, weight = loop(*(array[row] for array in arrays), **options)
        np.testing.assert_array_equal(got.heads[row], heads)
        np.testing.assert_array_equal(got.assign[row], assign)
        np.testing.assert_allclose(got.weight[row], weight, rtol=1e-6)


def test_weights_have_the_gradient_of_shares_whatever_makes_them():
    similarity, partner, mass = map(jnp.asarray, draw(13, 1))
    mass = mass + 1.0

    def first_weight(mass, implementation):
        pairs = pair_up(similarity, partner, mass, removed=4, ordered=True, implementation=implementation)
        return jnp.sum(pairs.weight * jnp.arange(13.0))

    assign = pair_up(similarity, partner, mass, removed=4, ordered=True, implementation="xla").assign
    member = jax.nn.one_hot(assign, 9)
    want = jax.grad(lambda mass: jnp.sum(mass / jnp.einsum("bnm,bkm,bk->bn", member, member, mass) * jnp.arange(13.0)))(
        mass
    )
    assert np.max(abs(want)) > 0.1
    for implementation in IMPLEMENTATIONS:
        np.testing.assert_allclose(jax.grad(first_weight)(mass, implementation), want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    similarity, partner, mass = map(jnp.asarray, draw(13, 0))
    with pytest.raises(ValueError, match=r"must be \[B, ceil\(N/2\)\] = \(2, 6\); got \(2, 7\)"):
        pair_up(similarity, partner, mass[:, :12], removed=1, ordered=True)
    with pytest.raises(ValueError, match=r"removed must lie in 0..7.*; got 8"):
        pair_up(similarity, partner, mass, removed=8, ordered=True)
    many = jnp.zeros((1, 1400))
    with pytest.raises(NotImplementedError, match="at most 1280 tokens; got 1400"):
        pair_up(
            many[:, :700], jnp.zeros((1, 700), jnp.int32), many, removed=8, ordered=True, implementation="interpret"
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences_of_several_steps_do_not_mix(monkeypatch, implementation):
    monkeypatch.setattr(pairs_tpu, "_STEP", 64 * 128)
    rng = np.random.default_rng(0)
    similarity, mass = rng.normal(size=(130, 9)).astype(np.float32), np.ones((130, 18), np.float32)
    partner = rng.integers(0, 9, (130, 9)).astype(np.int32)
    got = run(similarity, partner, mass, removed=3, threshold=None, ordered=True, implementation=implementation)
    for row in (0, 127, 128, 129):
        heads, assign, weight = loop(similarity[row], partner[row], mass[row], 3, None, True, False)
        np.testing.assert_array_equal(got.heads[row], heads)
        np.testing.assert_array_equal(got.assign[row], assign)
        np.testing.assert_allclose(got.weight[row], weight, rtol=1e-6)


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize(("batch", "length", "ordered"), [(32, 577, True), (16, 1025, True), (3, 50, False)])
def test_it_compiles_for_every_tpu(chip, batch, length, ordered):
    even = -(-length // 2)
    kinds = [((batch, even), jnp.float32), ((batch, even), jnp.int32), ((batch, length), jnp.float32)]
    options = {"removed": 8, "ordered": ordered, "implementation": "tpu"}
    arrays = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    assert tpu_compiler.kernels(chip, functools.partial(pair_up, **options), *arrays) == 1
