# SPDX-License-Identifier: Apache-2.0
"""The vision transformer: dense, reduced, padded, and in its variants."""

import functools
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive import budgets, ragged
from adaptive.tokens import Reduction, Signals, TokenSet
from layers.hooks import Hook, Reduce
from layers.linear import Linear
from layers.vit import ViT

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "params" / "vit_b16.json"
LOGICAL = {
    "embed", "mlp", "heads", "head_dim", "qkv", "vocab", "patch", "position", "classes", "norm", "gate", "layers", "buckets",
}  # fmt: skip
# 4 x 4 patches.
DENSE = ViT(4, 16, 3, 2, 32, num_classes=5, image_size=(16, 16), channels=1)
X = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def _run(model, params, x=X, **kwargs):
    rngs = {"reduction": jax.random.key(3)}
    return _jit(lambda params, x: model.apply({"params": params}, x, rngs=rngs, **kwargs))(params, x)


@functools.cache
def _params(model=DENSE):
    """Random parameters, large enough that every part of the model shows in the logits."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), X))["params"]
    rng = np.random.default_rng(1)
    # Scales are the one-dimensional parameters that must stay near 1.
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def _dense():
    return _run(DENSE, _params())


def _tome(*removed, model=DENSE, **options):
    counts = budgets.token_counts(removed, model.num_tokens, protected=int(model.has_class_token))
    return model.clone(hooks=(Reduce("tome", counts, **options),))


def test_the_dense_model_equals_a_restatement():
    """Pre-norm blocks in NumPy, from the parameters."""
    params = jax.tree.map(np.asarray, _params())

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def attend(x, p):
        q, k, v = (
            np.einsum("bnd,dhk->bhnk", x, p[n]["kernel"]) + p[n]["bias"][:, None] for n in ("query", "key", "value")
        )
        weights = np.exp(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]))
        return (
            np.einsum("bhnk,hkd->bnd", weights / weights.sum(-1, keepdims=True) @ v, p["out"]["kernel"])
            + p["out"]["bias"]
        )

    patches = X.reshape(2, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(2, 16, 16)
    x = patches @ params["patch_embed"]["projection"]["kernel"] + params["patch_embed"]["projection"]["bias"]
    x = np.concatenate([np.tile(params["class_token"], (2, 1, 1)), x], axis=1) + params["positions"]["embedding"]
    for layer in range(3):
        block = params[f"block_{layer}"]
        x = x + attend(norm(x, block["attention_norm"]), block["attention"])
        mlp = block["mlp"]
        hidden = norm(x, block["mlp_norm"]) @ mlp["hidden"]["kernel"] + mlp["hidden"]["bias"]
        gelu = np.asarray(jax.nn.gelu(hidden, approximate=False))
        x = x + gelu @ mlp["out"]["kernel"] + mlp["out"]["bias"]
    features = norm(x, params["final_norm"])
    logits, aux = _dense()
    np.testing.assert_allclose(aux["token_set"].features, features, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        logits, features[:, 0] @ params["head"]["kernel"] + params["head"]["bias"], rtol=1e-3, atol=1e-3
    )
    bare, _ = _run(DENSE.clone(num_classes=0), {name: leaf for name, leaf in params.items() if name != "head"})
    np.testing.assert_allclose(bare, features[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["tome", "random", "evit"])
def test_a_schedule_that_removes_nothing_is_the_dense_model(method):
    model = DENSE.clone(hooks=(Reduce(method, (17, 17, 17)),))
    logits, aux = _run(model, _params())
    np.testing.assert_array_equal(logits, _dense()[0])
    assert aux["reduction"] is None and aux["losses"] == {}
    np.testing.assert_array_equal(aux["tokens"], np.full((3, 2), 17))


@pytest.mark.parametrize(
    ("method", "place"),
    [("tome", "between"), ("tome", "after"), ("class_attention", "between"), ("random", "after"), ("evit", "between")],
)
def test_reductions_are_followed_from_the_first_token_to_the_last(method, place):
    counts = (14, 14, 9)
    logits, aux = _run(DENSE.clone(hooks=(Reduce(method, counts, place=place),)), _params())
    tokens, reduction = aux["token_set"], aux["reduction"]
    assert np.all(np.isfinite(logits)) and np.abs(logits - _dense()[0]).max() > 1e-3
    np.testing.assert_array_equal(aux["tokens"], np.repeat(np.asarray(counts)[:, None], 2, axis=1))
    assert tokens.features.shape == (2, 9, 16) and reduction.matrix().shape == (2, 9, 17)
    np.testing.assert_array_equal(reduction.assign, tokens.origin)
    np.testing.assert_allclose(reduction.reduce_mass(jnp.ones((2, 17))), tokens.mass)
    # The class token is still slot 0, alone, and the coordinates are means of those of the patches in a slot.
    np.testing.assert_array_equal(tokens.origin[:, 0], 0)
    np.testing.assert_array_equal(tokens.mass[:, 0], 1)
    rows, columns = np.divmod(np.arange(16), 4)
    start = np.concatenate([[[-1, -1]], np.stack([rows, columns], -1)]).astype(np.float32)
    np.testing.assert_allclose(tokens.coords, reduction.matrix() @ start, atol=1e-5)
    if method == "tome":
        np.testing.assert_allclose(tokens.mass.sum(-1), 17)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_merging_duplicates_is_lossless_with_proportional_attention(pool):
    model = DENSE.clone(depth=2, pool=pool, class_token=True)
    params = _params() | {"positions": {"embedding": jnp.zeros((17, 16))}}
    # With the class token in slot 0, tokens 1 and 2, 3 and 4, ... are the same patch twice.
    patches = X.reshape(2, 4, 4, 4, 4, 1).copy()
    patches[:, :, :, 1::2] = patches[:, :, :, ::2]
    x = patches.reshape(X.shape)
    dense, _ = _run(model, params, x)
    merged, aux = _run(_tome(8, 0, model=model), params, x)
    np.testing.assert_array_equal(aux["token_set"].mass[:, 1:], 2)
    np.testing.assert_allclose(merged, dense, rtol=1e-4, atol=1e-4)
    plain, _ = _run(_tome(8, 0, model=model).clone(proportional_attention=False), params, x)
    assert np.abs(plain - dense).max() > 1e-2


def test_mass_enters_attention_only_where_it_can_matter():
    """The logarithm of the mass is the one logarithm of the model, beside that of each layer's softmax denominators."""

    def logarithms(model, **kwargs):
        args = jax.eval_shape(model.init, jax.random.key(0), X), X
        found = str(jax.make_jaxpr(lambda v, x: model.apply(nn.unbox(v), x, **kwargs)[0])(*args)).count(" log ")
        return found - model.depth

    assert logarithms(DENSE) == 0
    assert logarithms(_tome(0, 0, 4)) == 0
    assert logarithms(_tome(0, 4, 0)) == 1
    assert logarithms(_tome(4, 4, 4)) == 2
    assert logarithms(_tome(4, 4, 4).clone(proportional_attention=False)) == 0
    assert logarithms(DENSE, token_mask=np.ones((2, 16), bool)) == 3


