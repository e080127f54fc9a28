# SPDX-License-Identifier: Apache-2.0
"""T5 on chunks: against a NumPy restatement, and the agreements between its ways of running."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers import t5
from layers.hooks import Reduce
from layers.t5 import T5
from tests.layers import numpy_t5

SIZES = dict(
    vocab_size=300, width=16, mlp_dim=24, heads=2, head_dim=8, encoder_layers=2, decoder_layers=1, num_buckets=8,
    max_distance=12, softmax="off_by_one",
)  # fmt: skip
LENGTH = 16
RUNGS = (10, 32)
# Few and small parts, so that the learned ones compile quickly; the entropy of an untrained byte model is 5.7 nats at most.
SMALL_LM = (("lm_heads", 1), ("lm_layers", 1), ("lm_width", 8))
CHUNKERS = {
    "words": {},
    "strided": dict(chunk_hyper=(("stride", 3),)),
    "boundary_predictor": dict(chunk_hyper=(("draws", "training"),)),
    "hnet": {},
    "hnet_short": dict(chunker="hnet", chunk_hyper=(("dechunk", False),)),
    "entropy_patches": dict(chunk_hyper=(*SMALL_LM, ("threshold", 5.56))),
    "gbst": dict(chunk_layer=0),
}


def model(name, **attributes):
    return T5(**{**SIZES, "chunker": name, "chunk_layer": 1, **CHUNKERS.get(name, {}), **attributes})


def batch(length=LENGTH):
    """Text of two rows, padded."""
    ids = np.zeros((2, length), np.int32)
    for row, text in enumerate((b"the cat sat, ok.", b"two words")):
        ids[row, : len(text)] = np.frombuffer(text, np.uint8) + 3
    return ids, ids != 0, np.random.default_rng(0).integers(3, 259, (2, 4)).astype(np.int32)


# What the words of `batch` are.
WORDS = (((0, 1, 2), (3, 4, 5, 6), (7, 8, 9, 10, 11), (12, 13, 14, 15)), ((0, 1, 2), (3, 4, 5, 6, 7, 8)))


@functools.cache
def variables(module):
    """Random parameters, large enough that every part of the model shows in the logits."""
    inputs = batch() if module.decoder_layers else batch()[:2]
    shapes = nn.unbox(jax.eval_shape(module.clone(rungs=None).init, jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def runner(module, deterministic=True):
    def run(params, ids, mask=None, decoder_ids=None, rng=0):
        rngs = {"chunking": jax.random.key(rng)}
        return module.apply({"params": params}, ids, mask, decoder_ids, deterministic=deterministic, rngs=rngs)

    return jax.jit(run, compiler_options={"xla_backend_optimization_level": "0"})


def run(module, params=None, inputs=None, deterministic=True, **how):
    params = variables(module) if params is None else params
    return runner(module, deterministic)(params, *(batch() if inputs is None else inputs), **how)


# --- Against NumPy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk_layer", "local"), [(0, False), (1, False), (1, True), (2, True)])
def test_words_equal_the_numpy_restatement(chunk_layer, local):
    module = model("words", chunk_layer=chunk_layer, chunk_local=local, rungs=RUNGS)
    logits, aux = run(module)
    ids, mask, decoder_ids = batch()
    for row in range(2):
        encoded, key_bias = numpy_t5.encode(
            variables(module),
            ids[row],
            mask[row],
            SIZES,
            chunks=[list(word) for word in WORDS[row]],
            local=local,
            gate_layer=chunk_layer,
        )
        want = numpy_t5.decode(variables(module), decoder_ids[row], encoded, key_bias, SIZES)
        np.testing.assert_allclose(logits[row], want, atol=2e-4)
        np.testing.assert_array_equal(np.flatnonzero(aux["chunks"].starts[row]), [word[0] for word in WORDS[row]])
    before = [[16, 9]] * max(chunk_layer - 1, 0)
    np.testing.assert_array_equal(aux["tokens"], [*before, *[[4, 2]] * (2 - len(before))])


def test_in_a_hierarchical_model_a_byte_changes_its_word_alone_before_the_upper_layers():
    how = dict(chunk_local=True, decoder_layers=0, chunk_hyper=(("pool", "first"),))
    below, whole = model("words", chunk_layer=2, **how), model("words", chunk_layer=1, **how)
    ids, mask, _ = batch()
    other = ids.copy()
    other[0, 5] += 1
    first, second = (np.asarray(run(below, inputs=(x, mask))[0]) for x in (ids, other))
    np.testing.assert_array_equal(first[1], second[1])
    changed = np.abs(first[0] - second[0]).max(-1) > 1e-6
    np.testing.assert_array_equal(changed, np.arange(LENGTH) == 1)
    first, second = (np.asarray(run(whole, inputs=(x, mask))[0]) for x in (ids, other))
    np.testing.assert_array_equal(np.abs(first[0] - second[0]).max(-1) > 1e-6, np.arange(LENGTH) < 4)


# --- Ways of running agree ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHUNKERS)
def test_the_ladder_and_training_change_nothing_where_nothing_is_drawn(name):
    want, aux = run(model(name))
    count = np.asarray(aux["tokens"][-1])
    assert np.all(count < [16, 9]) and np.all(count > 1)
    # The ladder, and more padding.
    got, ladder_aux = run(model(name, rungs=RUNGS), inputs=batch(24))
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(ladder_aux["tokens"], aux["tokens"])
    for loss in aux["losses"]:
        np.testing.assert_allclose(ladder_aux["losses"][loss], aux["losses"][loss], rtol=1e-5)
    if name != "boundary_predictor":
        trained, train_aux = run(model(name, capacity=LENGTH), deterministic=False)
        np.testing.assert_allclose(trained, want, atol=1e-5)
        np.testing.assert_array_equal(train_aux["chunks"].starts, aux["chunks"].starts)


def test_drawn_boundaries_differ_from_key_to_key_and_in_evaluation_when_asked():
    always = model("boundary_predictor", chunk_hyper=(("draws", "always"),))
    assert always.draws_chunks and not model("boundary_predictor").draws_chunks and not model(None).draws_chunks
    for module, deterministic in ((model("boundary_predictor"), False), (always, True)):
        first, again, other = (
            run(module, deterministic=deterministic, rng=rng)[1]["chunks"].starts for rng in (0, 0, 1)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_without_its_chunker_it_is_the_dense_model_over_the_same_parameters(scan_layers):
    module = model("boundary_predictor", scan_layers=scan_layers)
    dense, aux = run(module.clone(chunker=None), variables(module))
    assert aux["chunks"] is None and aux["losses"] == {}
    np.testing.assert_array_equal(aux["tokens"], [[16, 9]] * 2)
    if not scan_layers:
        np.testing.assert_array_equal(dense, run(T5(**SIZES), variables(module))[0])


def test_scanned_layers_equal_unrolled_ones():
    module = model("words", rungs=RUNGS)
    params = dict(variables(module))
    for stack, layer in (("lower_stack", "encoder_0"), ("upper_stack", "encoder_1"), ("decoder_stack", "decoder_0")):
        params[stack] = {"layer": jax.tree.map(lambda leaf: leaf[None], params.pop(layer))}
    got, aux = run(module.clone(scan_layers=True), params)
    np.testing.assert_allclose(got, run(module)[0], atol=1e-5)
    np.testing.assert_array_equal(aux["tokens"], [[4, 2]] * 2)


def test_a_capacity_lets_the_last_chunk_grow():
    logits, aux = run(model("words", capacity=3), variables(model("words")))
    np.testing.assert_array_equal(aux["tokens"], [[3, 2]] * 2)
    ids, mask, decoder_ids = batch()
    merged = [list(WORDS[0][0]), list(WORDS[0][1]), [*WORDS[0][2], *WORDS[0][3]]]
    encoded, bias = numpy_t5.encode(variables(model("words")), ids[0], mask[0], SIZES, chunks=merged, gate_layer=1)
    want = numpy_t5.decode(variables(model("words")), decoder_ids[0], encoded, bias, SIZES)
    np.testing.assert_allclose(logits[0], want, atol=2e-4)


def test_the_encoder_alone_returns_chunks_left_packed_or_bytes_again():
    for name, filled in (("hnet_short", None), ("hnet", [16, 9])):
        features, aux = run(model(name, rungs=RUNGS, decoder_layers=0), inputs=batch()[:2])
        assert features.shape == (2, LENGTH, SIZES["width"])
        filled = np.asarray(aux["tokens"][-1]) if filled is None else filled
        np.testing.assert_array_equal(np.any(features, -1).sum(-1), filled)
        for row in range(2):
            assert np.all(np.any(features[row, : filled[row]], -1))


def test_chunks_on_a_ladder_are_one_conditional_without_a_transfer_to_the_host():
    module = model("hnet", rungs=RUNGS)
    text = runner(module).lower(variables(module), *batch()).compile().as_text()
    branches = re.findall(r" conditional\(.*branch_computations=\{([^}]*)\}", text)
    assert len(branches) == 1 and len(branches[0].split(",")) == 2
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback|MoveToHost", text)


@pytest.mark.parametrize("name", ["boundary_predictor", "hnet", "hnet_short", "strided", "gbst", "entropy_patches"])
def test_gradients_are_finite_and_reach_every_learned_part(name):
    module = model(name, encoder_layers=1)

    def loss(params):
        logits, aux = runner(module, False).__wrapped__(params, *batch())
        task = jnp.mean(jnp.sin(logits))
        # A byte model learns from its own loss alone.
        return task + sum(aux["losses"][key][0] for key in aux["losses"] if key == "next_byte")

    gradient = jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": "0"})(variables(module))
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)


# --- Attributes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"chunk_layer": 3}, r"chunk_layer must lie in 0\.\.2 \(the encoder\); got 3"),
        ({"chunker": "tome"}, "chunker='tome' is no chunking method; one of .*'words'"),
        ({"chunker": "word"}, "'word'; did you mean 'words'"),
        ({"gate": "mrt5", "gate_layer": 1}, "chunker='words' and gate='mrt5' would both shorten the encoder"),
        ({"hooks": (Reduce("tome", (9, 9), place="after"),)}, "chunker='words' and hooks would both shorten"),
        ({"chunker": "hnet", "chunk_local": True}, "reads ids alone; got chunk_layer=1 and chunker='hnet'"),
        ({"chunk_layer": 0, "chunk_local": True}, "a chunk_layer over 0 .* got chunk_layer=0"),
        ({"chunk_hyper": (("stride", 2),)}, r"words has no hyper-parameter \['stride'\]; it has \['longest', 'pool'\]"),
        ({"chunker": "boundary_predictor", "chunk_hyper": (("objective", "hnet"),)}, "objective='hnet' gives no bound"),
        ({"chunker": "boundary_predictor", "chunk_hyper": (("draws", "never"),)}, "draws='never'; one of 'always'"),
        ({"rungs": (4, 8)}, None),
    ],
)
def test_attributes_that_do_not_fit_are_refused(attributes, message):
    module = model("words").clone(**attributes)
    if message is None:
        message = "the sequence has 16 tokens but the ladder ends at 8"
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda params: module.apply({"params": params}, *batch()), variables(model("words")))
        return
    with pytest.raises((ValueError, KeyError, TypeError), match=message):
        jax.eval_shape(module.init, jax.random.key(0), *batch())


@pytest.mark.parametrize("name", CHUNKERS)
def test_every_parameter_has_a_logical_name_for_each_of_its_axes(name):
    boxed = jax.eval_shape(model(name).init, jax.random.key(0), *batch())["params"].get("chunking", {})
    known = {"vocab", "embed", "mlp", "heads", "head_dim", "norm", "position", "gate"}
    for leaf in jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)):
        assert len(leaf.names) == leaf.value.ndim and set(leaf.names) <= known


def test_mrt5_s_baselines_have_the_published_numbers_of_parameters():
    shape = t5.SHAPES["byt5-small"]

    def size(name, **attributes):
        module = T5(**{**shape, "encoder_layers": 1, "decoder_layers": 0}, chunker=name, chunk_layer=1, **attributes)
        ids = jnp.zeros((1, 8), jnp.int32)
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), ids)["params"]))

    dense = size(None)
    width, hidden = shape["width"], shape["mlp_dim"]
    assert size("boundary_predictor") - dense == width + (width + 1) * hidden + hidden + 1
    assert size("strided", chunk_hyper=(("stride", 3),)) - dense == width + 3 * width * width + width
    assert size("words") == dense
