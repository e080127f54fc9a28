# SPDX-License-Identifier: Apache-2.0
"""A `DuoLM` as the oracles and searches of `adaptive.routing` see it.

Two meanings of a token's pattern, since its loss depends on what earlier tokens did:

- "pattern": the whole sequence takes the pattern (one forward pass a pattern), and each token's loss is read off;
- a reference run: earlier tokens are as they were on the paths of that run, in every layer, and only this token takes the
  pattern. Each token's loss then depends on its own pattern alone, so that searches work for each token by itself.

Shapes: B batch, N tokens, D features, L layers.

Source: Alizadeh et al. 2024 (Duo-LLM), stage 2, which does not say what earlier tokens do; both are reconstructions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive.routing.patterns import Layered
from adaptive.width import duo
from layers.attention import Memory
from layers.duo_lm import DuoLM


def token_losses(logits: Float[Array, "... N V"], labels: Int[Array, "... N"]) -> Float[Array, "... N"]:
    """Cross-entropies in nats, in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def as_layered(
    model: DuoLM,
    params: Any,
    readout: Callable[[Float[Array, "B N V"]], Any],
    *,
    choices: Sequence[int] = (duo.SKIP, duo.SMALL, duo.BIG),
    context: Sequence[Memory] | None = None,
) -> Layered:
    """The model layer by layer; its state is the residual stream `[B, N, D]`, and a pattern costs its number of big modules.

    Args:
      readout: logits to a pytree of losses.
      choices: that a pattern's entries 0, 1, ... stand for.
      context: of `DuoLM.memories`, one for each layer: each token by itself in that run; None: whole sequences.

    Raises:
      ValueError: a context of another number of layers.
    """
    if context is not None and len(context) != model.layers:
        raise ValueError(f"the context must have the memories of {model.layers} layers; got {len(context)}")

    def apply(*arguments: Any, method: str) -> Array:
        return model.apply({"params": params}, *arguments, method=method)

    return Layered(
        layers=model.layers,
        costs=tuple(int(choice == duo.BIG) for choice in choices),
        shared=lambda x, layer: apply(x, layer, None if context is None else context[layer], method="attend"),
        step=lambda x, layer, choice: apply(x, layer, choices[choice], method="feed"),
        readout=lambda x: readout(apply(x, method="readout")),
    )


def embed(model: DuoLM, params: Any, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
    """The state before the first layer."""
    return model.apply({"params": params}, ids, method="embed")
