# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM's model: its uniform paths are dense models, compact runs equal masked ones, and its oracle equals brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from adaptive import flops
from adaptive.routing import oracle, patterns, search
from adaptive.width import duo
from experiments import measure
from layers import generation
from layers.duo_lm import DuoLM
from layers.duo_oracle import as_layered, embed, token_losses

LAYERS = 3
MODEL = DuoLM(vocab_size=40, width=16, layers=LAYERS, heads=4, kv_heads=2, big=32, small=4)
IDS, LABELS = jax.random.randint(jax.random.key(1), (2, 2, 7), 0, 40)


@pytest.fixture(scope="module")
def params():
    """Drawn, routers too, which start from zero: they prefer something then."""
    shapes = jax.eval_shape(lambda: meta.unbox(MODEL.init(jax.random.key(0), IDS, method="soft"))["params"])
    return measure.random_like(shapes, jax.random.key(9), deviation=0.3)


_run = jax.jit(
    lambda params, ids, paths, compact=False: MODEL.apply({"params": params}, ids, paths, compact=compact),
    static_argnames="compact",
)
_in_context = jax.jit(lambda p, ids, paths, context: MODEL.apply({"params": p}, ids, paths, context=context))
_routed = jax.jit(lambda p, threshold: MODEL.apply({"params": p}, IDS, threshold, method="routed"))
_memories = jax.jit(lambda p, paths: MODEL.apply({"params": p}, IDS, paths, method="memories"))


def plain(params, ids, pattern):
    """The model with one pattern for all tokens, in NumPy."""
    x = np.asarray(params["embedding"]["embedding"])[np.asarray(ids)]

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale["scale"])

    def rotate(x):
        half = x.shape[-1] // 2
        angle = np.arange(x.shape[1])[:, None, None] * 10_000.0 ** (-np.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
        )

    for layer, choice in enumerate(pattern):
        block = params[f"block_{layer}"]
        y, kernels = (
            norm(x, block["attention_norm"]),
            {k: np.asarray(v["kernel"]) for k, v in block["attention"].items()},
        )
        query, key, value = (np.einsum("bnd,dhk->bnhk", y, kernels[name]) for name in ("query", "key", "value"))
        query, key, value = rotate(query), np.repeat(rotate(key), 2, axis=2), np.repeat(value, 2, axis=2)
        logits = np.einsum("bqhk,bnhk->bhqn", query, key) / 2.0
        logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        x = x + np.einsum("bhqn,bnhk,hkd->bqd", share, value, kernels["out"])
        if choice != duo.SKIP:
            mlp = {
                k: np.asarray(v["kernel"]) for k, v in block["big_mlp" if choice == duo.BIG else "small_mlp"].items()
            }
            y = norm(x, block["mlp_norm"])
            gate = y @ mlp["gate"]
            x = x + (gate / (1 + np.exp(-gate)) * (y @ mlp["hidden"])) @ mlp["out"]
    return norm(x, params["norm"]) @ np.asarray(params["head"]["kernel"])


@pytest.mark.parametrize("pattern", [(2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 0, 1)])
def test_one_pattern_for_all_is_that_dense_model(params, pattern):
    np.testing.assert_allclose(_run(params, IDS, jnp.asarray(pattern)), plain(params, IDS, pattern), atol=1e-4)


def test_compact_runs_equal_masked_ones_on_any_paths(params):
    paths = duo.random_paths(jax.random.key(3), (*IDS.shape, LAYERS), (0.3, 0.4, 0.3))
    np.testing.assert_allclose(_run(params, IDS, paths, compact=True), _run(params, IDS, paths), atol=1e-5)


