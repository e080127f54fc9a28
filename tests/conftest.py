# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import gc

import hypothesis
import jax
import pytest

# An example that compiles takes as long as the machine is busy.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Compiled programs go with the module that made them; kept to the end, they would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
