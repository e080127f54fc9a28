# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of layers."""

import pytest

from adaptive import registry
from tests.layers.toy_t5 import by_digit


@pytest.fixture(scope="module")
def digit_gate():
    """Registers a gate that can be read off the ids, under the name "by_digit"."""
    registry.register("by_digit", kind="deletion", signals=("token_ids",))(by_digit)
    yield
    registry._RECORDS.pop("by_digit")