def test_mean_pooling_counts_each_patch_by_its_mass_and_leaves_out_the_class_token():
    model = _tome(4, 4, model=DENSE.clone(depth=2, pool="mean", class_token=True, num_classes=0))
    params = {name: leaf for name, leaf in _params().items() if name != "head"}
    features, aux = _run(model, params)
    tokens = aux["token_set"]
    expected = np.einsum("bnd,bn->bd", tokens.features[:, 1:], tokens.mass[:, 1:]) / 16
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)


def test_a_mean_pooled_model_has_no_class_token_unless_told_to():
    model = DENSE.clone(depth=1, pool="mean")
    assert (model.num_tokens, model.clone(class_token=True).num_tokens, DENSE.num_tokens) == (16, 17, 17)
    assert "class_token" not in _params(model)
    _, aux = _run(_tome(8, model=model), _params(model))
    np.testing.assert_array_equal(aux["tokens"], 8)


@pytest.mark.parametrize("hooks", [(), (Reduce("tome", (13, 10)),)])
def test_patches_outside_the_mask_do_not_matter(hooks):
    model = DENSE.clone(depth=2, hooks=hooks)
    mask = np.ones((2, 16), bool)
    mask[1, 12:] = False
    moved = X.copy()
    moved[1, 12:] = 50.0
    logits, aux = _run(model, _params(), token_mask=mask)
    other, _ = _run(model, _params(), moved, token_mask=mask)
    np.testing.assert_allclose(logits, other, rtol=1e-4, atol=1e-4)
    assert aux["tokens"][-1].tolist() == ([10, 9] if hooks else [17, 13])
    assert aux["token_set"].mass[1].sum() == 13
    assert np.abs(logits[1] - _run(model, _params())[0][1]).max() > 1e-3


