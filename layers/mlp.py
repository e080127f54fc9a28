# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from layers.linear import Initializer, Linear


def _gelu(x: Array) -> Array:
    # jax.nn.gelu goes through erfc, which costs a CPU twice the time of erf.
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def activation(name: str) -> Any:
    """The activation function of that name: "gelu" (exact), "gelu_tanh" (T5.1.1's "gelu_new"), "silu", "relu".

    Raises:
      ValueError: no such name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} is not one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class Mlp(nn.Module):
    """`out(act(hidden(x)))`, `[..., D] -> [..., D]`.

    Attributes:
      hidden: inner width.
      activation: a key of `ACTIVATIONS`.
      dropout: rate after the activation; needs the rng "dropout" unless `deterministic`.
    """

    hidden: int
    activation: str = "gelu"
    use_bias: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    out_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], *, deterministic: bool = True) -> Float[Array, "... D"]:
        common = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        y = Linear((self.hidden,), ("embed", "mlp"), kernel_init=self.kernel_init, name="hidden", **common)(x)
        y = activation(self.activation)(y)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        out_init = self.out_init or self.kernel_init
        return Linear(x.shape[-1:], ("mlp", "embed"), kernel_init=out_init, name="out", **common)(y)


class GatedMlp(nn.Module):
    """`out(act(gate(x)) * hidden(x))`, `[..., D] -> [..., D]`: T5.1.1's gated GELU ("gelu_tanh"), SwiGLU ("silu").

    Attributes are those of `Mlp`.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    hidden: int
    activation: str = "gelu_tanh"
    use_bias: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.xavier_uniform()
    out_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], *, deterministic: bool = True) -> Float[Array, "... D"]:
        common = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = Linear((self.hidden,), ("embed", "mlp"), kernel_init=self.kernel_init, name="gate", **common)(x)
        y = Linear((self.hidden,), ("embed", "mlp"), kernel_init=self.kernel_init, name="hidden", **common)(x)
        y *= activation(self.activation)(gate)
        y = nn.Dropout(self.dropout)(y, deterministic=deterministic)
        out_init = self.out_init or self.kernel_init
        return Linear(x.shape[-1:], ("mlp", "embed"), kernel_init=out_init, name="out", **common)(y)
