# SPDX-License-Identifier: Apache-2.0
"""T5 with reductions between its layers."""

import numpy as np
import pytest

from layers.hooks import Reduce
from tests.layers import numpy_t5
from tests.layers.toy_t5 import SIZES, draw, reference, runner, survivors, variables, with_gate

pytestmark = pytest.mark.usefixtures("digit_gate")


def hooked(*hooks, **attributes):
    return with_gate(attributes.pop("gate", None), hooks=hooks, **attributes)


def test_tome_on_keys_merges_after_a_layer_and_conserves_mass():
    batch = draw(lengths=(16, 16))
    logits, aux = runner(hooked(Reduce("tome", (12, 12, 9), place="after")))(variables(), *batch)
    np.testing.assert_array_equal(aux["tokens"], [[12, 12], [12, 12], [9, 9]])
    assert aux["token_set"].features.shape[1] == aux["reduction"].num_slots == 9
    np.testing.assert_allclose(aux["token_set"].mass.sum(-1), 16, rtol=1e-6)
    np.testing.assert_array_equal(aux["token_set"].origin, aux["reduction"].assign)
    dense, _ = runner(with_gate(None))(variables(), *batch)
    assert np.all(np.isfinite(logits)) and not np.allclose(logits, dense, atol=1e-3)
    kept, _ = runner(hooked(Reduce("tome", (16, 16, 16), place="after")))(variables(), *batch)
    np.testing.assert_array_equal(kept, dense)


def test_tokens_pruned_by_a_hook_are_gone_from_later_layers_in_numpy_too():
    batch = draw(lengths=(16, 12))
    logits, _ = runner(hooked(Reduce("truncate", (16, 6, 6), place="after")))(variables(), *batch)
    want = reference(variables(), batch, keep=lambda row: lambda x: np.arange(6))
    np.testing.assert_allclose(logits, want, atol=2e-4)


def test_a_hook_after_the_gate_reduces_what_hard_deletion_leaves_and_is_counted():
    batch = draw(3)
    model = hooked(Reduce("truncate", (16, 16, 4), place="after"), gate="by_digit", capacity=8)
    stay = [survivors(*row, 8) for row in zip(*batch[:2], strict=True)]
    logits, aux = runner(model, "hard")(variables(), *batch)
    np.testing.assert_array_equal(
        aux["tokens"], [[16, 9], [len(row) for row in stay], [min(len(row), 4) for row in stay]]
    )
    plain, _ = runner(with_gate("by_digit", capacity=8), "hard")(variables(), *batch[:2])
    for row in range(2):
        left = stay[row][:4]
        want = numpy_t5.decode(
            variables(), batch[2][row], np.asarray(plain)[row, : len(left)], np.zeros(len(left)), SIZES
        )
        np.testing.assert_allclose(logits[row], want, atol=2e-4)


def test_a_second_hook_at_a_layer_sees_the_tokens_that_the_first_one_left():
    batch = draw(lengths=(16, 16))
    pair = hooked(
        Reduce("tome", (12, 12, 12), place="after"), Reduce("tome", (8, 12, 12), place="after"), encoder_layers=1
    )
    _, aux = runner(pair)(variables(), *batch)
    np.testing.assert_array_equal(aux["tokens"], [[8, 8]])
    np.testing.assert_allclose(aux["token_set"].mass.sum(-1), 16, rtol=1e-6)
