# SPDX-License-Identifier: Apache-2.0
"""Norms, feed-forward layers and the linear map under them."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.linear import Linear
from layers.mlp import GatedMlp, Mlp, activation
from layers.norms import LayerNorm, RMSNorm

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def _init(layer, x=X):
    """Parameters moved off their ones and zeros."""
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), variables)


def test_layer_norm_equals_a_restatement():
    layer = LayerNorm(epsilon=1e-3)
    variables = _init(layer)
    params = variables["params"]
    mean, var = X.mean(-1, keepdims=True), X.var(-1, keepdims=True)
    expected = (X - mean) / np.sqrt(var + 1e-3) * params["scale"] + params["bias"]
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_equals_a_restatement_and_has_a_scale_only():
    layer = RMSNorm(epsilon=1e-3)
    variables = _init(layer)
    assert set(variables["params"]) == {"scale"}
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-3) * variables["params"]["scale"]
    np.testing.assert_allclose(layer.apply(variables, X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_statistics_are_in_float32(norm):
    """Values that bfloat16 holds exactly, whose sum of squares it could not."""
    x = (200.0 + np.arange(256) % 2 * 2.0).astype(jnp.bfloat16)[None]
    layer = norm(dtype=jnp.bfloat16)
    out = layer.apply(nn.unbox(layer.init(jax.random.key(0), x)), x)
    exact = norm().apply(nn.unbox(norm().init(jax.random.key(0), x)), x.astype(np.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_a_constant_row_has_finite_values_and_gradients(norm):
    layer, x = norm(), np.zeros((1, 8), np.float32)
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    out, grad = jax.value_and_grad(lambda x: jnp.sum(layer.apply(variables, x)))(x)
    assert out == 0 and np.all(np.isfinite(grad))


def _gelu(x):
    return np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(x)


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("name", "formula"), [("gelu", _gelu), ("gelu_tanh", _gelu_tanh), ("silu", lambda x: x / (1 + np.exp(-x)))]
)
def test_activations(name, formula):
    x = np.linspace(-6, 6, 41).astype(np.float32)
    np.testing.assert_allclose(activation(name)(jnp.asarray(x)), formula(x), rtol=1e-4, atol=2e-6)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation='swish'"):
        activation("swish")


def test_mlp_equals_a_restatement():
    layer = Mlp(16)
    variables = _init(layer)
    p = jax.tree.map(np.asarray, variables["params"])
    hidden = _gelu(X @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    np.testing.assert_allclose(
        layer.apply(variables, X), hidden @ p["out"]["kernel"] + p["out"]["bias"], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("name", "formula"), [("gelu_tanh", _gelu_tanh), ("silu", lambda x: x / (1 + np.exp(-x)))])
def test_gated_mlp_equals_a_restatement_without_biases(name, formula):
    layer = GatedMlp(16, activation=name)
    variables = _init(layer)
    p = jax.tree.map(np.asarray, variables["params"])
    assert {key: set(value) for key, value in p.items()} == {key: {"kernel"} for key in ("gate", "hidden", "out")}
    hidden = formula(X @ p["gate"]["kernel"]) * (X @ p["hidden"]["kernel"])
    np.testing.assert_allclose(layer.apply(variables, X), hidden @ p["out"]["kernel"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [Mlp(16, dropout=0.5), GatedMlp(16, dropout=0.5)])
def test_dropout_only_when_asked_for(layer):
    variables = _init(layer)
    plain = layer.clone(dropout=0.0).apply(variables, X)
    np.testing.assert_array_equal(layer.apply(variables, X), plain)

    def draw(seed):
        return layer.apply(variables, X, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    np.testing.assert_array_equal(draw(0), draw(0))
    assert np.any(draw(0) != draw(1)) and np.any(draw(0) != plain)


@pytest.mark.parametrize("layer", [Mlp(16), GatedMlp(16)])
def test_bfloat16_compute_with_float32_parameters_and_logical_axes(layer):
    half = layer.clone(dtype=jnp.bfloat16)
    boxed = half.init(jax.random.key(0), X)
    variables = nn.unbox(boxed)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    out = half.apply(variables, X)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), layer.apply(variables, X), atol=0.1)
    assert boxed["params"]["hidden"]["kernel"].names == ("embed", "mlp")
    assert boxed["params"]["out"]["kernel"].names == ("mlp", "embed")


def test_linear_contracts_several_axes_with_the_fans_of_the_flattened_kernel():
    layer = Linear((6, 50), ("heads", "head_dim", "embed", "mlp"), kernel_init=nn.initializers.lecun_normal())
    x = np.random.default_rng(0).normal(size=(2, 10, 40)).astype(np.float32)
    variables = _init(layer, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert kernel.shape == (10, 40, 6, 50) and bias.shape == (6, 50)
    np.testing.assert_allclose(
        layer.apply(variables, x), np.einsum("bhk,hkdm->bdm", x, kernel) + bias, rtol=1e-4, atol=1e-4
    )
    fresh = nn.unbox(layer.init(jax.random.key(0), x))["params"]["kernel"]
    assert abs(np.std(fresh) * 400**0.5 - 1) < 0.02
