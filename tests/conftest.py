# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import gc

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Compiled programs go with the module that made them; kept to the end, they would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
