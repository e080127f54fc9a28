# SPDX-License-Identifier: Apache-2.0
"""A linear map over the last axes of an array, with logical axis names on its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from layers.sharding import along_batch

Initializer = Callable[..., Any]


class Linear(nn.Module):
    """`x [..., *inputs] -> [..., *features]`; parameters `kernel [*inputs, *features]` and `bias [*features]`.

    Attributes:
      features: output axes; None where each call gives them.
      axes: logical name of each axis of the kernel: inputs, then features.
      use_bias: adds a bias, with the logical names of the features.
      dtype: of the computation; parameters stay in `param_dtype`.
      kernel_init: called with the flattened shape (inputs, outputs), so that fans are right for any number of axes.
    """

    features: tuple[int, ...] | None
    axes: tuple[str, ...]
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array, features: tuple[int, ...] | None = None) -> Array:
        """`x [..., *inputs]` to `[..., *features]`; `features` only where the attribute is None."""
        features = self.features if features is None else features
        contracted = len(self.axes) - len(features)
        inputs = x.shape[x.ndim - contracted :]

        def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return self.kernel_init(key, (math.prod(inputs), math.prod(features)), dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.axes),
            (*inputs, *features),
            self.param_dtype,
        )
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=contracted)
        if not self.use_bias:
            return along_batch(y)
        bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[contracted:])
        return along_batch(y + self.param("bias", bias_init, features, self.param_dtype).astype(self.dtype))
