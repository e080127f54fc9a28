# SPDX-License-Identifier: Apache-2.0
"""T5 with a delete gate: soft and hard, against a NumPy restatement, on ladders, and in training."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layers import numpy_t5
from tests.layers.toy_t5 import (
    LENGTH,
    MODEL,
    RUNGS,
    SIZES,
    draw,
    gradients,
    reference,
    runner,
    sharpen,
    stack_layers,
    survivors,
    variables,
    with_gate,
)

pytestmark = pytest.mark.usefixtures("digit_gate")


def test_soft_deletion_fades_the_keys_of_later_layers_and_nothing_else():
    batch = draw()
    logits, aux = runner(MODEL, "soft")(variables(), *batch)

    def gate(row):
        return lambda x: np.where(batch[1][row], -30 / (1 + np.exp(numpy_t5.delete_logits(variables(), x))), -30)

    np.testing.assert_allclose(logits, reference(variables(), batch, gate=gate), atol=2e-4)
    assert np.ptp(np.asarray(aux["delete_gate"])[batch[1]]) > 3
    np.testing.assert_array_equal(aux["delete_gate"][~batch[1]], -30)
    # Queries of faded tokens are still computed: nothing has gone.
    features, encoder_aux = runner(MODEL, "soft")(variables(), *batch[:2])
    for row in range(2):
        want, _ = numpy_t5.encode(variables(), batch[0][row], batch[1][row], SIZES, gate=gate(row))
        np.testing.assert_allclose(features[row][batch[1][row]], want[batch[1][row]], atol=2e-4)
    np.testing.assert_array_equal(encoder_aux["tokens"], [[16, 9]] * 3)


@pytest.mark.parametrize(("how", "capacity"), [({}, None), ({"rungs": RUNGS}, None), ({"capacity": 5}, 5)])
def test_hard_deletion_equals_dropping_the_rows_in_numpy(how, capacity):
    batch = draw(3)
    logits, aux = runner(with_gate("by_digit", **how), "hard")(variables(), *batch)
    stay = [survivors(*row, capacity) for row in zip(*batch[:2], strict=True)]
    assert 1 < len(stay[1]) < len(stay[0]) < LENGTH and (capacity is None or len(stay[0]) == capacity)
    np.testing.assert_allclose(logits, reference(variables(), batch, keep=lambda row: lambda x: stay[row]), atol=2e-4)
    np.testing.assert_array_equal(aux["tokens"], [[16, 9], *[[len(row) for row in stay]] * 2])
    for row in range(2):
        np.testing.assert_array_equal(np.flatnonzero(aux["kept"][row]), stay[row])


def test_the_encoder_alone_returns_survivors_left_packed_with_zeros_behind():
    ids, mask, _ = draw(3)
    features, _ = runner(with_gate("by_digit", rungs=RUNGS), "hard")(variables(), ids, mask)
    assert features.shape == (2, LENGTH, SIZES["width"])
    for row in range(2):
        stay = survivors(ids[row], mask[row])
        want, _ = numpy_t5.encode(variables(), ids[row], mask[row], SIZES, keep=lambda x, stay=stay: stay)
        np.testing.assert_allclose(features[row, : len(stay)], want, atol=2e-4)
        np.testing.assert_array_equal(features[row, len(stay) :], 0)


def test_a_gate_after_the_last_layer_acts_on_cross_attention_alone():
    batch, model = draw(3), with_gate("by_digit", gate_layer=3, rungs=RUNGS)
    stay = [survivors(*row) for row in zip(*batch[:2], strict=True)]
    logits, aux = runner(model, "hard")(variables(), *batch)
    dense, _ = runner(with_gate(None))(variables(), *batch[:2])
    want = [
        numpy_t5.decode(variables(), batch[2][row], np.asarray(dense)[row, stay[row]], np.zeros(len(stay[row])), SIZES)
        for row in range(2)
    ]
    np.testing.assert_allclose(logits, want, atol=2e-4)
    np.testing.assert_array_equal(aux["tokens"], [[16, 9], [16, 9], [len(row) for row in stay]])


def test_a_gate_of_zero_everywhere_is_the_dense_model_exactly():
    batch = draw()
    open_gate = sharpen(variables(), 0.0, bias=1e4)
    dense, _ = runner()(open_gate, *batch)
    for model in (MODEL, with_gate("no_deletion")):
        soft, aux = runner(model, "soft")(open_gate, *batch)
        np.testing.assert_array_equal(aux["delete_gate"], np.where(batch[1], 0, -30))
        np.testing.assert_array_equal(soft, dense)
    hard, aux = runner(with_gate("mrt5", rungs=RUNGS), "hard")(open_gate, *batch)
    np.testing.assert_allclose(hard, dense, atol=1e-5)
    np.testing.assert_array_equal(aux["tokens"], [[16, 9]] * 3)


@pytest.mark.parametrize("scan", [False, True])
def test_hard_and_soft_deletion_agree_where_the_gate_is_decided(scan):
    batch, params = draw(), sharpen(variables())
    params, model = stack_layers(params) if scan else params, MODEL.clone(scan_layers=scan)
    (soft, aux), (hard, hard_aux) = runner(model, "soft")(params, *batch), runner(model, "hard")(params, *batch)
    gate, kept = np.asarray(aux["delete_gate"]), np.asarray(aux["kept"])
    assert np.all((gate > -1e-6) | (gate < -30 + 1e-6)) and 0 < kept.sum() < batch[1].sum()
    np.testing.assert_allclose(hard, soft, atol=1e-5)
    np.testing.assert_array_equal(hard_aux["kept"], kept)
    ladder, _ = runner(model.clone(rungs=RUNGS), "hard")(params, *batch)
    np.testing.assert_allclose(ladder, soft, atol=1e-5)
    soft_features, hard_features = (runner(model, how)(params, *batch[:2])[0] for how in ("soft", "hard"))
    for row in range(2):
        np.testing.assert_allclose(hard_features[row, : kept[row].sum()], soft_features[row][kept[row]], atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(bias=st.floats(-8, 8), seed=st.integers(0, 1000), lengths=st.tuples(st.integers(1, 16), st.integers(1, 16)))
def test_the_ladder_never_changes_a_result(bias, seed, lengths):
    batch, params = draw(seed, lengths), sharpen(variables(), 2.0, bias)
    want, aux = runner(MODEL, "hard")(params, *batch)
    got, ladder_aux = runner(with_gate("mrt5", rungs=RUNGS), "hard")(params, *batch)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(ladder_aux["tokens"], aux["tokens"])


@pytest.mark.parametrize("deletion", ["soft", "hard"])
def test_recomputation_and_the_ladder_do_not_change_gradients(deletion):
    params = sharpen(variables(), 5.0)
    params = {name: leaf for name, leaf in params.items() if name != "encoder_2"}
    small = dict(encoder_layers=2, gate_layer=1)
    want = gradients(with_gate("mrt5", **small), deletion, params)
    got = gradients(with_gate("mrt5", rungs=(8, 16), remat=True, **small), deletion, params)
    for (path, first), second in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5, err_msg=jax.tree_util.keystr(path))
        # Hard deletion is a choice: no gradient reaches the gate. Everything else is trained.
        trained = deletion == "soft" or "delete_gate" not in jax.tree_util.keystr(path)
        assert np.any(np.asarray(second) != 0) == trained, path


def test_hard_deletion_on_a_ladder_is_one_conditional_without_a_transfer_to_the_host():
    run = jax.jit(runner(with_gate("mrt5", rungs=RUNGS), "hard").__wrapped__)
    text = run.lower(variables(), *draw()).compile().as_text()
    branches = re.findall(r" conditional\(.*branch_computations=\{([^}]*)\}", text)
    # The ladder (6, 12, 32) is cut to (6, 12, 16).
    assert len(branches) == 1 and len(branches[0].split(",")) == 3
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback|MoveToHost", text)


def test_gumbel_noise_acts_in_training_only():
    batch, model = draw(), with_gate("mrt5", gate_hyper=(("gumbel", True),))
    still = runner(model, "soft")(variables(), *batch)[1]["delete_gate"]
    np.testing.assert_array_equal(still, runner(MODEL, "soft")(variables(), *batch)[1]["delete_gate"])
    noisy, other = (runner(model, "soft", False)(variables(), *batch, rng)[1]["delete_gate"] for rng in (0, 1))
    assert not np.allclose(noisy, still) and not np.allclose(noisy, other)


@pytest.mark.parametrize("scan", [False, True])
def test_soft_deletion_in_training_is_hard_deletion_with_probability_1_and_never_with_0(scan):
    batch, params = draw(), sharpen(variables(), 5.0)
    params, base = stack_layers(params) if scan else params, MODEL.clone(scan_layers=scan)
    (soft, aux), (hard, _) = (runner(base, deletion)(params, *batch) for deletion in ("soft", "hard"))
    assert not np.allclose(soft, hard, atol=1e-3)
    for probability, want in ((0.0, soft), (1.0, hard)):
        model = base.clone(hard_probability=probability)
        train, train_aux = runner(model, "soft", False)(params, *batch)
        np.testing.assert_allclose(train, want, atol=1e-5)
        # What is regularised and counted is the gate itself, whatever the keys get.
        np.testing.assert_allclose(train_aux["delete_gate"], aux["delete_gate"], atol=1e-6)
        np.testing.assert_allclose(runner(model, "soft")(params, *batch)[0], soft, atol=1e-5)


def test_a_batch_is_hard_or_soft_by_the_key():
    batch, params = draw(), sharpen(variables(), 5.0)
    run = runner(MODEL.clone(hard_probability=0.5), "soft", False)
    found = [np.asarray(run(params, *batch, rng)[0]) for rng in range(12)]
    soft, hard = (np.asarray(runner(MODEL, deletion)(params, *batch)[0]) for deletion in ("soft", "hard"))
    is_hard = [np.allclose(logits, hard, atol=1e-5) for logits in found]
    assert 0 < sum(is_hard) < 12
    assert all(one or np.allclose(logits, soft, atol=1e-5) for one, logits in zip(is_hard, found, strict=True))


def test_the_logits_of_a_learned_gate_are_handed_out_without_noise():
    batch, model = draw(), with_gate("mrt5", gate_hyper=(("gumbel", True),))
    still = runner(MODEL, "soft")(variables(), *batch)[1]
    noisy = runner(model, "soft", False)(variables(), *batch)[1]
    np.testing.assert_array_equal(noisy["gate_logits"], still["gate_logits"])
    want = np.where(batch[1], -30 / (1 + np.exp(still["gate_logits"])), -30)
    np.testing.assert_allclose(still["delete_gate"], want, rtol=1e-5)
    assert runner(with_gate("by_digit"), "soft")(variables(), *batch)[1]["gate_logits"] is None


def test_the_scale_of_a_gate_moves_its_threshold_too():
    batch = draw(3)
    model = with_gate("by_digit", gate_hyper=(("scale", -8.0),))
    logits, aux = runner(model, "hard")(variables(), *batch)
    assert float(aux["delete_gate"].min()) == -8
    np.testing.assert_allclose(logits, runner(with_gate("by_digit"), "hard")(variables(), *batch)[0], atol=1e-6)
