# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers in groups, over the parameters of a dense one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.experts import DynamicParts, ExpertParts
from layers.mlp import Mlp
from layers.parts import captured

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)


def params_of(layer, seed=0):
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), X))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def test_all_experts_are_the_dense_layer_and_few_are_its_masked_hidden_layer():
    whole = ExpertParts(groups=4, hyper=(("experts", 4),)).mlp(32, activation="relu")
    params = params_of(whole)
    mlp = {name: params[name] for name in ("hidden", "out")}
    np.testing.assert_allclose(whole.apply({"params": params}, X), Mlp(32, "relu").apply({"params": mlp}, X), atol=1e-5)
    few = ExpertParts(groups=4, hyper=(("experts", 2),)).mlp(32, activation="relu")
    logits = jnp.tanh(X @ params["router"]["first"]["kernel"]) @ params["router"]["second"]["kernel"]
    chosen = np.argsort(np.argsort(-logits, axis=-1), axis=-1) < 2
    hidden = jax.nn.relu(X @ mlp["hidden"]["kernel"] + mlp["hidden"]["bias"]) * np.repeat(chosen, 8, axis=-1)
    want = hidden @ mlp["out"]["kernel"] + mlp["out"]["bias"]
    np.testing.assert_allclose(few.apply({"params": params}, X), want, atol=1e-5)


def test_second_experts_are_pruned_by_ratio():
    numbers = {}
    for ratio in (0.0, 1.0):
        layer = ExpertParts(groups=4, method="mc_moe", hyper=(("ratio", ratio), ("protected", 0.0))).mlp(32)
        with captured(lambda module: module.name == "router") as calls:
            layer.apply({"params": params_of(layer)}, X)
        numbers[ratio] = float(calls["router"].result.sum(-1).mean())
    assert numbers == {0.0: 2.0, 1.0: 1.0}


def test_a_token_that_is_switched_off_gets_nothing_and_groups_are_shared_by_the_example():
    layer = DynamicParts(groups=4).mlp(32)
    params = params_of(layer, seed=6)
    params["router"]["token_out"]["bias"] = np.zeros(1, np.float32)
    with captured(lambda module: module.name == "router") as calls:
        out = np.asarray(layer.apply({"params": params}, X))
    chosen = np.asarray(calls["router"].result)
    on = chosen[..., 0] > 0
    assert on.any() and not on.all()
    np.testing.assert_array_equal(out[~on], 0)
    for row, runs in zip(chosen, on, strict=True):
        assert len(np.unique(row[runs], axis=0)) <= 1


def test_routers_start_with_all_switched_on():
    layer = DynamicParts(groups=4).mlp(32)
    params = nn.unbox(layer.init(jax.random.key(0), X))["params"]
    with captured(lambda module: module.name == "router") as calls:
        layer.apply({"params": params}, X)
    assert float(calls["router"].result.mean()) > 0.9


def test_groups_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="5 groups do not divide a hidden width of 32"):
        ExpertParts(groups=5).mlp(32).init(jax.random.key(0), X)


@pytest.mark.parametrize("parts", [ExpertParts(groups=4), DynamicParts(groups=4)])
def test_no_parameter_has_two_axes_of_one_name(parts):
    shapes = jax.eval_shape(
        lambda x: parts.mlp(32).init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x), X
    )
    specs = jax.tree.leaves(nn.get_partition_spec(shapes["params"]))
    assert any("router" in spec for spec in specs)
    assert all(len(set(spec)) == len(spec) for spec in specs)
