# SPDX-License-Identifier: Apache-2.0
"""The differentiable proxy: numbers and masks, their gradients against finite differences of the surrogate, the budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import flops
from adaptive.rates import masked, proxy
from adaptive.rates.schedules import Schedule
from adaptive.reduction.diffrate import ORDERS
from adaptive.tokens import Signals, TokenSet

SPEC = flops.ViTSpec(patch_size=4, width=16, depth=3, mlp_dim=32, num_classes=5, image_size=(16, 16))
CHOICES = proxy.candidates(16, 2)
PUBLISHED = ORDERS["cls_attention"]


def _logits(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_candidates_fall_by_the_granularity_and_stay_above_zero():
    assert proxy.candidates(9, 4) == (9, 5, 1)
    assert len(proxy.candidates(196, 4)) == 49 and proxy.candidates(196)[-1] == 4
    with pytest.raises(ValueError, match=r"1\.\.9 .*got 10"):
        proxy.candidates(9, 10)
    with pytest.raises(ValueError, match="8 candidates need as many logits"):
        proxy.kept_tokens(jnp.zeros(7), CHOICES)


def test_numbers_at_the_start_are_those_of_the_paper():
    """Uniform rates over 196, 192, ... keep 100 patches on average, and the class token."""
    assert float(proxy.kept_tokens(jnp.zeros(49), proxy.candidates(196))) == 101.0


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(-4, 4), min_size=8, max_size=8))
def test_beliefs_fall_with_the_rank_and_sum_to_the_expected_number(values):
    logits = jnp.asarray(values, jnp.float32)
    belief = np.asarray(proxy.keep_probability(logits, CHOICES, 17))
    assert belief[0] == 1 and np.all(np.diff(belief) <= 1e-6) and np.all(belief >= 0)
    expected = float(jnp.sum(jax.nn.softmax(logits) * jnp.asarray(CHOICES)))
    np.testing.assert_allclose(belief[1:].sum(), expected, rtol=1e-5)
    kept = float(proxy.kept_tokens(logits, CHOICES))
    assert kept == np.ceil(expected - 1e-3) + 1
    mask = np.asarray(proxy.keep_mask(logits, CHOICES, 17))
    np.testing.assert_array_equal(mask, np.arange(17) < kept)


def test_derivatives_of_belief_and_number_are_those_of_the_derivation():
    logits = _logits(8)
    rho = np.asarray(jax.nn.softmax(logits))
    belief = np.asarray(proxy.keep_probability(logits, CHOICES, 17))
    reaches = np.asarray(CHOICES)[:, None] >= np.arange(17)
    expected = float(rho @ np.asarray(CHOICES))
    jacobian = jax.jacobian(proxy.keep_mask)(logits, CHOICES, 17)
    np.testing.assert_allclose(jacobian[1:].T, (rho[:, None] * (reaches - belief))[:, 1:], atol=1e-6)
    np.testing.assert_array_equal(jacobian[0], 0)
    gradient = jax.grad(proxy.kept_tokens)(logits, CHOICES)
    np.testing.assert_allclose(gradient, rho * (np.asarray(CHOICES) - expected), rtol=1e-4, atol=1e-5)


def _world(seed=3):
    rng = np.random.default_rng(seed)
    heads = [jnp.asarray(rng.normal(size=(2, 17, 2, 4)), jnp.float32) for _ in range(3)]
    return heads, jnp.asarray(rng.normal(size=(2, 17, 2, 4)), jnp.float32)


def test_the_gradient_is_the_finite_difference_of_the_surrogate():
    """The surrogate moves the hard mask and the hard number by what their soft forms move; loss and multiply-adds see those."""
    (query, key, value), readout = _world()
    logits = _logits(8, seed=5)
    spec, weight = flops.ViTSpec(4, 16, 1, 32, 5, (16, 16)), 1e-4

    def loss(mask, kept):
        out = masked.masked_attention(query, key, value, jnp.broadcast_to(mask, (2, 17)))
        # Queries that are gone have no say in the loss, as in a model that reads the class token.
        return jnp.sum(out[:, :5] * readout[:, :5]) + weight * sum(spec.macs(counts=(kept,)).values())

    def through_the_proxy(logits):
        return loss(proxy.keep_mask(logits, CHOICES, 17), proxy.kept_tokens(logits, CHOICES))

    @jax.jit
    def surrogate(moved):
        mask = proxy.keep_mask(logits, CHOICES, 17)
        mask += proxy.keep_probability(moved, CHOICES, 17) - proxy.keep_probability(logits, CHOICES, 17)
        kept = proxy.kept_tokens(logits, CHOICES)
        shift = jnp.asarray(CHOICES) @ (jax.nn.softmax(moved) - jax.nn.softmax(logits))
        return loss(mask, kept + shift)

    gradient = np.asarray(jax.grad(through_the_proxy)(logits))
    assert np.abs(gradient).max() > 0.1
    step = 1e-2
    for place in range(8):
        direction = jnp.zeros(8).at[place].set(step)
        estimate = (surrogate(logits + direction) - surrogate(logits - direction)) / (2 * step)
        np.testing.assert_allclose(gradient[place], estimate, rtol=0.01, atol=2e-3)


def test_the_minimum_prices_both_numbers_and_not_what_comes_in():
    value, grads = jax.value_and_grad(proxy.least, argnums=(0, 1, 2))(jnp.float32(9), jnp.float32(5), jnp.float32(7))
    assert value == 5 and tuple(map(float, grads)) == (0, 1, 1)
    logits = _logits(3, 2, 8)
    gradient = jax.grad(proxy.macs)(logits, CHOICES, SPEC, (1, 2))
    assert np.all(np.abs(gradient[1:]).max(-1) > 0)
    np.testing.assert_array_equal(gradient[0], 0)


def test_a_binding_price_goes_to_the_lower_number_alone():
    for numbers, want in (((9, 5, 7), (0, 1, 0)), ((9, 7, 5), (0, 0, 1)), ((9, 6, 6), (0, 0, 1))):
        tokens, pruned, merged = map(jnp.float32, numbers)
        value, grads = jax.value_and_grad(proxy.least_binding, argnums=(0, 1, 2))(tokens, pruned, merged)
        assert value == min(numbers) and tuple(map(float, grads)) == want
    logits = _logits(3, 2, 8)
    same = [proxy.macs(logits, CHOICES, SPEC, (1, 2), price) for price in proxy.PRICES]
    assert same[0] == same[1]
    with pytest.raises(ValueError, match="price='none' is not one of"):
        proxy.macs(logits, CHOICES, SPEC, (1, 2), "none")


def test_macs_are_those_of_the_exported_schedule():
    logits = _logits(3, 2, 8, seed=2)
    schedule = proxy.export(logits, CHOICES, SPEC.tokens, (1, 2))
    assert schedule.counts[0] == schedule.prune[0] == 17
    want = sum(SPEC.macs(counts=schedule.counts).values())
    np.testing.assert_allclose(proxy.macs(logits, CHOICES, SPEC, (1, 2)), want, rtol=1e-6)
    dense = sum(SPEC.macs().values())
    np.testing.assert_allclose(
        proxy.budget_loss(logits, CHOICES, SPEC, (1, 2), 0.7), (want / dense - 0.7) ** 2, rtol=1e-4
    )


@pytest.mark.parametrize("target", [0.2, 1.5])
def test_a_budget_that_no_candidate_meets_is_an_error(target):
    with pytest.raises(ValueError, match=f"a target of {target} .* cannot be met: with layers \\(1, 2\\)"):
        proxy.budget_loss(_logits(3, 2, 8), CHOICES, SPEC, (1, 2), target)


def test_descent_on_the_budget_alone_meets_it_within_a_percent():
    logits, step = jnp.zeros((3, 2, 8)), jax.jit(jax.grad(lambda x: proxy.budget_loss(x, CHOICES, SPEC, (1, 2), 0.75)))
    for _ in range(200):
        logits -= 0.3 * jnp.sign(step(logits)) * (jnp.abs(step(logits)) > 1e-6) * 0.1
    dense = sum(SPEC.macs().values())
    assert abs(float(proxy.macs(logits, CHOICES, SPEC, (1, 2))) / dense - 0.75) < 0.02


def _apply(prune_logits, merge_logits, tokens, signals):
    kept = [proxy.kept_tokens(logits, CHOICES) for logits in (prune_logits, merge_logits)]
    masks = [proxy.keep_mask(logits, CHOICES, 17) for logits in (prune_logits, merge_logits)]
    return masked.prune_then_merge(tokens, signals, *kept, *masks, PUBLISHED)


def test_masks_of_gone_tokens_pass_no_gradient_and_those_alive_do():
    rng = np.random.default_rng(0)
    tokens = TokenSet.create(jnp.asarray(rng.normal(size=(1, 17, 4)), jnp.float32))
    signals = Signals(cls_attention=jnp.asarray(rng.random((1, 17)), jnp.float32), cls_token=True)
    first = _apply(_logits(8) * 0, _logits(8) * 0 + 1, tokens, signals).apply(tokens)
    left = int(first.count[0])
    assert left == 10
    signals = signals.replace(cls_attention=jnp.asarray(rng.random((1, 17)), jnp.float32))

    def second(masks):
        kept = jnp.float32(6), jnp.float32(17)
        return masked.prune_then_merge(first, signals, *kept, masks, jnp.ones(17), PUBLISHED).keep

    hard = (jnp.arange(17) < 6).astype(jnp.float32)
    jacobian = np.asarray(jax.jacobian(lambda masks: second(masks)[0])(hard))
    np.testing.assert_array_equal(np.diag(jacobian), np.arange(17) < left)
    # An operation that removes nothing leaves the mask alone.
    numbers = 17.0, 17.0
    idle = jax.jacobian(lambda m: masked.prune_then_merge(first, signals, *numbers, m, m, PUBLISHED).keep)(hard)
    np.testing.assert_array_equal(idle, 0)


def test_masks_learn_what_merging_moves_where_means_are_weighted_by_mass():
    """Ranks from 12 on are pruned, from 8 on merged; then a token more or less merges, or is pruned, by hand."""
    rng = np.random.default_rng(0)
    mass = jnp.asarray(rng.integers(1, 4, (1, 17)), jnp.float32)
    tokens = TokenSet.create(jnp.asarray(rng.normal(size=(1, 17, 4)), jnp.float32), mass=mass)
    alive, left = 12, 8

    def after(prune_mask, merge_mask):
        numbers = jnp.float32(alive), jnp.float32(left)
        reduction = masked.prune_then_merge(
            tokens, Signals(cls_token=True), *numbers, prune_mask, merge_mask, ORDERS["density"]
        )
        out = reduction.apply(tokens)
        return (out.features * out.mass[..., None])[0], out.mass[0], (reduction.order[0], reduction.joins[0], out)

    hard = [(jnp.arange(17) < number).astype(jnp.float32) for number in (alive, left)]
    order, joins, out = after(*hard)[2]
    moved = jax.jit(jax.jacobian(lambda p, m: after(p, m)[:2], argnums=(0, 1)))(*hard)
    features, masses = ([np.asarray(leaf) for leaf in pair] for pair in moved)
    assert np.all(joins[1:2] == -1) and np.all((joins[2:] >= 1) & (joins[2:] < np.minimum(np.arange(17), left)[2:]))
    x, gone = np.asarray(tokens.features[0])[np.asarray(order)], np.asarray(out.mass[0])
    for rank in range(2, 17):
        to, own = joins[rank], gone[rank]
        # One more in the mask of merging takes a merged token out of its slot, and says the same of one that stays.
        want = -own * (rank < alive)
        np.testing.assert_allclose(masses[1][:, rank], want * np.eye(17)[to], atol=1e-6)
        if left <= rank < alive:
            np.testing.assert_allclose(features[1][to, :, rank], -own * x[rank], atol=1e-4)
        # One more in the mask of pruning lets a pruned or a merged token into its slot.
        np.testing.assert_allclose(masses[0][:, rank], own * (rank >= left) * np.eye(17)[to], atol=1e-6)
        if rank >= left:
            np.testing.assert_allclose(features[0][to, :, rank], own * x[rank], atol=1e-4)
    # As published, only attention tells.
    assert _apply(_logits(8), _logits(8), tokens, Signals(cls_attention=mass, cls_token=True)).given is None


def test_masked_attention_is_attention_among_the_keys_that_are_left():
    (query, key, value), _ = _world()
    keep = jnp.asarray(np.arange(17) % 3 > 0, jnp.float32)[None].repeat(2, 0)
    out = masked.masked_attention(query, key, value, keep)
    index = np.flatnonzero(keep[0])
    logits = np.einsum("bqhd,bkhd->bhqk", query, np.asarray(key)[:, index]) / 2.0
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.einsum("bhqk,bkhd->bqhd", weights, np.asarray(value)[:, index])
    np.testing.assert_allclose(np.asarray(out)[:, index], want[:, index], atol=1e-5)


def test_a_gone_key_with_an_enormous_logit_neither_overflows_nor_hides_the_others():
    (query, key, value), _ = _world()
    key = key.at[:, 3].set(1e4)
    keep = jnp.ones((2, 17)).at[:, 3].set(0.0)

    def total(keep):
        return jnp.sum(masked.masked_attention(jnp.abs(query), key, value, keep)[:, :3])

    gradient = jax.grad(total)(keep)
    assert np.all(np.isfinite(gradient)) and abs(float(gradient[0, 3])) > 0
    assert np.isfinite(float(total(keep)))


def test_export_is_a_schedule_of_ints():
    schedule = proxy.export(jnp.zeros((2, 2, 49)), proxy.candidates(196), 197, (1,))
    assert schedule == Schedule((197, 101), (197, 101)) and all(type(n) is int for n in schedule.prune + schedule.merge)


def test_logits_around_numbers_keep_about_those_numbers():
    choices = proxy.candidates(64, 1)
    kept = ((62, 47), (47, 28), (27, 15), (9, 4))
    found = np.asarray(proxy.kept_tokens(jnp.asarray(proxy.logits_around(kept, choices)), choices))
    np.testing.assert_allclose(found, kept, atol=1)
    belief = np.asarray(proxy.keep_probability(jnp.asarray(proxy.logits_around(kept, choices)), choices, 65))
    # A wide bell learns from ranks on both sides of the number.
    assert 0.05 < belief[0, 1, 53] < 0.3 and 0.7 < belief[0, 1, 40] < 0.99


def test_numbers_without_a_candidate_cannot_be_started_from():
    with pytest.raises(ValueError, match=r"kept tokens must lie in 2\.\.65"):
        proxy.logits_around(((65, 1),), proxy.candidates(64, 1))
