# SPDX-License-Identifier: Apache-2.0
"""Token Cropr's learned part: a hook whose queries score tokens, and the auxiliary heads that train them.

Shapes: B batch, N tokens, Q queries, D features.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import registry
from adaptive.reduction import cropr
from adaptive.tokens import Reduction, Signals, TokenSet
from layers.linear import Linear
from layers.mlp import Mlp
from layers.norms import LayerNorm


class CroprHead(nn.Module):
    """Queries of one layer and the classifier that reads what they gather.

    Attributes:
      num_classes: of the task; queries: Q.
    """

    num_classes: int
    queries: int = 1
    norm_epsilon: float = 1e-6
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, features: Float[Array, "B N D"], valid: Bool[Array, "B N"], *, classify: bool
    ) -> tuple[Float[Array, "B N"], Float[Array, "B c"] | None]:
        """Scores of the tokens, and logits in float32 averaged over the queries (None unless `classify`)."""
        width = features.shape[-1]
        init = nn.with_logical_partitioning(nn.initializers.truncated_normal(width**-0.5), ("gate", "embed"))
        queries = self.param("queries", init, (self.queries, width), self.param_dtype)
        scores = cropr.scores(features, queries)
        if not classify:
            return scores, None
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        z = cropr.gather(features, queries, valid).astype(self.dtype)
        y = LayerNorm(self.norm_epsilon, name="mlp_norm", **common)(z)
        z = z + Mlp(4 * width, name="mlp", **common)(y)
        z = LayerNorm(self.norm_epsilon, name="norm", **common)(z)
        logits = Linear((self.num_classes,), ("embed", "classes"), name="classifier", **common)(z)
        return scores, jnp.mean(logits.astype(jnp.float32), axis=1)


class Cropr(nn.Module):
    """The hook of "cropr": keeps the tokens that its queries score highest; auxiliary losses train the queries.

    Attributes:
      counts: surviving tokens after each layer, the class token included, as for `layers.hooks.Reduce`.
      num_classes: of the task; queries: Q, in every layer that prunes.
      place: after the block, as published.

    Source: Bergner et al. 2025: no projections, one head; `z = softmax(q x^T / sqrt(D)) x`, `z + MLP(LN z)`, a linear
    classifier of `LN z`; its cross-entropy has weight 1 and sends no gradient into the backbone.

    Differs: with more than one query an image has the mean of their logits, a reconstruction (the paper classifies with one).
    """

    counts: tuple[int, ...]
    num_classes: int
    queries: int = 1
    place: str = "after"
    signals: tuple[str, ...] = ()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        """One head for each layer; those of layers that prune nothing have no parameters.

        Raises ValueError without a class or a query.
        """
        if self.num_classes < 1 or self.queries < 1:
            raise ValueError(
                f"Cropr's heads classify with at least 1 query; got num_classes={self.num_classes}, queries={self.queries}"
            )
        self.layer = [
            CroprHead(self.num_classes, self.queries, dtype=self.dtype, param_dtype=self.param_dtype)
            for _ in self.counts
        ]

    def acts(self, layer: int, length: int) -> bool:
        """Whether `layer` changes the number of tokens."""
        return self.counts[layer] != length

    def __call__(self, tokens: TokenSet, signals: Signals) -> Reduction:
        """Prunes `tokens` to `counts[signals.layer]`; errors are the registry's."""
        # Heads need parameters also where no labels are at hand.
        scores, _ = self.layer[signals.layer](tokens.features, tokens.valid, classify=self.is_initializing())
        signals = signals.replace(gate_logits=scores)
        return registry.get("cropr")(tokens, signals, self.counts[signals.layer])

    def losses(self, tokens: TokenSet, signals: Signals, labels: Int[Array, " B"]) -> dict[str, tuple[Array, Array]]:
        """Cross-entropy of the auxiliary head over the tokens before they are pruned, `(sum over rows, rows)`."""
        _, logits = self.layer[signals.layer](tokens.features, tokens.valid, classify=True)
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
        return {f"cropr_{signals.layer}": (-jnp.sum(right), jnp.float32(labels.shape[0]))}
