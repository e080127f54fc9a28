# SPDX-License-Identifier: Apache-2.0
"""T5: against a NumPy restatement, and the agreements between its ways of running."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import ragged
from adaptive.tokens import TokenSet
from layers.hooks import Reduce
from layers.relative_bias import RelativeBias
from layers.t5 import SHAPES, T5
from tests.layers.toy_t5 import (
    LENGTH,
    MODEL,
    RUNGS,
    SIZES,
    draw,
    reference,
    runner,
    sharpen,
    stack_layers,
    variables,
    with_gate,
)

pytestmark = pytest.mark.usefixtures("digit_gate")

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "params" / "byt5_small.json"


@pytest.mark.parametrize(("softmax", "tied"), [("off_by_one", False), ("standard", True)])
def test_the_dense_model_equals_the_numpy_restatement(softmax, tied):
    model, batch = with_gate(None, softmax=softmax, tie_embeddings=tied), draw()
    logits, aux = runner(model)(variables(tied), *batch)
    np.testing.assert_allclose(logits, reference(variables(tied), batch, SIZES | {"softmax": softmax}), atol=2e-4)
    np.testing.assert_array_equal(aux["tokens"], [[16, 9]] * 3)
    assert aux["delete_gate"] is None and aux["kept"] is None and aux["reduction"] is None


@pytest.mark.parametrize("deletion", [None, "soft", "hard"])
def test_the_amount_of_padding_and_other_rows_do_not_change_the_outputs(deletion):
    model, params = with_gate("mrt5", rungs=RUNGS), sharpen(variables(), 5.0)
    want, _ = runner(model, deletion)(params, *draw(2))
    wider, _ = runner(model, deletion)(params, *draw(2, length=24))
    np.testing.assert_allclose(wider, want, atol=1e-5)
    # The second row beside another first one, which may set another rung.
    beside = [np.stack([other[0], own[1]]) for own, other in zip(draw(2), draw(7, (3, 9)), strict=True)]
    got, _ = runner(model, deletion)(params, *beside)
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    assert not np.allclose(got[0], want[0], atol=1e-2)


def test_the_mask_defaults_to_ids_that_are_not_zero_and_takes_integers():
    ids, mask, _ = draw()
    want, _ = runner()(variables(), ids, mask)
    for given_mask in (None, mask.astype(np.int32)):
        np.testing.assert_array_equal(runner()(variables(), ids, given_mask)[0], want)
    # With an explicit mask id 0 may be a real token.
    ids[0, 3] = 0
    assert runner()(variables(), ids, mask)[1]["tokens"][0, 0] == 16
    assert runner()(variables(), ids)[1]["tokens"][0, 0] == 15


def test_relative_bias_after_compaction_is_the_full_bias_gathered_on_both_axes():
    module = RelativeBias(2, num_buckets=8, max_distance=12)
    params = {"params": {"embedding": np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)}}
    keep = np.random.default_rng(1).random((2, LENGTH)) < 0.5

    @jax.jit
    def run(keep):
        tokens = TokenSet.create(jnp.zeros((2, LENGTH, 1)))
        positions = ragged.compact(keep, LENGTH, overflow="forbid").apply(tokens).coords[..., 0]
        whole = tokens.coords[:1, :, 0]
        return module.apply(params, whole, whole), module.apply(params, positions, positions)

    full, got = run(keep)
    for row in range(2):
        stay, count = np.flatnonzero(keep[row]), keep[row].sum()
        np.testing.assert_array_equal(got[row, :, :count, :count], np.asarray(full)[0][:, stay][:, :, stay])


def test_kernels_that_make_the_bias_from_positions_give_the_same_numbers(monkeypatch):
    model = MODEL.clone(scan_layers=True, encoder_layers=2, gate_layer=1, score_excess=True)
    batch = draw()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *batch))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)

    def loss(params):
        logits, aux = model.apply({"params": params}, *batch, deletion="hard")
        return jnp.sum(jax.nn.log_softmax(logits)[..., 3]), (logits, aux["losses"]["score_excess"][0])

    found = {}
    for name in ("xla", "gpu_interpret"):
        monkeypatch.setattr("pallas_kernels.dispatch.preference", lambda name=name: (name, "xla"))
        # Each is traced anew.
        traced = jax.jit(jax.grad(lambda params: loss(params), has_aux=True)).trace(params)
        assert ("pallas_call" in str(traced.jaxpr)) == (name != "xla")
        found[name] = traced.lower().compile({"xla_backend_optimization_level": "0"})(params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), *found.values())
    tables = [found["xla"][0][name]["embedding"] for name in ("encoder_bias", "decoder_bias")]
    assert all(np.abs(table).max() > 1e-3 for table in tables)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_equal_unrolled_ones(remat):
    batch, params = draw(), sharpen(variables(), 5.0)
    scanned = with_gate("mrt5", rungs=RUNGS, scan_layers=True, remat=remat)
    boxed = jax.eval_shape(scanned.init, jax.random.key(0), *batch)["params"]
    assert jax.tree.map(np.shape, stack_layers(params)) == jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed))
    names = boxed["decoder_stack"]["layer"]["mlp"]["out"]["kernel"].names
    assert names == ("layers", "mlp", "embed")
    for deletion in ("soft", "hard"):
        want, aux = runner(MODEL, deletion)(params, *batch)
        got, scanned_aux = runner(scanned, deletion)(stack_layers(params), *batch)
        np.testing.assert_allclose(got, want, atol=1e-5)
        np.testing.assert_array_equal(scanned_aux["tokens"], aux["tokens"])


@pytest.mark.parametrize("deletion", ["soft", "hard"])
def test_bfloat16_is_close_with_float32_parameters_gates_and_logits(deletion):
    batch = draw(3)
    # Large weights would amplify rounding from layer to layer.
    params = jax.tree.map_with_path(lambda path, x: x if path[-1].key == "scale" else x / 2, variables())
    want, aux = runner(with_gate("by_digit"), deletion)(params, *batch)
    narrow = with_gate("by_digit", dtype=jnp.bfloat16)
    got, narrow_aux = runner(narrow, deletion)(params, *batch)
    assert got.dtype == narrow_aux["delete_gate"].dtype == jnp.float32
    np.testing.assert_array_equal(narrow_aux["kept"], aux["kept"])
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), *batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    assert runner(narrow, deletion)(params, *batch[:2])[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("how", [{"remat": True}, {"scan_layers": True, "remat": True}])
def test_dropout_acts_in_training_only(how):
    batch, model = draw(), with_gate(None, dropout=0.3, **how)
    params = variables()
    if "scan_layers" in how:
        params = stack_layers(params)
        layers = [params.pop(name)["layer"] for name in ("lower_stack", "upper_stack")]
        params["upper_stack"] = {"layer": jax.tree.map(lambda *leaves: np.concatenate(leaves), *layers)}
    still, _ = runner(model)(params, *batch)
    np.testing.assert_allclose(still, runner(with_gate(None))(variables(), *batch)[0], atol=1e-5)
    train = runner(model, None, False)
    first, again, other = (train(params, *batch, rng)[0] for rng in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-3) and not np.allclose(first, still, atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("how", [{}, {"scan_layers": True}])
def test_a_row_of_padding_alone_has_finite_outputs_and_gradients(how, dtype):
    batch = draw(3, (LENGTH, 0))
    params = stack_layers(variables()) if how else variables()
    model = MODEL.clone(dtype=dtype, hard_probability=1.0, score_excess=True, **how)
    run = runner(model, "soft", False).__wrapped__

    def loss(params):
        logits, aux = run(params, *batch)
        return jnp.sum(logits**2) + aux["losses"]["score_excess"][0] + jnp.sum(aux["delete_gate"]), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.all(np.isfinite(logits))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"gate_layer": 4}, r"gate_layer must lie in 1\.\.3 \(the encoder\); got 4"),
        ({"gate_layer": 0}, r"gate_layer must lie in 1\.\.3 \(the encoder\); got 0"),
        ({"hard_probability": -0.1}, r"hard_probability must lie in \[0, 1\]; got -0.1"),
        ({"gate": "tome"}, "gate='tome' is no deletion method; one of .*mrt5"),
        ({"gate": "mrt6"}, "'mrt6'; did you mean 'mrt5'"),
        ({"rungs": (8, 16), "capacity": 8}, "give rungs .* or capacity .*, not both"),
        ({"hooks": (Reduce("tome", (9, 9, 9), place="after"),), "scan_layers": True}, "layers must be unrolled"),
        ({"hooks": (Reduce("tome", (9, 9, 9)),)}, r"\(place='after'\); got place='between'"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(attributes, message):
    with pytest.raises((ValueError, KeyError), match=message):
        jax.eval_shape(MODEL.clone(**attributes).init, jax.random.key(0), *draw())


@pytest.mark.parametrize(
    ("attributes", "deletion", "message"),
    [
        ({}, "medium", r"deletion='medium'; one of \(None, 'soft', 'hard'\)"),
        ({"gate": None}, "soft", "deletion='soft' needs a model with a gate; this one has gate=None"),
        ({"rungs": (4, 8)}, "hard", "the sequence has 16 tokens but the ladder ends at 8"),
        ({"decoder_layers": 0}, None, "no decoder layers, but decoder_input_ids were given"),
        ({"hooks": (Reduce("tome", (16,), place="after"),)}, None, r"counts \(16,\) of 'tome' end before layer 1"),
    ],
)
def test_calls_that_do_not_fit_are_refused(attributes, deletion, message):
    model = MODEL.clone(**attributes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: model.apply({"params": params}, *draw(), deletion=deletion), variables())


@functools.cache
def parameters(name, **attributes):
    """`{path: {"shape", "axes"}}` of a published model, without making any array."""
    ids = jnp.zeros((1, 8), jnp.int32)
    boxed = jax.eval_shape(T5(**SHAPES[name], **attributes).init, jax.random.key(0), ids, None, ids)["params"]
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    return {
        "/".join(key.key for key in path): {"shape": list(leaf.value.shape), "axes": list(leaf.names)}
        for path, leaf in leaves
    }


def size(found):
    return sum(int(np.prod(entry["shape"])) for entry in found.values())


def test_parameters_of_byt5_small_keep_their_names_shapes_and_axes():
    # A changed entry breaks checkpoints: if that is meant, write `parameters("byt5-small")` to the file, one entry a line.
    assert parameters("byt5-small") == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("name", "published"), [("byt5-small", 299_637_760), ("byt5-base", 582e6), ("byt5-large", 1.23e9)]
)
def test_published_sizes(name, published):
    # Scanned layers are traced once.
    assert size(parameters(name, scan_layers=True)) == pytest.approx(
        published, rel=0 if isinstance(published, int) else 2e-3
    )


def test_a_delete_gate_adds_two_numbers_for_each_feature_and_one():
    dense, gated = parameters("byt5-small"), parameters("byt5-small", gate="mrt5")
    assert size(gated) - size(dense) == 2 * 1472 + 1
    assert dense.items() <= gated.items()
    # A gate without parameters of its own adds none.
    assert parameters("byt5-small", gate="fixed_deletion") == dense


@pytest.mark.parametrize("attributes", [{}, {"scan_layers": True}, {"tie_embeddings": True}])
def test_every_parameter_has_a_logical_name_for_each_of_its_axes(attributes):
    found = parameters("byt5-small", gate="mrt5", **attributes)
    assert all(len(entry["shape"]) == len(entry["axes"]) and all(entry["axes"]) for entry in found.values())
    known = {"vocab", "embed", "mlp", "heads", "head_dim", "norm", "buckets", "gate", "layers"}
    assert {axis for entry in found.values() for axis in entry["axes"]} <= known
    assert ("head/kernel" in found) != ("tie_embeddings" in attributes)
