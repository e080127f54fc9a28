# SPDX-License-Identifier: Apache-2.0
"""Unrolled and scanned parameter trees."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from layers.stacking import stack, unstack
from layers.vit import ViT

X = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
VIT = ViT(4, 16, 2, 2, 32, num_classes=5, image_size=(8, 8), channels=1)


# The compiler takes most of the time here; without its optimisations it takes half.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@pytest.fixture(scope="module")
def boxed():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(VIT.init, jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_there_and_back_is_the_identity(boxed):
    back = unstack(stack(boxed))
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(back), nn.unbox(boxed))

    def names(tree):
        return jax.tree.map(lambda leaf: leaf.names, tree, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    assert names(back) == names(boxed)


def test_the_stacked_tree_is_that_of_the_scanned_model(boxed):
    scanned = jax.eval_shape(VIT.clone(scan_layers=True).init, jax.random.key(0), X)["params"]

    def described(tree):
        return jax.tree.map(
            lambda leaf: (leaf.value.shape, leaf.names), tree, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
        )

    assert described(stack(boxed)) == described(scanned)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_and_unrolled_models_agree(boxed, remat):
    params = nn.unbox(boxed)

    def loss(model, params):
        logits, aux = model.apply({"params": params}, X)
        return (logits**2).sum(), (logits, aux["tokens"])

    (_, (logits, tokens)), grads = _jit(jax.value_and_grad(lambda p: loss(VIT, p), has_aux=True))(params)
    scanned = VIT.clone(scan_layers=True, remat=remat)
    (_, (out, counts)), scan_grads = _jit(jax.value_and_grad(lambda p: loss(scanned, p), has_aux=True))(stack(params))
    np.testing.assert_allclose(out, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), unstack(scan_grads), grads)


def test_trees_without_the_layers_are_refused():
    with pytest.raises(ValueError, match=r"no complete run block_0, block_1, \.\.\. among \['block_0', 'block_2'\]"):
        stack({"block_0": {}, "block_2": {}})
    with pytest.raises(ValueError, match="no blocks among"):
        unstack({"block_0": {}})
    with pytest.raises(ValueError, match=r"differ in the number of layers: \[2, 3\]"):
        unstack({"blocks": {"a": np.zeros((2, 4)), "b": np.zeros((3, 4))}})
