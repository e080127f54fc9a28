# SPDX-License-Identifier: Apache-2.0
"""Next-token examples: labels are the ids one place further on."""

import numpy as np
import pytest

from experiments.data.next_token import NextToken


def test_labels_are_the_ids_one_place_further_on():
    ids = np.arange(3, 23, dtype=np.int32).reshape(2, 10)
    objective = NextToken(length=9)
    assert objective.window == 10
    batch = objective.examples(ids, [])
    assert set(batch) == {"input_ids", "labels"}
    np.testing.assert_array_equal(batch["input_ids"], ids[:, :9])
    np.testing.assert_array_equal(batch["labels"], ids[:, 1:])


def test_a_length_without_a_label_is_refused():
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        NextToken(length=0)
