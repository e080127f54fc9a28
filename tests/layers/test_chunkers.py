# SPDX-License-Identifier: Apache-2.0
"""The learned parts of chunking methods by themselves, against NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.tokens import Signals, TokenSet
from layers import chunkers
from layers.byte_model import ByteModel

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 7, 6)).astype(np.float32)
MASK = np.arange(7) < np.array([7, 4])[:, None]
IDS = np.where(MASK, RNG.integers(3, 40, (2, 7)), 0)
TOKENS = TokenSet.create(jnp.asarray(X), mask=jnp.asarray(MASK))


def build(method, **hyper):
    return chunkers.build(method, tuple(hyper.items()), vocab_size=40, mlp_dim=10, heads=2, head_dim=4)


def init(module):
    shapes = nn.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), TOKENS, IDS)))
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


def normed(x):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def test_predicted_logits_are_a_norm_and_a_two_layer_perceptron():
    module = build("boundary_predictor", draws="training", hidden=5)
    # scale 1 everywhere.
    variables = init(module)
    variables["params"]["norm"]["scale"] = np.ones(6, np.float32)
    own = variables["params"]
    found = jax.jit(lambda v: module.apply(v, TOKENS, IDS))(variables)
    hidden = normed(X) @ own["inner"]["kernel"] + own["inner"]["bias"]
    hidden = np.asarray(jax.nn.gelu(hidden, approximate=False))
    logits = (hidden @ own["logit"]["kernel"] + own["logit"]["bias"])[..., 0]
    np.testing.assert_allclose(found.chunks.probability[0, 1:], 1 / (1 + np.exp(-logits[0, :-1])), atol=1e-5)
    np.testing.assert_array_equal(found.features, X)
    fresh = nn.unbox(module.init(jax.random.key(0), TOKENS, IDS))["params"]
    for part in ("inner", "logit"):
        np.testing.assert_array_equal(fresh[part]["bias"], -1)


@pytest.mark.parametrize("objective", ["words", "space_patches", chunkers.ENTROPY_SPIKES])
def test_supervised_boundaries_train_the_predictor_and_not_through_the_pooling(objective):
    lm = dict(lm_width=8, lm_layers=1, lm_heads=1) if objective == chunkers.ENTROPY_SPIKES else {}
    module = build("boundary_predictor", objective=objective, **lm)
    assert not module.draws_in_evaluation

    def gradient(loss):
        def total(params):
            found = module.apply({"params": params}, TOKENS, IDS, deterministic=False)
            return loss(found)

        return jax.jit(jax.grad(total))(init(module)["params"])

    found = jax.jit(lambda v: module.apply(v, TOKENS, IDS))(init(module))
    assert set(found.losses) == {"boundaries"} | ({"next_byte"} if lm else set())
    learned = gradient(lambda found: found.losses["boundaries"][0])
    assert np.any(learned["inner"]["kernel"])
    through = gradient(lambda found: jnp.sum(jnp.sin(module.reduction(found.chunks, 7).reduce(found.features))))
    assert not np.any(through["inner"]["kernel"])


def test_strides_are_pooled_by_a_convolution_with_zeros_for_padding():
    module = build("strided", stride=3)
    variables = init(module)
    variables["params"]["norm"]["scale"] = np.ones(6, np.float32)
    found = jax.jit(lambda v: module.apply(v, TOKENS, IDS))(variables)
    own = variables["params"]["conv"]
    x = np.pad(normed(X) * MASK[..., None], ((0, 0), (0, 2), (0, 0))).reshape(2, 3, 3, 6)
    pooled = np.einsum("bkrd,rde->bke", x, own["kernel"]) + own["bias"]
    want = np.asarray(jax.nn.gelu(pooled, approximate=False))
    got = module.reduction(found.chunks, 7).reduce(found.features)
    np.testing.assert_allclose(got[0, :3], want[0], atol=1e-5)
    np.testing.assert_allclose(got[1, :2], want[1, :2], atol=1e-5)
    fresh = nn.unbox(module.init(jax.random.key(0), TOKENS, IDS))["params"]["conv"]
    bound = (3 * 6) ** -0.5
    assert 0.5 * bound < np.abs(fresh["kernel"]).max() <= bound and np.any(fresh["bias"])


def test_the_mixture_reads_a_convolution_over_what_follows():
    module = build("gbst", blocks=2, consensus=False, stride=2)
    variables = init(module)
    found = jax.jit(lambda v: module.apply(v, TOKENS, IDS))(variables)
    own = variables["params"]
    x = np.pad(X * MASK[..., None], ((0, 0), (0, 1), (0, 0)))
    conv = x[:, :-1] @ own["conv"]["kernel"][0] + x[:, 1:] @ own["conv"]["kernel"][1] + own["conv"]["bias"]
    real = conv[0]
    means = np.stack([real, np.stack([real[i // 2 * 2 : i // 2 * 2 + 2].mean(0) for i in range(7)])], 1)
    scores = (means @ own["score"]["kernel"] + own["score"]["bias"])[..., 0]
    share = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.features[0], (share[..., None] * means).sum(1), atol=1e-5)
    np.testing.assert_array_equal(found.chunks.starts[0], [1, 0, 1, 0, 1, 0, 1])


def test_a_fresh_router_compares_the_states_themselves_and_adds_nothing_back():
    module = build("hnet", target=2.0)
    variables = nn.unbox(module.init(jax.random.key(0), TOKENS, IDS))
    found = jax.jit(lambda v: module.apply(v, TOKENS, IDS))(variables)
    want = registry.get("hnet")(TOKENS, Signals(queries=TOKENS.features, keys=TOKENS.features))
    np.testing.assert_allclose(found.chunks.probability, want.probability, atol=1e-6)
    assert set(found.losses) == {"ratio"} and module.lengthens and not build("hnet", dechunk=False).lengthens


def test_a_patch_is_its_largest_values_plus_attention_to_its_own_bytes():
    module = build("entropy_patches", lm_width=8, lm_layers=1, lm_heads=1, threshold=0.0, longest=3)

    def apply(module, features):
        found = module(TOKENS, IDS)
        reduction = module.reduction(found.chunks, 4)
        return module.shorten(features, reduction), reduction.assign

    variables = nn.unbox(nn.init(apply, module)(jax.random.key(0), X))
    run = jax.jit(lambda features: nn.apply(apply, module)(variables, features))
    patches, number = run(X)
    # Without values the attention adds nothing.
    silent = {
        "params": variables["params"] | {"attention": jax.tree.map(jnp.zeros_like, variables["params"]["attention"])}
    }
    bare, _ = jax.jit(lambda features: nn.apply(apply, module)(silent, features))(X)
    number = np.asarray(number)
    for slot in range(4):
        own = X[0][number[0] == slot]
        np.testing.assert_array_equal(bare[0, slot], own.max(0) if len(own) else np.zeros(6))
    assert not np.allclose(patches[0, 0], bare[0, 0], atol=1e-3)
    moved = X.copy()
    moved[0, -1] += 1.0
    other, _ = run(moved)
    same = np.arange(4) != number[0, -1]
    np.testing.assert_allclose(np.asarray(other)[0][same], np.asarray(patches)[0][same], atol=1e-6)
    assert not np.allclose(np.asarray(other)[0][~same], np.asarray(patches)[0][~same], atol=1e-3)


# --- The byte model -----------------------------------------------------------------------------------------------


def byte_model(ids, mask, scale=1.0):
    module = ByteModel(40, 8, 1, 2)
    variables = nn.unbox(module.init(jax.random.key(0), ids, mask))
    variables = jax.tree.map(lambda leaf: leaf * scale, variables)
    return module, variables, *jax.jit(module.apply)(variables, ids, mask)


def test_entropies_are_those_of_the_next_byte_and_know_nothing_of_it():
    _, _, entropies, (total, rows) = byte_model(IDS, MASK)
    assert np.all(np.asarray(entropies) > 0) and np.all(np.asarray(entropies) < np.log(40))
    later = IDS.copy()
    later[0, 4:] = 5
    _, _, other, _ = byte_model(later, MASK)
    np.testing.assert_allclose(other[0, :4], entropies[0, :4], atol=1e-5)
    assert not np.allclose(other[0, 4:], entropies[0, 4:], atol=1e-3)
    assert float(rows) == 2 and float(total) > 0


def test_a_byte_model_of_zeros_is_uniform():
    _, _, entropies, (total, rows) = byte_model(IDS, MASK, scale=0.0)
    np.testing.assert_allclose(entropies, np.log(40), rtol=1e-5)
    assert float(total) / float(rows) == pytest.approx(np.log(40), rel=1e-5)


def test_a_byte_model_learns_from_its_own_loss_alone():
    module, variables, _, _ = byte_model(IDS, MASK)
    own, through = (
        jax.jit(jax.grad(lambda v, part=part: jnp.sum(part(module.apply(v, IDS, MASK)))))(variables)
        for part in (lambda out: out[1][0], lambda out: out[0])
    )
    assert all(np.any(leaf) for leaf in jax.tree.leaves(own))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(through))
