# SPDX-License-Identifier: Apache-2.0
"""The controller of the delete gate: regression values, direction, and behaviour in a closed loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.deletion.controller import Controller

update = jax.jit(lambda state, deleted: state.update(deleted, target=0.5))


def loop_controller(rates, target, kp=0.5, ki=1e-5):
    """alpha after each step, in double precision."""
    proportional = integral = 0.0
    for rate in rates:
        proportional = 0.9 * proportional + 0.1 * kp * (target - rate)
        integral += ki * (target - rate)
        yield max(0.0, proportional + integral)


def test_the_first_five_updates_without_any_deletion():
    state, alphas = Controller.create(), []
    for _ in range(5):
        state = update(state, 0.0)
        alphas.append(float(state.alpha))
    np.testing.assert_allclose(alphas, [0.025005, 0.04751, 0.067765, 0.085995, 0.102403], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_updates_equal_the_recurrence_and_alpha_is_never_negative(rates):
    state = Controller.create()
    for rate, want in zip(rates, loop_controller(rates, 0.5), strict=True):
        state = update(state, rate)
        assert float(state.alpha) >= 0
        np.testing.assert_allclose(state.alpha, want, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(
    st.floats(0, 1, width=32),
    st.floats(0, 1, width=32),
    st.lists(st.floats(0, 1, width=32), max_size=5),
)
def test_alpha_never_falls_when_the_error_is_larger(one, other, past):
    state = Controller.create()
    for rate in past:
        state = update(state, rate)
    less, more = sorted((one, other))
    assert float(update(state, less).alpha) >= float(update(state, more).alpha)


def test_alpha_returns_to_zero_after_deleting_too_much_for_long_and_comes_back():
    state = Controller.create()
    for _ in range(200):
        state = update(state, 0.1)
    assert float(state.alpha) > 0.15
    for _ in range(200):
        state = update(state, 0.9)
    assert float(state.alpha) == 0
    for _ in range(200):
        state = update(state, 0.1)
    assert float(state.alpha) > 0.15


def test_gains_and_smoothing_do_what_they_say():
    pure_proportional = Controller.create().update(0.1, target=0.5, kp=2.0, ki=0.0, smoothing=0.0)
    assert float(pure_proportional.alpha) == pytest.approx(0.8)
    pure_integral = Controller.create()
    for _ in range(3):
        pure_integral = pure_integral.update(0.1, target=0.5, kp=0.0, ki=0.25)
    assert float(pure_integral.alpha) == pytest.approx(0.3)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12), st.integers(1, 5))
def test_repeats_are_as_many_updates_with_the_same_share(rates, repeats):
    settings_ = dict(target=0.3, kp=0.4, ki=1e-2)
    together = one_by_one = Controller.create()
    for rate in rates:
        together = together.update(rate, repeats=repeats, **settings_)
        for _ in range(repeats):
            one_by_one = one_by_one.update(rate, **settings_)
    for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(one_by_one), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=40, max_size=40), st.sampled_from([1e-3, 0.03, 0.1]))
def test_with_a_limit_the_integral_stays_in_its_range_and_alpha_near_it(rates, limit):
    def step(state, rate):
        state = state.update(rate, target=0.5, kp=0.2, ki=0.03, windup_limit=limit)
        return state, (state.integral, state.alpha)

    _, (integrals, alphas) = jax.lax.scan(step, Controller.create(), jnp.asarray(rates, jnp.float32))
    assert np.all((np.asarray(integrals) >= 0) & (integrals <= np.float32(limit)))
    # The proportional part is at most kp times the largest error, which is 0.5 here.
    assert np.all((np.asarray(alphas) >= 0) & (alphas <= limit + 0.2 * 0.5 + 1e-6))


def steps_back(limit, first, then):
    """Steps of `then` until alpha leaves (or comes to) 0, after 500 steps of `first`."""

    def step(state, rate):
        state = state.update(rate, target=0.5, kp=0.05, ki=1e-3, windup_limit=limit)
        return state, state.alpha

    rates = jnp.concatenate([jnp.full(500, first), jnp.full(1000, then)])
    alphas = np.asarray(jax.lax.scan(step, Controller.create(), rates)[1])[500:]
    return int(np.argmax(alphas > 0)) if alphas[0] == 0 else int(np.argmax(alphas == 0))


@pytest.mark.parametrize(("first", "then"), [(0.9, 0.4), (0.1, 0.6)])
def test_a_limit_shortens_the_way_back_after_a_long_error_of_one_sign(first, then):
    # Without a limit an error of 0.4 over 500 steps takes an error of 0.1 about 2,000 steps to undo.
    limited, free = steps_back(0.02, first, then), steps_back(None, first, then)
    assert limited < 250 and (free == 0 or free > 3 * limited)


@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
@pytest.mark.parametrize("limit", [None, 0.2])
def test_a_sluggish_plant_comes_within_two_points_of_every_target_and_stays(target, limit):
    # Deletion follows a sigmoid of alpha with a lag of ten steps, from 2 % without any reward; 80 % takes 0.056.
    def plant(alpha):
        return jax.nn.sigmoid(100 * alpha - 4.0)

    def step(carry, _):
        state, deleted = carry
        deleted = 0.9 * deleted + 0.1 * plant(state.alpha)
        return (state.update(deleted, target=target, kp=0.05, ki=2e-3, windup_limit=limit), deleted), deleted

    _, rates = jax.jit(lambda: jax.lax.scan(step, (Controller.create(), jnp.float32(0)), None, length=400))()
    assert np.all(np.abs(np.asarray(rates[300:]) - target) < 0.02)


@pytest.mark.parametrize(("floor", "settles"), [(0.0, False), (-0.1, True)])
def test_a_gate_that_nothing_pulls_back_needs_a_floor_under_zero(floor, settles):
    # Deletion only ever moves with the sign and size of alpha: what is overshot stays, unless alpha may be negative.
    def step(carry, _):
        state, deleted = carry
        deleted = jnp.clip(deleted + 0.5 * state.alpha, 0.0, 1.0)
        return (state.update(deleted, target=0.4, kp=0.5, ki=0.0, floor=floor), deleted), (deleted, state.alpha)

    _, (rates, alphas) = jax.lax.scan(step, (Controller.create(), jnp.float32(0)), None, length=300)
    assert np.all(np.asarray(alphas) >= floor) and (np.min(alphas) < 0) == settles
    assert bool(np.all(np.abs(np.asarray(rates[200:]) - 0.4) < 0.02)) == settles


def test_a_plant_that_deletes_by_itself_gets_no_reward_for_deletion():
    _, alphas = jax.lax.scan(
        lambda state, _: (moved := update(state, 0.6), moved.alpha), Controller.create(), length=50
    )
    np.testing.assert_array_equal(alphas, 0)


def test_a_closed_loop_settles_at_the_target():
    # A gate that deletes more the more it is rewarded for it.
    state, deleted = Controller.create(), 0.0

    def step(carry, _):
        state, deleted = carry
        deleted = 0.9 * deleted + 0.1 * jnp.tanh(5 * state.alpha)
        return (state.update(deleted, target=0.4, ki=1e-3), deleted), deleted

    _, rates = jax.lax.scan(step, (state, jnp.float32(deleted)), None, length=4000)
    np.testing.assert_allclose(rates[-500:], 0.4, atol=0.02)


def test_the_state_is_a_pytree_of_float32_scalars_that_keeps_its_types():
    state = Controller.create(0.25)
    assert float(state.alpha) == 0.25
    moved = update(state, jnp.bfloat16(0.5))
    for leaf in jax.tree.leaves((state, moved)):
        assert leaf.dtype == jnp.float32 and leaf.shape == ()
    assert jax.tree.structure(state) == jax.tree.structure(moved) and len(jax.tree.leaves(state)) == 3


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 50])
def test_a_target_that_is_no_share_is_refused(target):
    with pytest.raises(ValueError, match=rf"must lie in \(0, 1\); got {target}"):
        Controller.create().update(0.0, target=target)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kp": -1.0}, r"kp and ki must not be negative.*got -1.0"),
        ({"ki": -1e-5}, r"kp and ki must not be negative.*-1e-05"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\); got .* and 1.0"),
        ({"repeats": 0}, r"repeats must be at least 1 .*got 0"),
        ({"windup_limit": 0.0}, r"windup_limit positive or None; got 1 and 0.0"),
        ({"floor": 0.1}, r"the floor of alpha must not be positive.*got 0.1"),
    ],
)
def test_gains_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Controller.create().update(0.0, target=0.5, **wrong)
