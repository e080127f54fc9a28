# SPDX-License-Identifier: Apache-2.0
"""Learners in place of dense parts, in every backbone."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.acm import AcmParts, Gate, Learners, acmize, gate_logits, modules, ungated, weights
from layers.decoder_lm import DecoderLM
from layers.parts import captured
from layers.t5 import T5
from layers.vit import ViT

PARTS = AcmParts(learners=4, gate_hidden=(3,))
VIT = ViT(4, 16, 2, 2, 32, num_classes=5, image_size=(8, 8), channels=1, activation="gelu_tanh")
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
IDS = np.random.default_rng(1).integers(1, 19, (2, 6)).astype(np.int32)
# Backbone, arguments, which modules become learners, how many.
BACKBONES = {
    "vit": (VIT, (IMAGES,), ".*", 10),
    "t5": (T5(vocab_size=20, width=16, mlp_dim=32, heads=2, head_dim=8, encoder_layers=2, decoder_layers=1),
           (IDS, None, IDS), "encoder_.*", 10),
    "decoder": (DecoderLM(20, 16, 2, 2, 32, kv_heads=1), (IDS,), ".*", 10),
}  # fmt: skip
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def dense(name):
    model, arguments, *_ = BACKBONES[name]
    shapes = nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), *arguments)))["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def learned(name, start="random"):
    params = _jit(lambda p: acmize(p, PARTS, jax.random.key(1), where=BACKBONES[name][2], start=start))(dense(name))
    # Gates that tell tokens apart.
    return jax.tree.map_with_path(
        lambda path, leaf: 5.0 * leaf if any(k.key == "gate" for k in path) and leaf.ndim == 2 else leaf, params
    )


def run(name, params, **options):
    model, arguments, *_ = BACKBONES[name]
    model = model.clone(parts=AcmParts(learners=4, gate_hidden=(3,), **options))

    def apply(params):
        with captured(lambda module: isinstance(module, Gate)) as calls:
            out = model.apply({"params": params}, *arguments, rngs={"dropout": jax.random.key(5)})[0]
        return out, {path: call.result for path, call in calls.items()}

    return _jit(apply)(params)


@pytest.mark.parametrize("name", BACKBONES)
def test_acmized_parameters_fit_the_model_with_learners(name):
    model, arguments, where, count = BACKBONES[name]
    with_learners = model.clone(parts=PARTS)
    want = nn.unbox(jax.eval_shape(lambda: with_learners.init(jax.random.key(0), *arguments)))["params"]
    got = learned(name)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), got) == jax.tree.map(lambda x: (x.shape, x.dtype), want)
    assert len(modules(dense(name), PARTS, where=where)) == count
    kept = "final_norm" if name == "vit" else "embedding"
    for one, other in zip(jax.tree.leaves(got[kept]), jax.tree.leaves(dense(name)[kept]), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", BACKBONES)
def test_skipping_learners_gives_what_masking_them_gives(name):
    skipped, chosen = run(name, learned(name), mode="skip")
    masked, same = run(name, learned(name), mode="masked")
    np.testing.assert_allclose(skipped, masked, atol=1e-5, rtol=1e-5)
    assert len(chosen) == BACKBONES[name][3] and chosen.keys() == same.keys()
    numbers = {path: np.asarray(units).sum(-1) for path, units in same.items()}
    assert sum(len(np.unique(n)) > 1 for n in numbers.values()) > 3
    # A projection never goes without a learner.
    assert all(n.min() >= 1 for path, n in numbers.items() if "attention" in path)


def test_all_learners_and_a_fixed_number_of_them_use_no_gate():
    whole, chosen = run("vit", learned("vit"), mode="all")
    assert chosen == {}
    np.testing.assert_array_equal(run("vit", learned("vit"), mode="uniform", number=4)[0], whole)
    assert np.abs(run("vit", learned("vit"), mode="uniform", number=2)[0] - whole).max() > 1e-3


def test_learners_cut_from_the_dense_model_give_its_feed_forward_layers_and_the_best_projections():
    params = _jit(lambda p: acmize(p, PARTS, jax.random.key(1), start="dense"))(dense("vit"))
    for module in modules(dense("vit"), PARTS):
        up, bias, down = (np.asarray(leaf) for leaf in weights(params, module))
        own = dense("vit")
        for part in module.path.split("/"):
            own = own[part]
        x = np.random.default_rng(3).normal(size=(7, 16)).astype(np.float32)
        if module.path.endswith("mlp"):
            want = jax.nn.gelu(x @ own["hidden"]["kernel"] + own["hidden"]["bias"]) @ own["out"]["kernel"]
            np.testing.assert_allclose(jax.nn.gelu(x @ up + bias) @ down, want, atol=1e-5)
            continue
        matrix = np.asarray(own["kernel"]).reshape(16, 16)
        left, values, right = np.linalg.svd(matrix)
        rank = up.shape[1]
        np.testing.assert_allclose(up @ down, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-5)


def test_a_drawn_choice_trains_gates_and_learners_of_every_module():
    model = VIT.clone(parts=AcmParts(learners=4, gate_hidden=(3,), mode="sample"))

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        return jnp.sum(model.apply({"params": params}, IMAGES, rngs=rngs)[0] ** 2)

    gradients = _jit(jax.grad(loss))(learned("vit"))
    for module in modules(dense("vit"), PARTS):
        own = gradients
        for part in (*module.path.split("/"), "learners"):
            own = own[part]
        for leaf in (own["down"], own["gate"]["layer_1"]["kernel"]):
            assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, module.path


def test_no_learner_under_a_residual_is_nothing():
    layer = Learners(16, 4, 4, gate_hidden=(), mode="skip")
    x = jnp.ones((1, 3, 16))
    params = nn.unbox(layer.init(jax.random.key(0), x))["params"]
    params["gate"]["layer_0"]["bias"] = jnp.array([50.0, 0, 0, 0, 0])
    np.testing.assert_array_equal(layer.apply({"params": params}, x), 0)


def test_costs_are_those_of_the_dense_modules():
    for module in modules(dense("vit"), PARTS):
        assert abs(4 * module.learner - module.dense) <= (0 if module.path.endswith("mlp") else 4 * 32)
        assert module.gate == 16 * 3 + 3 * (5 if module.path.endswith("mlp") else 4)
    gated = next(m for m in modules(dense("decoder"), PARTS) if m.path.endswith("mlp"))
    assert (4 * gated.learner, gated.dense) == (2 * 16 * 48, 3 * 16 * 32)


def test_logits_of_a_gate_are_those_that_it_chooses_by():
    params = learned("vit")
    module = modules(dense("vit"), PARTS)[-1]
    with captured(lambda m: isinstance(m, Gate)) as calls:
        VIT.clone(parts=AcmParts(learners=4, gate_hidden=(3,), mode="masked")).apply({"params": params}, IMAGES)
    given, chosen = calls[f"{module.path}/learners/gate"]
    logits = gate_logits(params, module, PARTS, given)
    np.testing.assert_array_equal(jnp.argmax(logits, -1), chosen.sum(-1))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AcmParts(mode="none"), "mode='none' is not one of"),
        (lambda: AcmParts(learners=4, number=5), r"number must lie in 0\.\.4"),
        (lambda: ungated(33), "gated layer of odd hidden width 33"),
        (lambda: modules(dense("vit"), AcmParts(learners=5)), "5 learners do not divide a hidden width of 32"),
        (lambda: modules(dense("vit"), PARTS, where="encoder_.*"), r"matches 'encoder_\.\*'; is this the tree"),
        (lambda: acmize(dense("vit"), PARTS, jax.random.key(0), start="svd"), "start='svd' is not one of"),
        (lambda: VIT.clone(parts=PARTS, scan_layers=True).init(jax.random.key(0), IMAGES), "AcmParts needs unrolled layers"),
        (lambda: VIT.clone(parts=PARTS, remat=True).init(jax.random.key(0), IMAGES), "AcmParts needs unrolled layers"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_only_feed_forward_layers_where_projections_stay_dense():
    parts = AcmParts(learners=2, projections=False)
    assert [m.path for m in modules(dense("vit"), parts)] == ["block_0/mlp", "block_1/mlp"]
    params = acmize(dense("vit"), parts, jax.random.key(0))
    kept = [tree["block_0"]["attention"]["query"]["kernel"] for tree in (params, dense("vit"))]
    np.testing.assert_array_equal(*kept)
    assert VIT.clone(parts=parts).apply({"params": params}, IMAGES)[0].shape == (2, 5)
