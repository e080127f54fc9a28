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
      features: output axes.
      axes: logical name of each axis of the kernel: inputs, then features.
      use_bias: adds a bias, with the logical names of the features.
      dtype: of the computation; parameters stay in `param_dtype`.
      kernel_init: called with the flattened shape (inputs, outputs), so that fans are right for any number of axes.
    """

    features: tuple[int, ...]
    axes: tuple[str, ...]
    use_bias: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    bias_init: Initializer = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        contracted = len(self.axes) - len(self.features)
        inputs = x.shape[x.ndim - contracted :]

        def kernel_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return self.kernel_init(key, (math.prod(inputs), math.prod(self.features)), dtype).reshape(shape)

        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(kernel_init, self.axes),
            (*inputs, *self.features),
            self.param_dtype,
        )
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=contracted)
        if not self.use_bias:
            return along_batch(y)
        bias_init = nn.with_logical_partitioning(self.bias_init, self.axes[contracted:])
        return along_batch(y + self.param("bias", bias_init, self.features, self.param_dtype).astype(self.dtype))
