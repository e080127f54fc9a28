# SPDX-License-Identifier: Apache-2.0
"""The static schedule as a hook, and signals that follow a reduction."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptive.tokens import DenseReduction, Reduction, Signals, TokenSet
from layers.hooks import Hook, Reduce, follow


def _tokens(length=7):
    return TokenSet.create(jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 4)), jnp.float32))


def test_a_schedule_is_a_value():
    hook = Reduce("tome", [7, 5, 5], place="after")
    assert isinstance(hook, Hook)
    assert hook == Reduce("tome", (7, 5, 5), place="after") and hash(hook) == hash(
        Reduce("tome", (7, 5, 5), place="after")
    )
    assert hook != Reduce("tome", (7, 5, 5)) and hook.signals == ("keys",)


def test_it_acts_where_the_number_changes_and_reduces_to_it():
    hook = Reduce("truncate", (7, 5, 5))
    assert [hook.acts(0, 7), hook.acts(1, 7), hook.acts(2, 5)] == [False, True, False]
    reduction = hook(_tokens(), Signals(layer=1))
    np.testing.assert_array_equal(reduction.slots, np.tile(np.arange(5), (2, 1)))
    assert hook(_tokens(), Signals(layer=0)).num_slots == 7


def test_mistakes_are_refused_when_it_is_made():
    with pytest.raises(KeyError, match="did you mean 'tome'"):
        Reduce("tom", (5,))
    with pytest.raises(ValueError, match="'mrt5' is of kind 'deletion'"):
        Reduce("mrt5", (5,))
    with pytest.raises(ValueError, match="place='before'"):
        Reduce("tome", (5,), place="before")
    with pytest.raises(TypeError, match=r"tome has no hyper-parameter \['ratio'\]"):
        Reduce("tome", (5,), hyper=(("ratio", 0.5),))


def test_mistakes_that_show_later_are_refused_then():
    hook = Reduce("tome", (7, 3))
    with pytest.raises(ValueError, match="end before layer 2"):
        hook.acts(2, 7)
    with pytest.raises(ValueError, match="needs the signal 'keys'"):
        hook(_tokens(), Signals(layer=1))
    with pytest.raises(ValueError, match="at most 3 can go at once; a budget of 3 removes 4"):
        hook(_tokens(), Signals(layer=1, keys=_tokens().features))
    with pytest.raises(ValueError, match=r"9 surviving tokens is outside 1\.\.7"):
        Reduce("truncate", (9,))(_tokens(), Signals(layer=0))


@pytest.mark.parametrize("dense", [False, True])
def test_signals_follow_a_reduction(dense):
    keys = np.arange(12.0, dtype=np.float32).reshape(1, 4, 3)
    sums = np.asarray([[1.0, 2.0, 3.0, 4.0]], np.float32)
    reduction = Reduction(jnp.asarray([[0, 2]]), jnp.asarray([[0, 0, 1, -1]]), jnp.asarray([[0.25, 0.75, 1.0, 0.0]]))
    if dense:
        reduction = DenseReduction(reduction.matrix())
    before = Signals(
        keys=keys, column_sums=sums, attention=np.ones((1, 2, 4, 4)), grid=(1, 2, 2), layer=3, cls_token=True
    )
    after = follow(before, reduction)
    np.testing.assert_allclose(after.keys, [[0.25 * keys[0, 0] + 0.75 * keys[0, 1], keys[0, 2]]])
    np.testing.assert_allclose(after.column_sums, [[3.0, 3.0]])
    assert after.attention is None and after.queries is None
    assert (after.grid, after.layer, after.cls_token) == ((1, 2, 2), 3, True)
