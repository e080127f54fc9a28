# SPDX-License-Identifier: Apache-2.0
"""Next-byte examples continue the text that the encoder reads, or stand alone."""

import numpy as np
import pytest

from experiments.data.next_byte import NextByte

IDS = np.arange(3, 23, dtype=np.int32).reshape(2, 10)


def test_labels_follow_what_the_encoder_reads_and_it_ends_with_eos():
    objective = NextByte(context=7, targets_length=4)
    assert objective.window == 10
    batch = objective.examples(IDS, [])
    np.testing.assert_array_equal(batch["input_ids"][:, -1], [1, 1])
    np.testing.assert_array_equal(np.concatenate([batch["input_ids"][:, :-1], batch["labels"]], axis=1), IDS)
    np.testing.assert_array_equal(batch["decoder_input_ids"], [[0, 9, 10, 11], [0, 19, 20, 21]])


def test_with_room_for_the_eos_alone_the_encoder_sees_nothing_else():
    batch = NextByte(context=1, targets_length=10).examples(IDS, [])
    np.testing.assert_array_equal(batch["input_ids"], [[1], [1]])
    np.testing.assert_array_equal(batch["labels"], IDS)
    np.testing.assert_array_equal(batch["decoder_input_ids"][:, 1:], IDS[:, :-1])


@pytest.mark.parametrize("kwargs", [{"context": 0}, {"targets_length": 0}])
def test_bad_lengths_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        NextByte(**kwargs)