def test_no_token_sees_a_later_one_or_another_row(params):
    """Neither through attention nor through sorting rows, with hard routers too."""
    changed = IDS.at[0, 4].set((IDS[0, 4] + 1) % 40)
    routed = jax.jit(lambda ids: MODEL.apply({"params": params}, ids, allow_skip=True, method="routed"))
    first, second = routed(IDS), routed(changed)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one[0, :4], other[0, :4], atol=1e-5)
        np.testing.assert_allclose(one[1], other[1], atol=1e-5)
    assert (jnp.abs(first[0][0, 4:] - second[0][0, 4:]).max(axis=-1) > 1e-4).all()


def test_soft_routers_become_hard_ones_as_they_sharpen(params):
    soft, shares = jax.jit(lambda p: MODEL.apply({"params": p}, IDS, 1e4, method="soft"))(params)
    hard, paths, scores = _routed(params, 0.0)
    assert jnp.abs(scores).min() > 1e-3
    np.testing.assert_allclose(soft, hard, atol=1e-4)
    np.testing.assert_allclose(shares, jax.nn.one_hot(paths, 3), atol=1e-4)
    assert set(np.unique(paths)) == {duo.SMALL, duo.BIG}
    np.testing.assert_allclose(_run(params, IDS, paths), hard, atol=1e-5)


def test_the_threshold_moves_between_all_small_and_all_big(params):
    for threshold, choice in ((jnp.inf, duo.SMALL), (-jnp.inf, duo.BIG)):
        logits, paths, _ = _routed(params, threshold)
        assert (paths == choice).all()
        np.testing.assert_allclose(logits, _run(params, IDS, jnp.full(LAYERS, choice)), atol=1e-5)


def test_macs_count_what_runs():
    dense, small = (flops.count(MODEL, tokens=7, big=b, small=s) for b, s in ((3, 0), (0, 3)))
    assert dense.blocks["big"] == 3 * 3 * 7 * 16 * 32 and small.blocks["small"] == 3 * 3 * 7 * 16 * 4
    projections = 7 * (2 * 16 * 16 + 2 * 16 * 8)
    assert dense.blocks["attention"] == 3 * (projections + 2 * 7 * 7 * 16)
    assert flops.count(MODEL, tokens=7, batch=2).macs == 2 * dense.macs


def test_paths_must_fit(params):
    with pytest.raises(ValueError, match=r"each of 3 layers; got 2"):
        MODEL.apply({"params": params}, IDS, jnp.ones(2, jnp.int32))


# --- Oracles ----------------------------------------------------------------------------------------------------------


def readout(logits):
    return token_losses(logits, LABELS)


def test_token_losses_are_cross_entropies(params):
    logits = _run(params, IDS, jnp.full(LAYERS, 2))
    want = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(LABELS)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(token_losses(logits, LABELS), want, atol=1e-5)


@pytest.mark.parametrize("choices", [(0, 1, 2), (1, 2)])
def test_the_oracle_equals_brute_force_over_forward_passes(params, choices):
    every = np.asarray(choices)[patterns.all_patterns(LAYERS, len(choices))]
    want = np.stack([np.asarray(readout(_run(params, IDS, jnp.asarray(pattern)))) for pattern in every])
    model = as_layered(MODEL, params, readout, choices=choices)
    found = jax.jit(lambda p: oracle.all_losses(model, embed(MODEL, p, IDS), capacity=9))(params)
    np.testing.assert_allclose(found, want, atol=1e-4)
    best = oracle.best_by_cost(found, (every == duo.BIG).sum(axis=1))
    # Losses of different patterns may tie within rounding, so the chosen pattern's true loss is compared.
    for cost in range(LAYERS + 1):
        members = np.flatnonzero((every == duo.BIG).sum(axis=1) == cost)
        chosen = np.take_along_axis(want, np.asarray(best.index[cost])[None], axis=0)[0]
        np.testing.assert_allclose(chosen, want[members].min(axis=0), atol=1e-4)


def test_in_its_own_context_a_run_is_itself(params):
    paths = duo.random_paths(jax.random.key(5), (*IDS.shape, LAYERS), (0.3, 0.4, 0.3))
    context = _memories(params, paths)
    np.testing.assert_allclose(_in_context(params, IDS, paths, context), _run(params, IDS, paths), atol=1e-4)


