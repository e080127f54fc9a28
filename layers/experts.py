# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers whose hidden units run in groups: clusters of a trained layer (MoEfication), or switched channels.

Both keep the parameters of `layers.mlp.Mlp` and add those of a router, and both compute all units and set to 0 those that do
not run: their saving is counted, not measured.

Shapes: B batch, N tokens, D features, U hidden numbers, K groups.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive import registry
from adaptive.tokens import Signals, TokenSet
from layers.linear import Linear
from layers.mlp import activation
from layers.parts import Parts


class ExpertRouter(nn.Module):
    """Experts `[B, N, K]` of 0 and 1 for tokens `[B, N, D]`: two linear maps without biases and a tanh between them.

    Attributes:
      experts: K; hidden: width between the maps; method: registered method of kind "width"; hyper: its keyword arguments.

    Source: Wojcik et al. 2025, the comparison with MoEfication.
    """

    experts: int
    hidden: int
    method: str = "moefication"
    hyper: tuple[tuple[str, Any], ...] = ()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates the maps."""
        common = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.first = Linear((self.hidden,), ("embed", "gate"), **common)
        self.second = Linear((self.experts,), ("gate", "router"), **common)

    def logits(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        """One for each expert, in float32."""
        return self.second(jnp.tanh(self.first(x))).astype(jnp.float32)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        """The experts that run. Importance of tokens, where a method asks for it, is their norm alone."""
        signals = Signals(choice_logits=self.logits(x), column_sums=jnp.ones(x.shape[:2], jnp.float32))
        return registry.get(self.method)(TokenSet.create(x), signals, **dict(self.hyper))


class WidthRouter(nn.Module):
    """Groups `[B, N, K]` of 0 and 1: tokens choose whether they run, by themselves; groups are chosen for the whole example.

    Attributes:
      groups: K; sample: draws by the rng "dropout".

    Source: Zhao et al. 2025 (DyDiT): a bottleneck of D / 16 for tokens, biases that start with all switched on.

    Differs: the groups hang on the mean of an example's tokens, as there is no timestep to hang on; initial biases of 3, from
      which short training finds its way.
    """

    groups: int
    sample: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        """The groups that run."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "bias_init": nn.initializers.constant(3.0)}
        inner = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        bottleneck = nn.relu(Linear((max(x.shape[-1] // 16, 4),), ("embed", "gate"), name="token_in", **inner)(x))
        token = Linear((1,), ("gate", "router"), name="token_out", **common)(bottleneck)
        groups = Linear((self.groups - 1,), ("embed", "router"), name="groups", **common)(jnp.mean(x, axis=1))
        groups = jnp.broadcast_to(groups[:, None], (*x.shape[:2], self.groups - 1))
        signals = Signals(
            choice_logits=jnp.concatenate([token, groups], axis=-1).astype(jnp.float32),
            rng=self.make_rng("dropout") if self.sample else None,
        )
        return registry.get("dydit")(TokenSet.create(x), signals)


class GroupedMlp(nn.Module):
    """`out(chosen act(hidden(x)))`; without a group a token gets nothing, the bias of `out` included.

    Attributes:
      hidden: U; settings: what makes the router.
    """

    hidden: int
    settings: ExpertParts | DynamicParts
    activation: str = "gelu"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], *, deterministic: bool = True) -> Float[Array, "B N D"]:
        """The layer, without dropout.

        Raises:
          ValueError: the groups do not divide the hidden width.
        """
        del deterministic
        if self.hidden % self.settings.groups:
            raise ValueError(f"{self.settings.groups} groups do not divide a hidden width of {self.hidden}")
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = activation(self.activation)(Linear((self.hidden,), ("embed", "mlp"), name="hidden", **common)(x))
        chosen = self.settings.router(name="router", **common)(x)
        y *= jnp.repeat(chosen, self.hidden // self.settings.groups, axis=-1).astype(y.dtype)
        out = Linear(x.shape[-1:], ("mlp", "embed"), name="out", **common)(y)
        return out * jnp.max(chosen, axis=-1, keepdims=True).astype(out.dtype)


@dataclasses.dataclass(frozen=True)
class GroupedParts(Parts):
    """Feed-forward layers in groups by the `router` of a subclass; projections stay dense.

    Attributes:
      groups: K of each layer.
    """

    groups: int = 4

    def mlp(self, hidden: int, **options: Any) -> nn.Module:
        """A layer in groups, in place of a dense one."""
        names = ("activation", "dtype", "param_dtype", "name")
        return GroupedMlp(hidden, self, **{name: options[name] for name in names if name in options})


@dataclasses.dataclass(frozen=True)
class ExpertParts(GroupedParts):
    """Clusters of a trained layer and their routers.

    Attributes:
      router_hidden: see `ExpertRouter`; method, hyper: which experts run.
    """

    router_hidden: int = 16
    method: str = "moefication"
    hyper: tuple[tuple[str, Any], ...] = (("experts", 2),)

    def router(self, **options: Any) -> ExpertRouter:
        """The router of experts."""
        return ExpertRouter(self.groups, self.router_hidden, self.method, self.hyper, **options)

    def router_macs(self, width: int) -> int:
        """MACs of a router for one token."""
        return self.router_hidden * (width + self.groups)


@dataclasses.dataclass(frozen=True)
class DynamicParts(GroupedParts):
    """Switched channel groups and tokens; `sample` draws them, for training."""

    sample: bool = False

    def router(self, **options: Any) -> WidthRouter:
        """The router of groups and tokens."""
        return WidthRouter(self.groups, self.sample, **options)

    def router_macs(self, width: int) -> int:
        """MACs of a router for one token; what is done once an example is not counted."""
        return max(width // 16, 4) * (width + 1)
