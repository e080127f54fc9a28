# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

import gc
import os

import hypothesis
import jax
import pytest

# An example that compiles takes as long as the machine is busy. Continuous integration draws the same examples each time,
# so that what passed passes again; runs by hand go on looking for new ones.
hypothesis.settings.register_profile("no_deadline", deadline=None, derandomize=bool(os.environ.get("CI")))
hypothesis.settings.load_profile("no_deadline")


# Minutes each: begun last, they would keep one worker busy when the others are done.
_LONGEST = (
    "test_notebooks.py",
    "test_readme.py",
    "test_studies.py",
    "test_sharded_models.py",
    "test_mrt5.py",
    "test_acm.py",
    "test_duo.py",
)


def pytest_collection_modifyitems(items):
    """The longest files come first."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory():
    """Compiled programs go with the module that made them; kept to the end, they would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
