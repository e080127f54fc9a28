# SPDX-License-Identifier: Apache-2.0
"""Reductions by clusters against loops over lists, and their invariants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.tokens import Signals, TokenSet

LENGTH, WIDTH = 12, 4
# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def draw(seed, lengths=(LENGTH, 9)):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(len(lengths), LENGTH, WIDTH)).astype(np.float32)
    mask = np.arange(LENGTH) < np.array(lengths)[:, None]
    mass = rng.integers(1, 4, mask.shape)
    return TokenSet.create(jnp.asarray(features), mask=jnp.asarray(mask), mass=jnp.asarray(mass))


def run(name, tokens, budget, cls_token=False, **hyper):
    return _jit(lambda tokens: registry.get(name)(tokens, Signals(cls_token=cls_token), budget, **hyper))(tokens)


def free_tokens(tokens, row, cls_token):
    return [i for i in range(LENGTH) if tokens.valid[row, i] and not (cls_token and i == 0)]


def loop_farthest_first(x, distance, free, clusters):
    chosen = [max(free, key=lambda i: (np.linalg.norm(x[i]), -i))]
    while len(chosen) < min(clusters, len(free)):
        left = [i for i in free if i not in chosen]
        chosen.append(max(left, key=lambda i: (min(distance[i][c] for c in chosen), -i)))
    return sorted(chosen)


def loop_kmedoids(x, free, clusters, steps):
    """`{medoid: members}` of one row."""
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    medoids = loop_farthest_first(x, distance, free, clusters)
    for _ in range(steps):
        groups = {m: [i for i in free if min(medoids, key=lambda c, i=i: distance[i][c]) == m] for m in medoids}
        medoids = sorted(min(g, key=lambda i, g=g: sum(distance[i][j] for j in g)) for g in groups.values())
    return {m: [i for i in free if min(medoids, key=lambda c, i=i: distance[i][c]) == m] for m in medoids}


def loop_dpc(x, free, clusters, neighbours):
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1) / np.sqrt(x.shape[1])
    density = {
        i: np.exp(-np.mean(sorted(distance[i][j] ** 2 for j in free)[: min(neighbours, len(free))])) for i in free
    }
    farthest = max(distance[i][j] for i in free for j in free)
    delta = {i: min([distance[i][j] for j in free if density[j] > density[i]] + [farthest]) for i in free}
    centres = sorted(free, key=lambda i: -density[i] * delta[i])[:clusters]
    return {c: [i for i in free if min(centres, key=lambda k, i=i: distance[i][k]) == c] for c in sorted(centres)}


def loop_kmeans(x, free, clusters, steps):
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    # Farthest-first begins with the longest vector, before scaling.
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=-1)
    centres = unit[loop_farthest_first(x, distance, free, clusters)]

    def join(centres):
        return {
            i: int(np.argmax(unit[i] @ (centres / np.linalg.norm(centres, axis=-1, keepdims=True)).T)) for i in free
        }

    for _ in range(steps):
        label = join(centres)
        groups = [[i for i in free if label[i] == k] for k in range(len(centres))]
        centres = np.stack([unit[g].mean(0) if g else c for g, c in zip(groups, centres, strict=True)])
    label = join(centres)
    groups = [[i for i in free if label[i] == k] for k in range(len(centres))]
    return {g[0]: g for g in sorted(filter(None, groups))}


LOOPS = {
    "kmedoids": (dict(pool="mean", steps=3), lambda x, free, k: loop_kmedoids(x, free, k, 3)),
    "dpc_knn": (dict(neighbours=3), lambda x, free, k: loop_dpc(x, free, k, 3)),
    "kmeans": (dict(steps=3), lambda x, free, k: loop_kmeans(x, free, k, 3)),
}


@pytest.mark.parametrize("cls_token", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_clusters_are_those_of_the_loops_and_slots_their_means(name, cls_token):
    hyper, loop = LOOPS[name]
    for seed, budget in ((0, 5), (1, 8)):
        tokens = draw(seed)
        out = run(name, tokens, budget, cls_token, **hyper)
        got = out.apply(tokens)
        features, mass = (np.asarray(array, np.float64) for array in (tokens.features, tokens.mass))
        for row in range(len(features)):
            groups = loop(features[row], free_tokens(tokens, row, cls_token), budget - cls_token)
            groups = ({0: [0]} if cls_token else {}) | groups
            np.testing.assert_array_equal(out.slots[row], (list(groups) + [-1] * budget)[:budget])
            for slot, members in enumerate(groups.values()):
                assert np.flatnonzero(out.assign[row] == slot).tolist() == members
                want = (mass[row, members, None] * features[row, members]).sum(0) / mass[row, members].sum()
                np.testing.assert_allclose(got.features[row, slot], want, atol=1e-5)
                assert got.mass[row, slot] == mass[row, members].sum()
            assert not np.asarray(got.mass[row, len(groups) :]).any()


@pytest.mark.parametrize("name", ["kmedoids", "dpc_knn"])
def test_dropping_keeps_the_heads_as_they_are(name):
    tokens = draw(2)
    mean, drop = (run(name, tokens, 6, pool=pool) for pool in ("mean", "drop"))
    np.testing.assert_array_equal(drop.slots, mean.slots)
    heads = np.maximum(np.asarray(drop.slots), 0)[..., None]
    kept = drop.apply(tokens)
    want = np.take_along_axis(np.asarray(tokens.features), heads, axis=1) * np.asarray(kept.valid)[..., None]
    np.testing.assert_array_equal(kept.features, want)
    np.testing.assert_array_equal((np.asarray(drop.assign) >= 0).sum(-1), np.asarray(kept.count))


def test_medoids_cost_less_with_every_step():
    tokens = draw(3, lengths=(LENGTH,) * 8)
    x = np.asarray(tokens.features)
    costs = []
    for steps in (1, 2, 4):
        slots = np.asarray(run("kmedoids", tokens, 4, steps=steps).slots)
        distance = np.linalg.norm(x[:, :, None] - np.take_along_axis(x, slots[..., None], 1)[:, None], axis=-1)
        costs.append(distance.min(-1).sum(-1))
    assert np.all(costs[1] <= costs[0] + 1e-5) and np.all(costs[2] <= costs[1] + 1e-5)
    assert np.any(costs[2] < costs[0])


@pytest.mark.parametrize("name", LOOPS)
def test_duplicates_share_a_slot_without_loss(name):
    rng = np.random.default_rng(4)
    distinct = rng.normal(size=(1, 4, WIDTH)).astype(np.float32)
    # One more copy of some, so that densities differ.
    order = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0]
    tokens = TokenSet.create(jnp.asarray(distinct[:, order]))
    hyper = dict(neighbours=2) if name == "dpc_knn" else {}
    out = run(name, tokens, 4, **(hyper if name == "kmeans" else hyper | dict(pool="mean")))
    np.testing.assert_allclose(out.apply(tokens).features, distinct, atol=1e-6)
    np.testing.assert_array_equal(out.apply(tokens).mass, [[4, 3, 3, 2]])


@pytest.mark.parametrize("name", LOOPS)
def test_a_budget_without_room_for_a_cluster_is_an_error(name):
    with pytest.raises(ValueError, match=r"budget of at least 2 \(1 protected\); got 1"):
        registry.get(name)(draw(0), Signals(cls_token=True), 1)


@pytest.mark.parametrize(("name", "hyper"), [("kmedoids", "steps"), ("kmeans", "steps"), ("dpc_knn", "neighbours")])
def test_no_step_and_no_neighbour_are_errors(name, hyper):
    with pytest.raises(ValueError, match="must be at least 1; got 0"):
        registry.get(name)(draw(0), Signals(), 4, **{hyper: 0})


def test_an_unknown_pool_is_an_error():
    with pytest.raises(ValueError, match=r"pool='sum' is not one of \('mean', 'drop'\)"):
        registry.get("kmedoids")(draw(0), Signals(), 4, pool="sum")