def test_in_a_fixed_context_a_token_depends_on_its_own_path_alone(params):
    paths = duo.random_paths(jax.random.key(5), (*IDS.shape, LAYERS), (0.3, 0.4, 0.3))
    context = _memories(params, jnp.full(LAYERS, duo.BIG))
    other = paths.at[:, 2].set((paths[:, 2] + 1) % 3)
    first, second = _in_context(params, IDS, paths, context), _in_context(params, IDS, other, context)
    np.testing.assert_array_equal(np.delete(first, 2, axis=1), np.delete(second, 2, axis=1))
    assert (jnp.abs(first[:, 2] - second[:, 2]).max(axis=-1) > 1e-4).all()
    # Without the context, later tokens see the change.
    assert jnp.abs(_run(params, IDS, paths)[:, 3:] - _run(params, IDS, other)[:, 3:]).max() > 1e-4


def test_searches_for_each_token_reach_its_oracle_in_a_fixed_context(params):
    context = _memories(params, jnp.full(LAYERS, duo.SMALL))
    model = as_layered(MODEL, params, readout, context=context)
    best = jax.jit(lambda x: oracle.exhaustive(model, x).within())(embed(MODEL, params, IDS))

    def evaluate(paths):
        return readout(MODEL.apply({"params": params}, IDS, paths, context=context))

    found = jax.jit(lambda: search.beam(evaluate, (1, 1, 1), IDS.shape, 2, model.costs, width=27))()
    np.testing.assert_allclose(found[1], best.loss[2], atol=1e-4)
    greedy = jax.jit(lambda: search.greedy(evaluate, (1, 1, 1), IDS.shape, 2, model.costs))()[1]
    assert (greedy >= found[1] - 1e-5).all()


def test_a_context_of_another_depth_is_refused(params):
    context = _memories(params, jnp.full(LAYERS, 1))
    with pytest.raises(ValueError, match="memories of 3 layers; got 2"):
        as_layered(MODEL, params, readout, context=context[:2])


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_with_a_cache_routes_each_token_as_the_whole_sequence_does(params, side):
    """Also behind padded prompts of 4 and 2 tokens; and big modules are counted by layer."""
    model, lengths, steps = MODEL.clone(threshold=0.05), (4, 2), 3
    ids, mask = np.full((2, 4), 7), np.zeros((2, 4), bool)
    for row, length in enumerate(lengths):
        where = slice(0, length) if side == "right" else slice(4 - length, 4)
        ids[row, where], mask[row, where] = IDS[row, :length], True
    cache, _ = generation.prefill(model, steps, {"params": params}, jnp.asarray(ids), jnp.asarray(mask))
    step = jax.jit(lambda cache, ids, at: model.apply({"params": params}, cache, ids, at, method="decode_step"))
    whole, paths, _ = _routed(params, 0.05)
    places = np.arange(steps) + np.asarray(lengths)[:, None] - 1
    for position in range(steps):
        found, cache = step(cache, IDS[jnp.arange(2), places[:, position]], position)
        np.testing.assert_allclose(found, whole[np.arange(2), places[:, position]], rtol=1e-4, atol=1e-5)
    bigs = np.asarray(paths)[np.arange(2)[:, None], places] == duo.BIG
    np.testing.assert_array_equal(cache.tokens, bigs.sum(axis=1).T)
    assert 0 < bigs.mean() < 1


def test_an_infinite_threshold_decodes_with_the_dense_model(params):
    whole = MODEL.apply({"params": params}, IDS[:, :5], method="all_big")
    output, _ = generation.generate_lm(
        MODEL.clone(threshold=-float("inf")), {"params": params}, IDS[:, :5], max_length=1, eos_id=-1
    )
    np.testing.assert_array_equal(output.tokens[:, 0], whole[:, -1].argmax(axis=-1))
