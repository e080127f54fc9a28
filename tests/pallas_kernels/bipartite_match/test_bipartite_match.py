# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching: every implementation against the whole matrix in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis.extra import numpy as hnp

from pallas_kernels.bipartite_match import METRICS, STATISTICS, bipartite_match, specs, tpu, xla
from tests.pallas_kernels import tpu_compiler

IMPLEMENTATIONS = ("xla", "interpret", "gpu_interpret")
BATCH, LEFT, RIGHT, CHANNELS = 2, 9, 11, 5
REMOVED = hnp.arrays(bool, (BATCH, RIGHT))
ALL = np.ones((BATCH, RIGHT), bool)


@functools.cache
def rows(coarse=False, dtype="float32"):
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(BATCH, LEFT, CHANNELS)), rng.normal(size=(BATCH, RIGHT, CHANNELS))
    if coarse:
        # Many ties, and a zero vector on either side.
        left, right = np.sign(left.round()), np.sign(right.round())
        left[0, 2] = right[1, 3] = 0
    return jnp.asarray(left, dtype), jnp.asarray(right, dtype)


def matrix(left, right, bias, metric):
    """All similarities in float64."""
    left, right = np.asarray(left.astype(jnp.float32), np.float64), np.asarray(right.astype(jnp.float32), np.float64)
    if metric == "distance":
        return -((left[:, :, None] - right[:, None]) ** 2).sum(-1) + bias[:, None]
    if metric == "cosine":
        left, right = (r / np.maximum(np.linalg.norm(r, axis=-1, keepdims=True), 1e-12) for r in (left, right))
    return left @ right.transpose(0, 2, 1) + bias[:, None]


@functools.cache
def runner(implementation, metric, statistic):
    return jax.jit(
        lambda left, right, bias: bipartite_match(
            left, right, bias=bias, metric=metric, statistic=statistic, implementation=implementation
        )
    )


def check(got, scores, statistic, atol=1e-5):
    """The statistic of the whole matrix; equal scores may come in either order, but a reported place must hold its value."""
    value, index = map(np.asarray, got)
    if statistic == "sum":
        np.testing.assert_allclose(value[..., 0], np.where(np.isinf(scores), 0, scores).sum(-1), atol=5 * atol)
        return
    want = -np.sort(-scores, axis=-1)[..., : value.shape[-1]]
    np.testing.assert_allclose(value, want, atol=atol)
    held = np.take_along_axis(scores, index, axis=-1)
    np.testing.assert_allclose(np.where(np.isinf(want), want, held), want, atol=atol)
    assert np.all(index[np.isinf(value)] == 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestImplementation:
    """What every implementation must do."""

    @pytest.mark.parametrize("statistic", STATISTICS)
    @pytest.mark.parametrize("metric", METRICS)
    @settings(max_examples=4, deadline=None)
    @given(removed=REMOVED)
    @example(removed=ALL)
    @example(removed=~ALL)
    @example(removed=np.arange(RIGHT) != np.array([[0], [RIGHT - 1]]))
    def test_equals_the_whole_matrix(self, implementation, metric, statistic, removed):
        left, right = rows()
        bias = np.where(removed, -np.inf, np.linspace(-0.3, 0.3, RIGHT)).astype(np.float32)
        got = runner(implementation, metric, statistic)(left, right, bias)
        check(got, matrix(left, right, bias, metric), statistic)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_ties_go_to_the_lower_index_and_zero_vectors_are_similar_to_nothing(self, implementation, dtype):
        left, right = rows(coarse=True, dtype=dtype)
        bias = np.zeros((BATCH, RIGHT), np.float32)
        # Products of small integers are exact, so that equal is equal.
        scores = matrix(left, right, bias, "dot")
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :2]
        value, index = runner(implementation, "dot", "best_two")(left, right, bias)
        np.testing.assert_array_equal(index, order)
        np.testing.assert_array_equal(value, np.take_along_axis(scores, order, axis=-1))
        check(runner(implementation, "cosine", "best")(left, right, bias), matrix(left, right, bias, "cosine"), "best")
        assert np.all(np.asarray(runner(implementation, "cosine", "sum")(left, right, bias)[0])[0, 2] == 0)

    def test_no_gradient_flows(self, implementation):
        left, right = rows()
        bias = jnp.zeros((BATCH, RIGHT))

        def loss(*arguments):
            return jnp.sum(runner(implementation, "cosine", "best")(*arguments)[0])

        for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(left, right, bias):
            np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("statistic", STATISTICS)
