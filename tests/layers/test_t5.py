# SPDX-License-Identifier: Apache-2.0
"""T5 with hooks and a delete gate: against a NumPy restatement, and the agreements between its ways of running."""

import functools
import json
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive import ragged, registry
from adaptive.tokens import TokenSet
from layers.hooks import Reduce
from layers.relative_bias import RelativeBias
from layers.t5 import SHAPES, T5
from tests.layers import numpy_t5

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "params" / "byt5_small.json"
# Few buckets, so that short sequences reach the logarithmic ones.
SIZES = dict(
    vocab_size=40, width=16, mlp_dim=24, heads=2, head_dim=8, encoder_layers=3, decoder_layers=1, num_buckets=8,
    max_distance=12, softmax="off_by_one",
)  # fmt: skip
GATE_LAYER, LENGTH = 2, 16
MODEL = T5(**SIZES, gate="mrt5", gate_layer=GATE_LAYER)
RUNGS = (6, 12, 32)


def by_digit(tokens, signals, *, scale=-30.0):
    """A gate that a test can read off the ids: the last digit says how much of `scale` a token gets, 0 to keep."""
    return jnp.where(tokens.valid, scale * (signals.token_ids % 10) / 9, scale)


@pytest.fixture(scope="module", autouse=True)
def digit_gate():
    registry.register("by_digit", kind="deletion", signals=("token_ids",))(by_digit)
    yield
    registry._RECORDS.pop("by_digit")


def draw(seed=0, lengths=(LENGTH, 9), length=LENGTH, targets=5):
    """Ids without 0 in real tokens, mask, and decoder ids; the same tokens whatever the padding."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((len(lengths), length), np.int32)
    ids[:, :LENGTH] = rng.integers(1, SIZES["vocab_size"], (len(lengths), LENGTH))
    ids *= np.arange(length) < np.array(lengths)[:, None]
    decoder_ids = np.pad(rng.integers(1, SIZES["vocab_size"], (len(lengths), targets - 1)), ((0, 0), (1, 0)))
    return ids, ids != 0, decoder_ids.astype(np.int32)


@functools.cache
def variables(tied=False):
    """Random parameters, large enough that every part of the model shows in the logits."""
    model = MODEL.clone(tie_embeddings=tied)
    ids, mask, decoder_ids = draw()
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), ids, mask, decoder_ids))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def sharpen(params, factor=1e4, bias=0.0):
    """Parameters whose gate is decided: logits far from 0 for every token, about half of them on either side."""
    logit = params["delete_gate"]["logit"]
    logit = {"kernel": logit["kernel"] * factor, "bias": np.full_like(logit["bias"], bias)}
    return params | {"delete_gate": params["delete_gate"] | {"logit": logit}}


@functools.cache
def runner(model=MODEL, deletion=None, deterministic=True):
    def run(params, ids, mask=None, decoder_ids=None, rng=0):
        rngs = {name: jax.random.fold_in(jax.random.key(rng), i) for i, name in enumerate(("deletion", "dropout"))}
        rngs = None if deterministic else rngs
        return model.apply(
            {"params": params}, ids, mask, decoder_ids, deletion=deletion, deterministic=deterministic, rngs=rngs
        )

    # The compiler takes most of the time here; without its optimisations it takes half.
    return jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"})


def with_gate(gate, **attributes):
    return MODEL.clone(gate=gate, **attributes)


# --- Against NumPy ------------------------------------------------------------------------------------------------


def reference(params, batch, sizes=SIZES, **how):
    """Logits of every row; `how` maps a row to what the NumPy encoder takes."""
    rows = []
    for row, (ids, mask, decoder_ids) in enumerate(zip(*batch, strict=True)):
        encoded, key_bias = numpy_t5.encode(
            params, ids, mask, sizes, gate_layer=GATE_LAYER, **{name: make(row) for name, make in how.items()}
        )
        rows.append(numpy_t5.decode(params, decoder_ids, encoded, key_bias, sizes))
    return np.stack(rows)


@pytest.mark.parametrize(("softmax", "tied"), [("off_by_one", False), ("standard", True)])
def test_the_dense_model_equals_the_numpy_restatement(softmax, tied):
    model, batch = with_gate(None, softmax=softmax, tie_embeddings=tied), draw()
    logits, aux = runner(model)(variables(tied), *batch)
    np.testing.assert_allclose(logits, reference(variables(tied), batch, SIZES | {"softmax": softmax}), atol=2e-4)
    np.testing.assert_array_equal(aux["tokens"], [[16, 9]] * 3)
    assert aux["delete_gate"] is None and aux["kept"] is None and aux["reduction"] is None


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


def survivors(ids, mask, capacity=None):
    """What `by_digit` keeps of one row, in order: the lowest last digits where there are too many."""
    stay = [i for i in range(len(ids)) if mask[i] and ids[i] % 10 < 4.5]
    stay = stay or [min((i for i in range(len(ids)) if mask[i]), key=lambda i: ids[i] % 10)]
    return sorted(sorted(stay, key=lambda i: ids[i] % 10)[:capacity])


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


# --- Ways of running agree ----------------------------------------------------------------------------------------


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


def stack_layers(params):
    """Parameters of unrolled layers in the layout of scanned ones."""

    def stacked(prefix, layers):
        return {"layer": jax.tree.map(lambda *leaves: np.stack(leaves), *(params[f"{prefix}_{i}"] for i in layers))}

    rest = {name: value for name, value in params.items() if not re.fullmatch(r"(en|de)coder_\d+", name)}
    return rest | {
        "lower_stack": stacked("encoder", range(GATE_LAYER)),
        "upper_stack": stacked("encoder", range(GATE_LAYER, SIZES["encoder_layers"])),
        "decoder_stack": stacked("decoder", range(SIZES["decoder_layers"])),
    }


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


def gradients(model, deletion, params):
    batch = draw()
    run = runner(model, deletion).__wrapped__

    def loss(params):
        logits, aux = run(params, *batch)
        return jnp.mean(jnp.sin(logits)) + (0 if deletion == "hard" else jnp.mean(aux["delete_gate"]))

    return jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": "0"})(params)


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


def test_hard_deletion_on_a_ladder_is_one_conditional_without_a_transfer_to_the_host():
    run = jax.jit(runner(with_gate("mrt5", rungs=RUNGS), "hard").__wrapped__)
    text = run.lower(variables(), *draw()).compile().as_text()
    branches = re.findall(r" conditional\(.*branch_computations=\{([^}]*)\}", text)
    # The ladder (6, 12, 32) is cut to (6, 12, 16).
    assert len(branches) == 1 and len(branches[0].split(",")) == 3
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback|MoveToHost", text)


# --- Hooks --------------------------------------------------------------------------------------------------------


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


# --- Dropout, noise, errors ---------------------------------------------------------------------------------------


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


# --- Score excess -------------------------------------------------------------------------------------------------


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


def test_the_scale_of_a_gate_moves_its_threshold_too():
    batch = draw(3)
    model = with_gate("by_digit", gate_hyper=(("scale", -8.0),))
    logits, aux = runner(model, "hard")(variables(), *batch)
    assert float(aux["delete_gate"].min()) == -8
    np.testing.assert_allclose(logits, runner(with_gate("by_digit"), "hard")(variables(), *batch)[0], atol=1e-6)


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


# --- Parameters ---------------------------------------------------------------------------------------------------


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
    assert size(parameters(name)) == pytest.approx(published, rel=0 if isinstance(published, int) else 2e-3)


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
