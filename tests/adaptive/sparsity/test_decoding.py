# SPDX-License-Identifier: Apache-2.0
"""Pages that a decode step reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive.sparsity.decoding import SinkWindow

SLOTS = 128


@functools.cache
def lister(pattern):
    return jax.jit(pattern.pages)


@pytest.mark.parametrize("pattern", [SinkWindow(32, 4, 16), SinkWindow(1, 0, 16), SinkWindow(20, 17, 32)])
@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 100), slot=st.integers(0, SLOTS - 1))
def test_sinks_and_window_are_listed_once_and_little_else(pattern, first, slot):
    first = min(first, slot)
    bias = np.where((np.arange(SLOTS) >= first) & (np.arange(SLOTS) <= slot), 0.0, -np.inf)
    found = lister(pattern)(jnp.asarray(bias[None]), jnp.int32(slot))
    length, numbers = int(found.lengths[0, 0]), np.asarray(found.numbers)[0, 0]
    pages = -(-length // pattern.page)
    listed = numbers[:pages]
    assert len(set(listed)) == pages and np.all(np.diff(listed) > 0) and listed[-1] == slot // pattern.page
    read = np.concatenate([page * pattern.page + np.arange(pattern.page) for page in listed])[:length]
    assert read[-1] == slot
    wanted = set(range(first, min(first + pattern.sinks, slot + 1))) | set(
        range(max(first, slot + 1 - pattern.window), slot + 1)
    )
    assert wanted <= set(read)
    assert pages * pattern.page <= pattern.slots <= pattern.sinks + pattern.window + 4 * pattern.page


@pytest.mark.parametrize("wrong", [{"sinks": -1}, {"window": 0}, {"page": 24}])
def test_what_makes_no_sense_is_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SinkWindow(**wrong)