@settings(max_examples=4, deadline=None)
@given(removed=REMOVED)
@example(removed=ALL)
@example(removed=np.arange(RIGHT)[None] > np.array([[8], [3]]))
def test_running_over_blocks_changes_nothing(statistic, removed):
    left, right = rows(coarse=True)
    left = jnp.concatenate([left, -left], axis=1)
    bias = np.where(removed, -np.inf, 0).astype(np.float32)
    whole = runner("xla", "dot", statistic)(left, right, bias)
    for blocked in (blocked_kernel(statistic), blocked_loop(statistic)):
        for got, want in zip(blocked(left, right, bias), whole, strict=True):
            np.testing.assert_array_equal(got, want)


@functools.cache
def blocked_kernel(statistic):
    options = {"metric": "dot", "statistic": statistic, "block": 8, "interpret": True}
    return jax.jit(functools.partial(tpu.bipartite_match, **options))


@functools.cache
def blocked_loop(statistic):
    def run(left, right, bias):
        whole, xla._BLOCK = xla._BLOCK, 4
        try:
            return xla.bipartite_match(left, right, bias, metric="dot", statistic=statistic)
        finally:
            xla._BLOCK = whole

    return jax.jit(run)


@pytest.mark.parametrize(("batch", "rows_", "group"), [(64, 99, 4), (6, 200, 2), (7, 99, 1), (5, 100, 5), (4, 600, 1)])
def test_short_sequences_share_a_step(batch, rows_, group):
    assert tpu._group(batch, rows_, 512) == group


def test_several_sequences_of_a_step_do_not_mix():
    left, right = rows()
    double = [jnp.concatenate([array, 2 * array[::-1]]) for array in (left, right)]
    bias = np.zeros((2 * BATCH, RIGHT), np.float32)
    assert tpu._group(2 * BATCH, RIGHT, 512) == 4
    check(runner("interpret", "dot", "best")(*double, bias), matrix(*double, bias, "dot"), "best")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "angle"}, r"metric='angle' is not one of"),
        ({"statistic": "worst"}, r"statistic='worst' is not one of"),
        ({"right": jnp.ones((2, 3, 4))}, r"got \(2, 9, 5\) and \(2, 3, 4\)"),
        ({"right": jnp.ones((2, 1, 5)), "statistic": "best_two"}, r"needs at least 2 right rows; got 1"),
        ({"right": jnp.ones((2, 0, 5))}, r"needs at least 1 right rows; got 0"),
        ({"bias": jnp.ones((2, 3))}, r"bias must be \[B, K\] = \(2, 11\); got \(2, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"left": rows()[0], "right": rows()[1]} | change
    with pytest.raises(ValueError, match=message):
        bipartite_match(arguments.pop("left"), arguments.pop("right"), **arguments)


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        (jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4), jnp.bfloat16), r"both of float32 or both of bfloat16; got float32"),
        (jnp.ones((2, 0, 4)), jnp.ones((2, 3, 4)), r"at least one left row; got \(2, 0, 4\)"),
        (jnp.ones((2, 3, 4096)), jnp.ones((2, 3, 4096)), r"MiB of on-chip memory, more than 13; use fewer channels"),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(left, right, message):
    for implementation in ("tpu", "interpret"):
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(functools.partial(bipartite_match, implementation=implementation), left, right)


def _arguments(spec):
    odd = spec.tokens // 2
    shapes = [(spec.batch, spec.tokens - odd, spec.channels), (spec.batch, odd, spec.channels)]
    return [jax.ShapeDtypeStruct(shape, spec.dtype) for shape in shapes]


@pytest.mark.parametrize("chip", tpu_compiler.CHIPS)
@pytest.mark.parametrize("name", specs.NAMED)
def test_it_compiles_for_every_tpu(chip, name):
    def run(left, right):
        return [bipartite_match(left, right, statistic=kind, implementation="tpu") for kind in STATISTICS]

    left, right = _arguments(specs.NAMED[name])
    lowered, _ = tpu_compiler.compile_for(chip, run, left, right)
    text = lowered.as_text()
    assert text.count("@tpu_custom_call") == 3
    # Nothing of the size of all similarities is ever in memory.
    assert f"{right.shape[1]}x{left.shape[1]}x" not in text and f"{left.shape[1]}x{right.shape[1]}x" not in text
