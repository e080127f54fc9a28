# SPDX-License-Identifier: Apache-2.0
"""Learners, choices, labels and losses of Adaptive Computation Modules against plain restatements."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.tokens import Signals, TokenSet
from adaptive.width import acm

LEARNERS, WIDTH, HIDDEN, OUT = 4, 6, 12, 5
RNG = np.random.default_rng(0)
WEIGHTS = (
    RNG.normal(size=(WIDTH, HIDDEN)).astype(np.float32),
    RNG.normal(size=HIDDEN).astype(np.float32),
    RNG.normal(size=(HIDDEN, OUT)).astype(np.float32),
)
ROWS = RNG.normal(size=(11, WIDTH)).astype(np.float32)


def learner(n, rows=ROWS):
    """Output of learner n by itself, in NumPy (relu)."""
    up, bias, down = WEIGHTS
    part = slice(n * HIDDEN // LEARNERS, (n + 1) * HIDDEN // LEARNERS)
    return np.maximum(rows @ up[:, part] + bias[part], 0) @ down[part]


def one_hot(numbers, choices=LEARNERS + 1):
    return jnp.asarray(np.eye(choices, dtype=np.float32)[numbers])


@functools.cache
def run(form):
    if form == "skipping":
        return jax.jit(lambda need: acm.skipping(ROWS, acm.units(need, LEARNERS), *WEIGHTS, activation="relu"))
    return jax.jit(lambda need: acm.masked(ROWS, acm.units(need, LEARNERS), *WEIGHTS, activation="relu"))


@functools.cache
def prefixes():
    return np.asarray(jax.jit(lambda: acm.prefixes(ROWS, *WEIGHTS, LEARNERS, activation="relu"))())


def test_a_prefix_is_the_sum_of_its_learners():
    got = prefixes()
    np.testing.assert_array_equal(got[:, 0], 0)
    for n in range(LEARNERS):
        np.testing.assert_allclose(got[:, n + 1] - got[:, n], learner(n), atol=1e-5)
    np.testing.assert_allclose(got[:, -1], np.maximum(ROWS @ WEIGHTS[0] + WEIGHTS[1], 0) @ WEIGHTS[2], atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, LEARNERS), min_size=11, max_size=11))
def test_masked_and_skipping_forms_are_the_chosen_prefixes(need):
    want = prefixes()[np.arange(11), need]
    for form in ("masked", "skipping"):
        np.testing.assert_allclose(run(form)(one_hot(need)), want, atol=1e-5)


@pytest.mark.parametrize("least", [1, LEARNERS])
def test_learners_that_every_row_has_run_with_the_others(least):
    need = one_hot(np.random.default_rng(1).integers(least, LEARNERS + 1, 11))
    form = jax.jit(lambda need: acm.skipping(ROWS, acm.units(need, LEARNERS), *WEIGHTS, activation="relu", least=least))
    np.testing.assert_allclose(form(need), run("masked")(need), atol=1e-5)


def test_no_learner_gives_exactly_nothing():
    for form in ("masked", "skipping"):
        np.testing.assert_array_equal(run(form)(one_hot([0] * 11)), 0)


def test_both_forms_have_the_same_gradients():
    need = one_hot(RNG.integers(0, LEARNERS + 1, 11))

    def loss(form):
        def total(rows, weights):
            return jnp.sum(jnp.sin(form(rows, acm.units(need, LEARNERS), *weights, activation="gelu_tanh")))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(jnp.asarray(ROWS), WEIGHTS)

    for got, want in zip(*map(jax.tree.leaves, (loss(acm.skipping), loss(acm.masked))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("detach", [True, False])
def test_detached_prefixes_train_their_own_learner_alone(detach):
    gradient = jax.grad(
        lambda down: jnp.sum(
            acm.prefixes(ROWS, *WEIGHTS[:2], down, LEARNERS, activation="relu", detach=detach)[:, 3] ** 2
        )
    )(WEIGHTS[2])
    size = np.abs(np.asarray(gradient)).reshape(LEARNERS, -1).sum(1) > 0
    np.testing.assert_array_equal(size, [not detach, not detach, True, False])


def test_units_are_tail_sums_and_pass_gradients_of_every_choice():
    np.testing.assert_array_equal(acm.units(one_hot([0, 2, 4]), 4), [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(acm.units(one_hot([0, 3], 4), 4), [[1, 0, 0, 0], [1, 1, 1, 1]])
    gradient = jax.grad(lambda choice: jnp.sum(acm.units(choice, 4)))(one_hot([1]))
    np.testing.assert_array_equal(gradient, [[0, 1, 2, 3, 4]])
    with pytest.raises(ValueError, match=r"4 learners take 5 choices .* or 4 .*; got 3"):
        acm.units(one_hot([0], 3), 4)


def test_a_drawn_choice_is_one_hot_with_the_gradient_of_the_soft_sample():
    logits, key = jnp.asarray(RNG.normal(size=(50, 5)), jnp.float32), jax.random.key(3)
    choice = acm.choose(logits, key)
    np.testing.assert_array_equal(np.sort(choice, axis=-1), np.tile([0, 0, 0, 0, 1], (50, 1)))
    values = jnp.arange(5.0)
    noise = jax.random.gumbel(key, logits.shape, jnp.float32)
    soft = jax.grad(lambda x: jnp.sum(jax.nn.softmax((x + noise) / 0.8) * values))(logits)
    np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(acm.choose(x, key) * values))(logits), soft, atol=1e-6)
    np.testing.assert_array_equal(jnp.argmax(acm.choose(logits), -1), jnp.argmax(logits, -1))


def test_the_method_leaves_out_padding_and_checks_least():
    tokens = TokenSet.create(jnp.zeros((1, 3, 2)), mask=jnp.array([[True, True, False]]))
    logits = jnp.array([[[0.0, 5, 0], [5, 0, 0], [0, 0, 5]]])
    np.testing.assert_array_equal(acm.acm(tokens, Signals(choice_logits=logits)), [[[1, 0], [0, 0], [0, 0]]])
    got = acm.acm(tokens, Signals(choice_logits=logits), least=1)
    np.testing.assert_array_equal(got, [[[1, 1, 0], [1, 0, 0], [0, 0, 0]]])
    with pytest.raises(ValueError, match="least must be 0 or 1 learners; got 2"):
        acm.acm(tokens, Signals(choice_logits=logits), least=2)


def test_published_sizes():
    assert [acm.mlp_width(3072, n) for n in (2, 4, 8, 16)] == [1536, 768, 384, 192]
    assert [acm.projection_width(768, 768, n) for n in (2, 4, 8, 16)] == [192, 96, 48, 24]


def test_learners_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match=r"5 learners do not divide a hidden width of 12; choose one of \[1, 2, 3, 4, 6\]"
    ):
        acm.mlp_width(12, 5)
    with pytest.raises(ValueError, match="99 learners are too many for a projection of 8 to 8"):
        acm.projection_width(8, 8, 99)


def test_labels_are_the_first_learner_that_pays_little():
    distances = jnp.array([
        [9.0, 4.0, 3.9, 1.0, 0.5],  # the second hardly helps
        [9.0, 4.0, 1.0, 0.9, 0.1],  # the third
        [9.0, 4.0, 2.0, 1.0, 0.5],  # all help
        [9.0, 8.9, 1.0, 0.5, 0.1],  # the first hardly helps, which does not count
        [0.0, 0.0, 0.0, 0.0, 0.0],  # nothing is left to do
    ])  # fmt: skip
    np.testing.assert_array_equal(acm.gate_labels(distances, 0.8), [2, 3, 4, 4, 2])
    np.testing.assert_array_equal(acm.gate_labels(distances[:, :2], 0.8), [1] * 5)
    for tau in (0.0, 1.2):
        with pytest.raises(ValueError, match=rf"tau must lie in \(0, 1\].*got {tau}"):
            acm.gate_labels(distances, tau)


def test_the_gate_loss_is_the_cross_entropy_of_its_label():
    logits = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32)
    labels = jnp.array([4, 2, 3])
    log = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(acm.gate_loss(logits, labels, 4), -log[[0, 1, 2], [4, 2, 3]].mean(), rtol=1e-6)
    # Without the choice of no learner, label k is logit k - 1.
    np.testing.assert_allclose(acm.gate_loss(logits, labels, 5), -log[[0, 1, 2], [3, 1, 2]].mean(), rtol=1e-6)


def test_labels_that_are_all_alike_are_warned_of_with_their_histogram():
    with pytest.warns(
        UserWarning, match=r"tau=0.9 .*block_1/mlp alike \(0 learners: 0.000, .*2 learners: 1.000\); lower"
    ):
        acm.warn_if_degenerate({"block_0/mlp": np.array([0, 5, 5]), "block_1/mlp": np.array([0, 0, 9])}, 0.9)
    with pytest.warns(UserWarning, match="raise tau"):
        acm.warn_if_degenerate({"a": np.array([0, 0, 9, 0])}, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        acm.warn_if_degenerate({"a": np.array([0, 5, 5])}, 0.9)


def test_the_spent_share_weighs_modules_by_cost_and_leaves_out_padding():
    chosen = [acm.units(one_hot([[4, 0], [2, 2]]), 4), acm.units(one_hot([[2, 1], [0, 0]], 3), 2)]
    got = acm.spent(chosen, [3.0, 1.0])
    np.testing.assert_allclose(got, [(3 * 2 + 1.5) / 14, (3 * 2 + 0) / 14], rtol=1e-6)
    weight = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(acm.spent(chosen, [3.0, 1.0], weight)[0], (3 * 4 + 2) / 14, rtol=1e-6)
    with pytest.raises(ValueError, match="one cost a module is needed; got 1 for 2 modules"):
        acm.spent(chosen, [3.0])


def test_the_budget_loss_is_the_distance_of_the_mean():
    np.testing.assert_allclose(acm.budget_loss(jnp.array([0.2, 0.6]), 0.4), 0.0, atol=1e-7)
    np.testing.assert_allclose(acm.budget_loss(jnp.array([0.2, 0.6]), 0.7), 0.3, rtol=1e-6)
    for target in (0.0, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"target budget must lie in \(0, 1\].*got {target}"):
            acm.budget_loss(jnp.array([0.5]), target)


def test_entropy_is_lowest_for_uniform_choices_and_nought_for_constant_ones():
    uniform = acm.units(one_hot([[0, 1, 2, 3, 4]]), 4)
    constant = acm.units(one_hot([[3, 3, 3, 3, 3]]), 4)
    np.testing.assert_allclose(acm.entropy_loss([uniform]), -1.0, rtol=1e-5)
    np.testing.assert_allclose(acm.entropy_loss([constant]), 0.0, atol=1e-5)
    np.testing.assert_allclose(acm.entropy_loss([uniform, constant]), -0.5, rtol=1e-5)
    projection = acm.units(one_hot([[0, 1, 2, 3]], 4), 4)
    np.testing.assert_allclose(acm.entropy_loss([projection], least=[1]), -1.0, rtol=1e-5)
    assert -1 < float(acm.entropy_loss([projection])) < -0.8


def test_diversity_rewards_examples_that_differ():
    alike = acm.units(one_hot([[4, 0], [0, 4], [2, 2]]), 4)
    differ = acm.units(one_hot([[4, 4], [0, 0]]), 4)
    np.testing.assert_allclose(acm.diversity_loss([alike]), 0.0, atol=1e-7)
    np.testing.assert_allclose(acm.diversity_loss([differ]), -0.5)


def test_distillation_compares_every_prefix_but_the_empty_one():
    target = RNG.normal(size=(11, OUT)).astype(np.float32)
    outputs = prefixes()
    want = np.mean([(outputs[:, n] - target) ** 2 for n in range(1, LEARNERS + 1)])
    np.testing.assert_allclose(acm.distillation_loss(outputs, target), want, rtol=1e-5)
    np.testing.assert_allclose(acm.errors(outputs, target)[:, 0], np.linalg.norm(target, axis=1), rtol=1e-5)
