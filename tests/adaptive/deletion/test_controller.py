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