def test_remat_and_bfloat16_variants_agree_with_the_plain_model():
    model = _tome(4, 4, model=DENSE.clone(depth=2))
    params = {name: leaf for name, leaf in _params().items() if name != "block_2"}

    def loss(model, params):
        logits = model.apply({"params": params}, X)[0]
        return jnp.sum(logits**2), logits

    (_, logits), grads = _jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))(params)
    remat = model.clone(remat=True)
    (_, again), regrads = _jit(jax.value_and_grad(functools.partial(loss, remat), has_aux=True))(params)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), regrads, grads)
    # A bias of all keys moves no softmax; every other parameter learns.
    still = {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree.leaves_with_path(grads)
        if np.abs(leaf).max() < 1e-3
    }
    assert still == {f"block_{layer}/attention/key/bias" for layer in range(2)}
    half, aux = _run(DENSE.clone(dtype=jnp.bfloat16), _params())
    assert half.dtype == jnp.float32 and aux["token_set"].features.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, _dense()[0], atol=0.05 * np.abs(_dense()[0]).max())
    reduced, aux = _run(model.clone(dtype=jnp.bfloat16), params)
    assert np.all(np.isfinite(reduced)) and aux["token_set"].mass.dtype == jnp.float32


def test_dropout_draws_only_in_training():
    model = DENSE.clone(depth=1, dropout=0.3)
    drawn = _jit(lambda key: model.apply({"params": _params()}, X, deterministic=False, rngs={"dropout": key})[0])
    first, again, other = (drawn(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    np.testing.assert_array_equal(_run(model, _params())[0], _run(DENSE.clone(depth=1), _params())[0])


class Scorer(nn.Module):
    """A learned hook: keeps half of the tokens by a linear score of their features, scaled so that a gradient flows."""

    place: str = "after"
    signals: tuple[str, ...] = ("column_sums",)

    def acts(self, layer: int, length: int) -> bool:
        return layer >= 0

    @nn.compact
    def __call__(self, tokens: TokenSet, signals: Signals) -> Reduction:
        assert signals.column_sums.shape == tokens.mass.shape and signals.grid == (1, 4, 4) and signals.cls_token
        scores = Linear((1,), ("embed", "gate"), name="score")(tokens.features)[..., 0] + signals.column_sums
        kept = ragged.rank(scores.at[:, 0].set(jnp.inf)) < tokens.mass.shape[1] // 2
        reduction = ragged.compact(kept, tokens.mass.shape[1] // 2, overflow="checked")
        return reduction.replace(weight=reduction.weight * jax.nn.sigmoid(scores), merges=True)


@pytest.mark.parametrize("remat", [False, True])
def test_a_hook_may_be_a_module_with_parameters(remat):
    model = DENSE.clone(depth=2, hooks=(Scorer(),), remat=remat)
    assert isinstance(Scorer(), Hook)
    params = _params(model)
    assert params["hooks_0"]["score"]["kernel"].shape == (16, 1)

    def loss(params):
        logits, aux = model.apply({"params": params}, X)
        return jnp.sum(logits**2), aux["tokens"]

    (_, counts), grads = _jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_array_equal(counts[:, 0], [8, 4])
    assert np.all(np.isfinite(grads["hooks_0"]["score"]["kernel"])) and np.any(grads["hooks_0"]["score"]["kernel"])


def test_hooks_in_one_layer_see_what_the_ones_before_left():
    hooks = (Reduce("tome", (13,)), Reduce("class_attention", (9,), place="after"))
    _, aux = _run(DENSE.clone(depth=1, hooks=hooks), _params())
    assert aux["tokens"].tolist() == [[9, 9]] and aux["token_set"].features.shape == (2, 9, 16)
    np.testing.assert_array_equal(aux["token_set"].origin, aux["reduction"].assign)
    np.testing.assert_allclose(aux["reduction"].reduce_mass(jnp.ones((2, 17))), aux["token_set"].mass)


def test_random_pruning_draws_from_its_own_stream():
    model = DENSE.clone(depth=1, hooks=(Reduce("random", (9,)),))
    run = _jit(lambda key: model.apply({"params": _params()}, X, rngs={"reduction": key})[1]["token_set"].origin)
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other) and np.any(first[0] != first[1])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_tome(4, 0, 0).clone(scan_layers=True), "adaptive shapes need unrolled layers: .*layers.stacking.unstack"),
        (DENSE.clone(hooks=(Reduce("tome", (8, 8, 8)),)), "at most 8 can go at once; a budget of 8 removes 9"),
        (DENSE.clone(hooks=(Reduce("tome", (13, 13)),)), "the schedule of 'tome' has 2 counts for 3 layers"),
        (DENSE.clone(hooks=(Reduce("truncate", (13, 15, 15)),)), r"15 surviving tokens is outside 1\.\.13"),
        (DENSE.clone(hooks=(Scorer(place="before"),)), "Scorer.place='before'"),
        (DENSE.clone(image_size=(16, 20)), r"\[B, 16, 20, 1\]; got \(2, 16, 16, 1\)"),
        (DENSE.clone(image_size=(32, 8)), "Resize the images"),
        (DENSE.clone(pool="max"), "pool is 'cls' or 'mean'.*'max'"),
        (DENSE.clone(positions="sincos"), "'learned' or 'sincos2d'.*'sincos'"),
        (DENSE.clone(class_token=False), "pool='cls' needs a class token"),
        (DENSE.clone(stem=(8,)), f"makes patches of 2 pixels; patch_size={DENSE.patch_size}"),
    ],
)
def test_what_cannot_be_is_refused_at_trace_time(model, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), X)


