# SPDX-License-Identifier: Apache-2.0
"""FiCoCo's three variants against loop-written formulas, and the special cases of its operator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import registry
from adaptive.reduction import ficoco, match, select
from adaptive.tokens import Signals, TokenSet

BATCH, LENGTH, WIDTH, GRID = 2, 17, 3, (4, 4)
# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def draw(seed, lengths=(LENGTH, 13)):
    """A class token and a 4 x 4 grid of patches, the last ones of the second row missing."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), axis=-1).reshape(-1, 2)
    coords = np.concatenate([[[-1, -1]], grid])
    tokens = TokenSet.create(
        jnp.asarray(rng.normal(size=(BATCH, LENGTH, WIDTH)), jnp.float32),
        mask=jnp.asarray(np.arange(LENGTH) < np.array(lengths)[:, None]),
        coords=jnp.broadcast_to(jnp.asarray(coords, jnp.float32), (BATCH, LENGTH, 2)),
    )
    attention = rng.random((BATCH, 2, LENGTH, LENGTH)).astype(np.float32) * np.asarray(tokens.valid)[:, None, None]
    attention /= attention.sum(-1, keepdims=True)
    text = rng.random((BATCH, 3, LENGTH)).astype(np.float32)
    signals = Signals(
        attention=jnp.asarray(attention),
        cls_attention=jnp.asarray(attention[:, :, 0].mean(1)),
        text_attention=jnp.asarray(text),
        cls_token=True,
    )
    return tokens, signals


def loop_compress(importance, correlation, real, budget, quantile):
    """The matrix `[M, N]` of one row."""
    kept = [0, *sorted(sorted(real, key=lambda i: (-importance[i], i))[: budget - 1])]
    matrix = np.zeros((budget, LENGTH))
    matrix[range(len(kept)), kept] = 1
    targets = kept[1:]
    for i in real:
        if i in kept:
            continue
        row = np.array([correlation[i, j] for j in targets])
        chosen = row > np.quantile(row, quantile)
        for slot, weight in enumerate(np.where(chosen, row, 0) / max(row[chosen].sum(), 1e-30)):
            matrix[1 + slot, i] = weight
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-30)


