# SPDX-License-Identifier: Apache-2.0
"""The entrance exam: every registered method runs through the same matrix; a new entry is examined without a line here."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import budgets, registry
from adaptive.chunking import chunks as chunks_lib
from adaptive.deletion import gate as deletion_gate
from adaptive.tokens import DenseReduction, Reduction, Signals, TokenSet

BATCH, LENGTH, WIDTH = 3, 12, 6
REDUCTIONS = registry.names("reduction")
DELETIONS = registry.names("deletion")
CHUNKINGS = registry.names("chunking")
# identity ignores its budget by design.
SHRINKING = tuple(name for name in REDUCTIONS if name != "identity")


def make_signals(name, seed=0, cls_token=True):
    """All signals that a method asks for, and no other."""
    rng = np.random.default_rng(seed)
    attention = rng.random((BATCH, 2, LENGTH, LENGTH)).astype(np.float32)
    attention /= attention.sum(-1, keepdims=True)
    available = dict(
        keys=rng.normal(size=(BATCH, LENGTH, 4)).astype(np.float32),
        queries=rng.normal(size=(BATCH, LENGTH, 4)).astype(np.float32),
        values=rng.normal(size=(BATCH, LENGTH, 4)).astype(np.float32),
        attention=attention,
        cls_attention=attention[:, :, 0].mean(1),
        column_sums=attention.sum(2).mean(1),
        text_attention=rng.random((BATCH, 3, LENGTH)).astype(np.float32),
        token_ids=rng.integers(3, 259, (BATCH, LENGTH)),
        gate_logits=rng.normal(size=(BATCH, LENGTH)).astype(np.float32) * 3,
        boundary_logits=rng.normal(size=(BATCH, LENGTH)).astype(np.float32),
        entropies=rng.uniform(0, 3, (BATCH, LENGTH)).astype(np.float32),
        rng=jax.random.key(seed),
    )
    needs = registry.describe(name).signals
    found = {key: value if key == "rng" else jnp.asarray(value) for key, value in available.items() if key in needs}
    return Signals(**found, cls_token=cls_token, grid=(1, 3, 4), layer=0)


def make_tokens(dtype=jnp.float32, lengths=(LENGTH, LENGTH, LENGTH), seed=1):
    rng = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    features = jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), dtype)
    return TokenSet.create(features, mask=jnp.asarray(mask), mass=jnp.asarray(rng.integers(1, 4, (BATCH, LENGTH))))


# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def compiled(name, budget):
    return _jit(lambda tokens, signals: registry.get(name)(tokens, signals, budget))


def run(name, tokens, signals, budget=8) -> Reduction:
    return compiled(name, budget)(tokens, signals)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SHRINKING)
def test_shapes_and_dtypes(name, dtype):
    tokens = make_tokens(dtype)
    out = run(name, tokens, make_signals(name))
    reduced = out.apply(tokens)
    chex.assert_shape(reduced.features, (BATCH, 8, WIDTH))
    assert reduced.features.dtype == dtype and reduced.mass.dtype == jnp.float32
    chex.assert_shape(out.matrix(), (BATCH, 8, LENGTH))
    chex.assert_shape(out.restore(reduced.features), (BATCH, LENGTH, WIDTH))
    assert np.all(np.isfinite(np.asarray(reduced.features, np.float32)))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_budget_of_all_tokens_is_the_identity(name):
    tokens = make_tokens(lengths=(12, 9, 5))
    reduced = registry.get(name)(tokens, make_signals(name), LENGTH).apply(tokens)
    chex.assert_trees_all_equal(reduced, tokens)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_rows_of_the_map_sum_to_one_and_executions_agree(name):
    tokens = make_tokens()
    out = run(name, tokens, make_signals(name))
    matrix, reduced = np.asarray(out.matrix()), out.apply(tokens)
    sums = matrix.sum(-1)
    np.testing.assert_allclose(sums[np.asarray(reduced.valid)], 1.0, atol=1e-6)
    np.testing.assert_allclose(matrix @ np.asarray(tokens.features), reduced.features, atol=1e-5)
    np.testing.assert_allclose(matrix @ np.asarray(tokens.coords), reduced.coords, atol=1e-4)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_mass_is_conserved_by_merges_and_only_lost_by_drops(name):
    tokens = make_tokens(lengths=(12, 10, 9))
    out = run(name, tokens, make_signals(name))
    stays = np.where(np.asarray(out.assign) >= 0, np.asarray(tokens.mass), 0).sum(-1)
    np.testing.assert_allclose(out.apply(tokens).mass.sum(-1), stays, rtol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_origin_follows_assign_and_heads_sit_in_their_slots(name):
    tokens = make_tokens(lengths=(12, 10, 9))
    out = run(name, tokens, make_signals(name))
    origin = np.asarray(tokens.origin)
    want = np.where(origin >= 0, np.take_along_axis(np.asarray(out.assign), np.maximum(origin, 0), 1), -1)
    np.testing.assert_array_equal(out.apply(tokens).origin, want)
    if isinstance(out, DenseReduction):
        return
    for row in range(BATCH):
        for slot, head in enumerate(np.asarray(out.slots[row])):
            assert head < 0 or out.assign[row, head] == slot


@pytest.mark.parametrize("name", REDUCTIONS)
def test_the_class_token_stays_first_and_alone(name):
    tokens = make_tokens()
    out = run(name, tokens, make_signals(name))
    matrix = np.asarray(out.matrix())
    np.testing.assert_array_equal(matrix[:, 0], np.eye(LENGTH)[[0] * BATCH])
    assert not matrix[:, 1:, 0].any()
    np.testing.assert_array_equal((np.asarray(out.assign) == 0).sum(-1), 1)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_padding_never_leaks_into_kept_tokens(name):
    lengths = (12, 10, 9)
    clean = make_tokens(lengths=lengths)
    spoiled = clean.replace(features=jnp.where(clean.valid[..., None], clean.features, 1e5))
    signals = make_signals(name)
    first, second = (run(name, tokens, signals).apply(tokens) for tokens in (clean, spoiled))
    np.testing.assert_array_equal(first.mass, second.mass)
    keep = np.asarray(first.valid)
    np.testing.assert_array_equal(np.asarray(first.features)[keep], np.asarray(second.features)[keep])


@pytest.mark.parametrize("name", [name for name in REDUCTIONS if "rng" not in registry.describe(name).signals])
def test_rows_do_not_see_each_other(name):
    tokens, signals = make_tokens(), make_signals(name)
    whole = run(name, tokens, signals)
    for row in range(BATCH):
        single = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (tokens, signals))
        alone = run(name, *single)
        np.testing.assert_array_equal(alone.assign[0], whole.assign[row])
        np.testing.assert_allclose(alone.matrix()[0], whole.matrix()[row], atol=1e-6)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_gradients_are_finite_and_reach_the_features(name):
    tokens, signals = make_tokens(lengths=(12, 9, 7)), make_signals(name)

    def loss(features):
        moved = tokens.replace(features=features)
        reduced = registry.get(name)(moved, signals, 8).apply(moved)
        return jnp.sum(jnp.where(reduced.valid[..., None], reduced.features, 0) ** 2)

    gradient = _jit(jax.grad(loss))(tokens.features)
    assert np.all(np.isfinite(gradient)) and np.abs(gradient).max() > 0


@pytest.mark.parametrize("name", REDUCTIONS)
def test_new_values_do_not_recompile(name):
    traces = []

    @_jit
    def step(tokens, signals):
        traces.append(name)
        return registry.get(name)(tokens, signals, 8).apply(tokens).features

    first = step(make_tokens(seed=1), make_signals(name, seed=1))
    second = step(make_tokens(seed=2), make_signals(name, seed=2))
    assert not np.array_equal(first, second)
    assert len(traces) == 1


@pytest.mark.parametrize("name", SHRINKING)
def test_a_threshold_keeps_within_its_cap(name):
    tokens, signals = make_tokens(lengths=(12, 10, 9)), make_signals(name)
    keep = _jit(lambda t, s, value: registry.get(name)(t, s, budgets.Threshold(value, 9)).apply(t))
    loose, strict = (keep(tokens, signals, value) for value in (-1e9, 0.2))
    for reduced in (loose, strict):
        chex.assert_shape(reduced.features, (BATCH, 9, WIDTH))
        assert np.all(np.asarray(reduced.count) >= 1)
        assert np.all(np.asarray(reduced.mass.sum(-1)) <= np.asarray(tokens.mass.sum(-1)) + 1e-5)


@pytest.mark.parametrize("name", [name for name in (*REDUCTIONS, *CHUNKINGS) if registry.describe(name).signals])
def test_a_missing_signal_is_named(name):
    signal = registry.describe(name).signals[0]
    budget = (8,) if name in REDUCTIONS else ()
    with pytest.raises(ValueError, match=rf"{name} needs the signal '{signal}'"):
        registry.get(name)(make_tokens(), Signals(), *budget)


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("budget", [0, -1, 13])
def test_a_budget_that_does_not_fit_is_an_error(name, budget):
    with pytest.raises(ValueError, match=r"outside 1\.\.12"):
        registry.get(name)(make_tokens(), make_signals(name), budget)


@pytest.mark.parametrize("name", (*REDUCTIONS, *DELETIONS, *CHUNKINGS))
def test_an_unknown_hyper_parameter_is_an_error(name):
    budget = (8,) if name in REDUCTIONS else ()
    with pytest.raises(TypeError, match="has no hyper-parameter"):
        registry.get(name)(make_tokens(), make_signals(name), *budget, no_such_thing=1)


@pytest.mark.parametrize("name", (*REDUCTIONS, *DELETIONS, *CHUNKINGS))
def test_the_record_is_complete(name):
    record = registry.describe(name)
    assert record.kind in registry.KINDS
    assert bool(record.paper) == bool(record.citation)
    assert record.function.__doc__
    assert not record.paper or "Source:" in record.function.__doc__


@pytest.mark.parametrize("name", DELETIONS)
def test_gate_values_lie_between_delete_and_keep_and_padding_is_deleted(name):
    tokens = make_tokens(lengths=(12, 9, 1))
    gate = jax.jit(registry.get(name))(tokens, make_signals(name, cls_token=False))
    chex.assert_shape(gate, (BATCH, LENGTH))
    assert gate.dtype == jnp.float32
    assert np.all(np.asarray(gate) >= deletion_gate.SCALE) and np.all(np.asarray(gate) <= 0)
    assert np.all(np.asarray(gate)[~np.asarray(tokens.valid)] == deletion_gate.SCALE)


@pytest.mark.parametrize("name", DELETIONS)
def test_hard_deletion_keeps_order_positions_and_at_least_one_token(name):
    tokens = make_tokens(lengths=(12, 9, 1))
    gate = registry.get(name)(tokens, make_signals(name, cls_token=False))
    reduced = deletion_gate.hard(gate, tokens, capacity=LENGTH).apply(tokens)
    keep = np.asarray(deletion_gate.kept(gate, tokens))
    for row in range(BATCH):
        left = np.flatnonzero(keep[row])
        assert len(left) >= 1
        np.testing.assert_array_equal(reduced.features[row, : len(left)], np.asarray(tokens.features)[row, left])
        np.testing.assert_array_equal(reduced.coords[row, : len(left), 0], left)
        assert np.all(np.asarray(reduced.mass)[row, len(left) :] == 0)


@functools.cache
def chunker(name):
    return jax.jit(registry.get(name))


@pytest.mark.parametrize("name", CHUNKINGS)
def test_chunks_start_at_the_first_real_token_and_never_in_padding(name):
    tokens = make_tokens(lengths=(12, 9, 1))
    chunks = chunker(name)(tokens, make_signals(name, cls_token=False))
    starts, valid, probability = (np.asarray(x) for x in (chunks.starts, tokens.valid, chunks.probability))
    assert starts.dtype == bool and probability.dtype == np.float32
    chex.assert_shape((chunks.starts, chunks.probability, chunks.valid), (BATCH, LENGTH))
    assert starts[:, 0].all() and not starts[~valid].any()
    assert 1 < starts[0].sum() < LENGTH
    np.testing.assert_array_equal(probability[:, 0], 1)
    assert np.all(probability[~valid] == 0) and np.all((probability >= 0) & (probability <= 1))


@pytest.mark.parametrize("pool", chunks_lib.POOLS)
@pytest.mark.parametrize("name", CHUNKINGS)
def test_pooled_chunks_conserve_mass_and_stand_where_they_start(name, pool):
    tokens = make_tokens(lengths=(12, 9, 1))
    chunks = chunker(name)(tokens, make_signals(name, cls_token=False))
    reduction, reduced = jax.jit(
        lambda chunks, tokens: (out := chunks_lib.to_reduction(chunks, LENGTH, pool=pool), out.apply(tokens))
    )(chunks, tokens)
    np.testing.assert_allclose(reduced.mass.sum(-1), tokens.mass.sum(-1))
    np.testing.assert_array_equal(chunks_lib.lengths(chunks).sum(-1), tokens.count)
    np.testing.assert_array_equal(reduced.count, chunks.count)
    np.testing.assert_array_equal(reduced.origin, reduction.assign)
    sums = np.asarray(reduction.matrix()).sum(-1)
    np.testing.assert_allclose(sums, np.asarray(reduced.valid), atol=1e-6)
    for row in range(BATCH):
        places = np.asarray(reduced.coords)[row, : int(chunks.count[row]), 0]
        np.testing.assert_array_equal(places, np.flatnonzero(chunks.starts[row]))


@pytest.mark.parametrize("name", CHUNKINGS)
def test_chunks_depend_on_no_other_row_and_not_on_padding(name):
    tokens, signals = make_tokens(lengths=(12, 9, 7)), make_signals(name, cls_token=False)
    whole = chunker(name)(tokens, signals)
    for row in range(BATCH):
        alone = chunker(name)(*jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (tokens, signals)))
        np.testing.assert_array_equal(alone.starts[0], whole.starts[row])
        np.testing.assert_allclose(alone.probability[0], whole.probability[row], atol=1e-6)

    def widen(leaf):
        # Junk in padding, and four more places of it.
        real = tokens.valid.reshape(BATCH, LENGTH, *(1,) * (leaf.ndim - 2))
        return jnp.pad(jnp.where(real, leaf, 7), ((0, 0), (0, 4), *((0, 0),) * (leaf.ndim - 2)), constant_values=7)

    wide = TokenSet.create(widen(tokens.features), mask=jnp.pad(tokens.valid, ((0, 0), (0, 4))))
    got = chunker(name)(wide, jax.tree.map(widen, signals))
    np.testing.assert_array_equal(got.starts, jnp.pad(whole.starts, ((0, 0), (0, 4))))
    np.testing.assert_allclose(got.probability[:, :LENGTH], whole.probability, atol=1e-6)


@pytest.mark.parametrize("name", CHUNKINGS)
def test_gradients_of_chunks_are_finite_and_reach_what_is_learned(name):
    tokens, signals = make_tokens(lengths=(12, 9, 1)), make_signals(name, cls_token=False)
    fields = [field for field in registry.describe(name).signals if field != "token_ids"]

    def loss(features, learned):
        moved = tokens.replace(features=features)
        chunks = registry.get(name)(moved, signals.replace(**learned))
        pooled = chunks_lib.to_reduction(chunks, 8).apply(moved).features
        return jnp.sum(pooled**2) + jnp.sum(chunks.boundaries * jnp.arange(LENGTH))

    features, learned = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        tokens.features, {field: getattr(signals, field) for field in fields}
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((features, learned)))
    assert np.any(features)
    # A threshold on entropies lets nothing through.
    assert all(np.any(learned[field]) for field in fields if field != "entropies")


@pytest.mark.parametrize("name", CHUNKINGS)
def test_new_values_do_not_recompile_chunks(name):
    traces = []

    @jax.jit
    def step(tokens, signals):
        traces.append(name)
        return chunks_lib.to_reduction(registry.get(name)(tokens, signals), 8).apply(tokens).features

    first, second = (step(make_tokens(seed=seed), make_signals(name, seed=seed)) for seed in (1, 2))
    assert not np.array_equal(first, second)
    assert len(traces) == 1