def test_class_attention_needs_a_class_token():
    model = DENSE.clone(pool="mean", hooks=(Reduce("class_attention", (9, 9, 9)),))
    with pytest.raises(ValueError, match="no class token; set class_token=True"):
        jax.eval_shape(model.init, jax.random.key(0), X)


def _leaves(boxed):
    flat, _ = jax.tree.flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_has_logical_axes(scan_layers):
    model = DENSE.clone(scan_layers=scan_layers, representation=12, hooks=() if scan_layers else (Scorer(),))
    leaves = _leaves(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    for path, leaf in leaves.items():
        assert isinstance(leaf, nn.LogicallyPartitioned), path
        assert len(leaf.names) == len(leaf.value.shape) and set(leaf.names) <= LOGICAL, (path, leaf.names)
        assert (leaf.names[0] == "layers") == path.startswith("blocks/"), path


def test_fixed_positions_have_no_parameters():
    shapes = jax.eval_shape(DENSE.clone(positions="sincos2d").init, jax.random.key(0), X)["params"]
    assert "positions" not in shapes


def test_parameters_of_vit_b16_are_those_written_down():
    model = ViT.named("B/16", num_classes=1000)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))["params"]
    ours = {path: {"shape": list(leaf.value.shape), "axes": list(leaf.names)} for path, leaf in _leaves(boxed).items()}
    assert ours == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(("name", "count"), [("Ti/16", 5_717_416), ("S/16", 22_050_664), ("L/16", 304_326_632)])
def test_named_shapes_have_the_published_number_of_parameters(name, count):
    """With 1000 classes at 224 pixels, as in timm."""
    model = ViT.named(name, num_classes=1000, scan_layers=True)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="no ViT is named 'G/16'"):
        ViT.named("G/16")