def loop_importance_v(tokens, signals, row, share, window, penalty):
    attention = np.asarray(signals.attention[row], np.float64).mean(0)
    real = [i for i in range(1, LENGTH) if tokens.valid[row, i]]
    focus = np.array([signals.cls_attention[row, i] for i in real], np.float64)
    received = attention[np.ix_(real, real)].sum(0)
    score = share * focus / np.linalg.norm(focus) - (1 - share) * received / np.linalg.norm(received)
    importance = dict(zip(real, score, strict=True))
    windows = {}
    for i in real:
        windows.setdefault(tuple(np.asarray(tokens.coords[row, i]) // window), []).append(i)
    for members in windows.values():
        least = min(members, key=importance.get)
        importance[least] *= 1 / penalty if importance[least] > 0 else penalty
    return importance, attention, real


def loop_ficoco_l(signals, row, real, visual_share, direct_share):
    attention = np.asarray(signals.attention[row], np.float64).mean(0)
    text = np.asarray(signals.text_attention[row], np.float64)
    importance = {i: (1 - visual_share) * text[:, i].mean() - visual_share * attention[i, real].mean() for i in real}
    return importance, direct_share * attention + (1 - direct_share) * text.T @ text


@pytest.mark.parametrize("quantile", [0.998, 0.7, 0.0])
def test_v_equals_the_formulas(quantile):
    tokens, signals = draw(0)
    out = _jit(lambda t, s: registry.get("ficoco_v")(t, s, 9, quantile=quantile))(tokens, signals)
    for row in range(BATCH):
        importance, attention, real = loop_importance_v(tokens, signals, row, 0.35, 2, 2.0)
        want = loop_compress(importance, attention, real, 9, quantile)
        np.testing.assert_allclose(out.matrix()[row], want, atol=1e-6)


def test_v_follows_its_hyper_parameters():
    tokens, signals = draw(1)
    for share, window, penalty in ((1.0, 2, 1.0), (0.6, 4, 8.0), (0.0, 1, 3.0)):
        hyper = dict(class_share=share, window=window, penalty=penalty)
        out = _jit(lambda t, s, hyper=hyper: registry.get("ficoco_v")(t, s, 9, **hyper))(tokens, signals)
        importance, attention, real = loop_importance_v(tokens, signals, 0, share, window, penalty)
        np.testing.assert_allclose(out.matrix()[0], loop_compress(importance, attention, real, 9, 0.998), atol=1e-6)


def test_the_penalty_spreads_removals_over_the_windows():
    tokens, signals = draw(2, lengths=(LENGTH, LENGTH))
    # The class token looks away from the left half of the image, and nothing else tells patches apart.
    columns = np.asarray(tokens.coords[0, :, 1])
    focus = jnp.broadcast_to(jnp.asarray(np.where(columns < 2, 0.5, 1.0) + 0.001 * np.arange(LENGTH)), (BATCH, LENGTH))
    signals = signals.replace(cls_attention=focus, attention=jnp.full_like(signals.attention, 1 / LENGTH))
    gone = []
    for penalty in (1.0, 8.0):
        out = registry.get("ficoco_v")(tokens, signals, LENGTH - 4, penalty=penalty, class_share=0.9)
        kept = np.asarray(out.matrix()[0]) > 0.5
        left = np.flatnonzero(~kept.any(0))
        gone.append({tuple(np.asarray(tokens.coords[0, i]) // 2) for i in left})
    assert len(gone[0]) == 2 and len(gone[1]) == 4


@pytest.mark.parametrize(("visual_share", "direct_share"), [(0.6, 0.6), (1.0, 0.0), (0.0, 1.0)])
def test_l_equals_the_formulas(visual_share, direct_share):
    tokens, signals = draw(3)
    hyper = dict(visual_share=visual_share, direct_share=direct_share, quantile=0.8)
    out = _jit(lambda t, s: registry.get("ficoco_l")(t, s, 8, **hyper))(tokens, signals)
    for row in range(BATCH):
        real = [i for i in range(1, LENGTH) if tokens.valid[row, i]]
        importance, correlation = loop_ficoco_l(signals, row, real, visual_share, direct_share)
        want = loop_compress(importance, correlation, real, 8, 0.8)
        np.testing.assert_allclose(out.matrix()[row], want, atol=1e-6)


def test_vl_is_v_in_an_encoder_and_l_in_a_language_model():
    tokens, signals = draw(4)
    encoder = signals.replace(text_attention=None)
    results = [
        registry.get(name)(tokens, s, 9).matrix()
        for name, s in (("ficoco_vl", encoder), ("ficoco_v", encoder), ("ficoco_vl", signals), ("ficoco_l", signals))
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[2], results[3])
    assert not np.array_equal(results[0], results[2])
    bare = registry.get("ficoco_vl")(tokens, encoder.replace(cls_attention=None), 9)
    np.testing.assert_allclose(bare.matrix(), results[0], atol=1e-6)


def test_a_kept_token_keeps_its_part_and_mass_is_conserved():
    tokens, signals = draw(5)
    out = registry.get("ficoco_v")(tokens, signals, 9, quantile=0.5)
    share, matrix = np.asarray(out.share()), np.asarray(out.matrix())
    taken = share.sum(2)
    own = np.where(share == 1, matrix, 0).max(-1)
    np.testing.assert_allclose(own, 1 / taken, rtol=1e-5)
    np.testing.assert_allclose(out.apply(tokens).mass.sum(-1), tokens.mass.sum(-1), rtol=1e-6)


def test_without_targets_it_is_pruning_and_with_the_best_one_a_merge():
    tokens, signals = draw(6)
    importance = signals.cls_attention
    prune = select.prune(importance, tokens, signals, 9)
    none = ficoco.compress(importance, jnp.mean(signals.attention, 1), tokens, signals, 9, 1.0)
    np.testing.assert_allclose(none.matrix(), prune.matrix(), atol=1e-7)
    # One target each: the most similar kept token by the cosine of features, as DiffRate merges.
    unit = tokens.features / jnp.linalg.norm(tokens.features, axis=-1, keepdims=True)
    cosine = 1 + jnp.einsum("bid,bjd->bij", unit, unit)
    one = ficoco.compress(importance, cosine, tokens, signals, 9, 0.998)
    _, nearest = match.nearest_slot(tokens.features, prune.slots, cls_token=True)
    want = np.where(np.asarray(prune.assign) >= 0, prune.assign, np.where(tokens.valid, nearest, -1))
    np.testing.assert_array_equal(one.assign, want)


def test_duplicates_are_compressed_without_loss():
    tokens, signals = draw(7, lengths=(LENGTH, LENGTH))
    same = jnp.broadcast_to(tokens.features[:, 1:2], tokens.features[:, 1:].shape)
    tokens = tokens.replace(features=jnp.concatenate([tokens.features[:, :1], same], axis=1))
    got = registry.get("ficoco_v")(tokens, signals, 6, quantile=0.5).apply(tokens)
    np.testing.assert_allclose(got.features[:, 1:], same[:, :5], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        (
            "ficoco_v",
            dict(class_share=1.2),
            r"class_share must lie in \[0, 1\], window and penalty be at least 1; got 1.2",
        ),
        ("ficoco_v", dict(window=0), "window and penalty be at least 1; got 0.35, 0"),
        ("ficoco_v", dict(penalty=0.5), "got 0.35, 2, 0.5"),
        ("ficoco_v", dict(quantile=1.5), r"quantile must lie in \[0, 1\]; got 1.5"),
        ("ficoco_l", dict(visual_share=-1.0), r"visual_share and direct_share must lie in \[0, 1\]; got -1.0"),
    ],
)
def test_hyper_parameters_out_of_range_are_errors(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        registry.get(name)(*draw(0), 9, **hyper)


def test_class_attention_that_is_missing_is_an_error():
    tokens, signals = draw(0)
    bare = signals.replace(cls_attention=None, text_attention=None)
    with pytest.raises(ValueError, match="ficoco_v needs the signal 'cls_attention'"):
        registry.get("ficoco_v")(tokens, bare, 9)
    with pytest.raises(ValueError, match=r"ficoco_vl needs the text's attention .* got neither"):
        registry.get("ficoco_vl")(tokens, bare.replace(cls_token=False), 9)
    with pytest.raises(ValueError, match="ficoco_l needs the signal 'text_attention'"):
        registry.get("ficoco_l")(tokens, bare, 9)
