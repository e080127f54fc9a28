# SPDX-License-Identifier: Apache-2.0
"""The signal of large attention logits that a T5 hands out."""

import jax
import numpy as np
import pytest

from tests.layers import numpy_t5
from tests.layers.toy_t5 import (
    MODEL,
    RUNGS,
    SIZES,
    draw,
    runner,
    sharpen,
    stack_layers,
    survivors,
    variables,
    with_gate,
)

pytestmark = pytest.mark.usefixtures("digit_gate")


def louder(params):
    """Queries large enough for many logits over 5."""
    return jax.tree.map_with_path(
        lambda path, leaf: 8 * leaf if "query" in jax.tree_util.keystr(path) else leaf, params
    )


@pytest.mark.parametrize(("gate_layer", "deletion"), [(2, "soft"), (2, "hard"), (3, "soft"), (1, None)])
def test_the_score_excess_equals_the_numpy_restatement(gate_layer, deletion):
    batch, params = draw(3), louder(variables())
    model = with_gate("by_digit", gate_layer=gate_layer, score_excess=True, rungs=RUNGS)
    logits, aux = runner(model, deletion)(params, *batch)
    total, count = aux["losses"]["score_excess"]
    rows = []
    for row, (ids, mask, decoder_ids) in enumerate(zip(*batch, strict=True)):
        how = {}
        if deletion == "soft":
            how["gate"] = lambda x, ids=ids, mask=mask: np.where(mask, -30.0 * (ids % 10) / 9, -30)
        if deletion == "hard":
            how["keep"] = lambda x, ids=ids, mask=mask: survivors(ids, mask)
        scores = []
        encoded, key_bias = numpy_t5.encode(params, ids, mask, SIZES, gate_layer=gate_layer, scores=scores, **how)
        want = numpy_t5.decode(params, decoder_ids, encoded, key_bias, SIZES, scores=scores)
        np.testing.assert_allclose(logits[row], want, atol=2e-3)
        assert len(scores) == 3 - gate_layer + 1
        rows.append(np.mean([np.mean(np.maximum(logits, 5) - 5) for logits in scores]))
    assert count == 2 and min(rows) > 0.05
    np.testing.assert_allclose(total, sum(rows), rtol=1e-3)


@pytest.mark.parametrize("deletion", ["soft", "hard"])
def test_the_score_excess_is_the_same_scanned_recomputed_on_a_ladder_and_with_more_padding(deletion):
    batch, params = draw(3), sharpen(louder(variables()), 5.0)
    model = MODEL.clone(score_excess=True)
    want = runner(model, deletion)(params, *batch)[1]["losses"]["score_excess"]
    assert float(want[0]) > 0.1
    scanned = model.clone(scan_layers=True, remat=True, rungs=RUNGS)
    wider = draw(3, length=24)
    for got in (
        runner(scanned, deletion)(stack_layers(params), *batch)[1],
        runner(model.clone(rungs=RUNGS), deletion)(params, *wider)[1],
    ):
        np.testing.assert_allclose(got["losses"]["score_excess"], want, rtol=1e-4)


def test_the_score_excess_is_there_only_when_asked_for_and_changes_nothing_else():
    batch = draw()
    plain, aux = runner(MODEL, "soft")(variables(), *batch)
    scored, scored_aux = runner(MODEL.clone(score_excess=True), "soft")(variables(), *batch)
    np.testing.assert_allclose(scored, plain, atol=1e-6)
    assert aux["losses"] == {} and set(scored_aux["losses"]) == {"score_excess"}
    # Without a decoder and with the gate after the last layer there is no map.
    _, none = runner(MODEL.clone(score_excess=True, gate_layer=3), "soft")(variables(), *batch[:2])
    assert none["losses"] == {}


def test_the_gradient_of_the_score_excess_pulls_down_large_logits_only():
    batch, params = draw(3), louder(variables())
    run = runner(MODEL.clone(score_excess=True), "soft").__wrapped__

    def total(params):
        return run(params, *batch)[1]["losses"]["score_excess"][0]

    value, gradient = jax.jit(jax.value_and_grad(total))(params)
    moved = jax.tree.map(lambda leaf, slope: leaf - 1e-3 * slope, params, gradient)
    assert jax.jit(total)(moved) < value
    assert np.any(gradient["encoder_2"]["attention"]["query"]["kernel"])
    assert np.any(gradient["decoder_0"]["cross_attention"]["query"]["kernel"])
    # The last map's values and the decoder's own attention above it have no part in any logit that counts.
    assert not np.any(gradient["decoder_0"]["cross_attention"]["value"]["kernel"])
    quiet = jax.jit(total)(jax.tree.map(lambda leaf: 0.1 * leaf, params))
    assert float(quiet) == 0
