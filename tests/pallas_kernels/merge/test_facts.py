# SPDX-License-Identifier: Apache-2.0
"""Masses, coordinates and pointers of merged tokens: every implementation against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.merge import facts, facts_tpu, merge_facts
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret", "gpu_interpret")
BATCH, WIDTH, ORIGINS = 3, 2, 21


def draw(length, slots, seed=0):
    """Tokens that join any slot or none; slots with a head, without one, and with one that joins another slot."""
    rng = np.random.default_rng(seed)
    assign = rng.integers(-1, slots, (BATCH, length)).astype(np.int32)
    heads = np.full((BATCH, slots), -1, np.int32)
    for row, slot in np.ndindex(*heads.shape):
        members = np.flatnonzero(assign[row] == slot)
        heads[row, slot] = rng.choice(members) if len(members) and slot % 4 else rng.integers(-1, length)
    # Numbers that bfloat16 would round, and far apart.
    coords = rng.normal(size=(BATCH, length, WIDTH)) * np.array([1e3, 1e-3])
    mass, weight = rng.integers(0, 9, (BATCH, length)) + 0.1, rng.random((BATCH, length))
    origin = rng.integers(-1, length, (BATCH, ORIGINS))
    return [jnp.asarray(x, jnp.float32) for x in (mass, coords)] + [
        jnp.asarray(origin, jnp.int32),
        jnp.asarray(heads),
        jnp.asarray(assign),
        jnp.asarray(weight, jnp.float32),
    ]


def loop(mass, coords, origin, heads, assign, weight):
    """Token by token, in float64."""
    total, sums = np.zeros(heads.shape), np.zeros((*heads.shape, WIDTH))
    for b, n in np.ndindex(*assign.shape):
        if assign[b, n] >= 0:
            total[b, assign[b, n]] += float(mass[b, n])
            sums[b, assign[b, n]] += float(weight[b, n]) * np.asarray(coords[b, n], np.float64)
    return total, sums, [[row[n] if n >= 0 else -1 for n in own] for row, own in zip(assign, origin, strict=True)]


def check(arrays, implementation):
    got = jax.jit(functools.partial(merge_facts, implementation=implementation))(*arrays)
    want = loop(*map(np.asarray, arrays))
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    # Relative to the largest number of each coordinate.
    assert np.max(abs(got[1] - want[1]) / np.max(abs(want[1]), axis=(0, 1))) < 1e-6
    np.testing.assert_array_equal(got[2], want[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("length", "slots"), [(13, 7), (150, 140), (17, 1)])
def test_equals_a_loop(implementation, length, slots):
    check(draw(length, slots), implementation)


def test_many_tokens_of_a_slot_and_sequences_of_several_steps(monkeypatch):
    monkeypatch.setattr(facts_tpu, "_STEP", 8 * 128)
    arrays = [jnp.concatenate([array] * 3) for array in draw(150, 20)]
    check(arrays, "interpret")
    # By products.
    monkeypatch.setattr(facts, "_FEW", 129)
    check(arrays, "interpret")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_sums(implementation):
    mass, coords, origin, heads, assign, weight = draw(13, 7)
    rng = np.random.default_rng(1)
    moved = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (heads.shape, (*heads.shape, WIDTH))]

    def inner(mass, coords, weight):
        out = merge_facts(mass, coords, origin, heads, assign, weight, implementation=implementation)
        return sum(jnp.vdot(one, other) for one, other in zip(out, moved, strict=False))

    def plain(mass, coords, weight):
        member = jax.nn.one_hot(assign, heads.shape[1])
        total = jnp.einsum("bnm,bn->bm", member, mass)
        return jnp.vdot(total, moved[0]) + jnp.vdot(jnp.einsum("bnm,bn,bnc->bmc", member, weight, coords), moved[1])

    got, want = (jax.grad(f, argnums=(0, 1, 2))(mass, coords, weight) for f in (inner, plain))
    for first, second in zip(got, want, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused():
    mass, coords, origin, heads, assign, weight = draw(13, 7)
    with pytest.raises(ValueError, match=r"heads \[B, M\]; got \(3, 13\), \(3, 13\), \(3, 12\), \(3, 13, 2\)"):
        merge_facts(mass, coords, origin, heads, assign, weight[:, 1:])
    long = [
        jnp.zeros((1, 1300, *array.shape[2:]), array.dtype) for array in (mass, coords, origin, heads, assign, weight)
    ]
    with pytest.raises(NotImplementedError, match="at most 1280 tokens and slots; got 1300"):
        merge_facts(*long, implementation="interpret")


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize(("batch", "length", "slots"), [(32, 577, 569), (3, 50, 40)])
def test_it_compiles_for_every_tpu(chip, batch, length, slots):
    kinds = [((length,), jnp.float32), ((length, 2), jnp.float32), ((length,), jnp.int32), ((slots,), jnp.int32)]
    kinds += [((length,), jnp.int32), ((length,), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct((batch, *shape), kind) for shape, kind in kinds]
    assert tpu_compiler.kernels(chip, functools.partial(merge_facts, implementation="tpu"), *arrays) == 1
