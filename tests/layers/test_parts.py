# SPDX-License-Identifier: Apache-2.0
"""Parts of blocks, and what is captured of their calls."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from layers.linear import Linear
from layers.parts import PROJECTIONS, captured
from layers.vit import ViT

VIT = ViT(4, 8, 2, 2, 16, num_classes=3, image_size=(8, 8), channels=1)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 1)), jnp.float32)


def test_calls_are_captured_by_path_with_their_input_and_result():
    shapes = nn.unbox(jax.eval_shape(VIT.init, jax.random.key(0), IMAGES))
    params = jax.tree.map(
        lambda leaf: 0.3 * np.random.default_rng(1).normal(size=leaf.shape).astype(np.float32), shapes
    )

    @jax.jit
    def apply(params):
        with captured(lambda module: isinstance(module, Linear)) as calls:
            out = VIT.apply(params, IMAGES)[0]
        return out, {path: tuple(call) for path, call in calls.items() if path.startswith("block_1")}

    out, calls = apply(params)
    assert calls.keys() == {f"block_1/attention/{name}" for name in PROJECTIONS} | {
        "block_1/mlp/hidden",
        "block_1/mlp/out",
    }
    given, result = calls["block_1/mlp/hidden"]
    own = params["params"]["block_1"]["mlp"]["hidden"]
    np.testing.assert_allclose(given @ own["kernel"] + own["bias"], result, atol=1e-5)
    np.testing.assert_allclose(out, VIT.apply(params, IMAGES)[0], atol=1e-5)
