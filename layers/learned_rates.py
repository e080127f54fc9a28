# SPDX-License-Identifier: Apache-2.0
"""The learned part of DiffRate: at every layer one logit for each number of patches that pruning or merging may keep."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from adaptive.rates import masked, proxy
from adaptive.rates.schedules import Schedule
from adaptive.reduction.diffrate import ORDERS
from adaptive.tokens import Signals, TokenSet
from layers.hooks import Reduce


class LearnedRates(nn.Module):
    """A hook that prunes and merges under masks, by rates that are learned; see `adaptive.rates.proxy`.

    Its arrays keep their length: it is for training and for checking. `schedule` turns its parameters into the static numbers
    that `as_reduce` runs with arrays that shrink.

    Attributes:
      layers: L of the backbone; patches: P.
      granularity: patches between two candidates.
      first, last: layers at the beginning and at the end that compress nothing (DeiT: 1 and 0, MAE: 1 and 1).
      start: schedule that the rates start around (`proxy.logits_around`); None starts with every number as likely.
      order: in which tokens go, of `adaptive.reduction.diffrate.ORDERS`.

    Raises:
      ValueError: an unknown order.

    Source: Chen et al. 2023 (DiffRate); logits start at 0; tokens go in the order of class attention.
    Differs: may start around a schedule. From zeros the first layer that compresses takes the whole budget, and few steps do
      not bring tokens back to it. The order may be another one, under which a mask learns from merging as well.
    """

    layers: int
    patches: int
    granularity: int = 4
    first: int = 1
    last: int = 0
    start: Schedule | None = None
    order: str = "cls_attention"
    place: str = "between"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is not one of {tuple(ORDERS)}")
        super().__post_init__()

    @property
    def signals(self) -> tuple[str, ...]:
        """What the order reads."""
        return ORDERS[self.order].signals

    @property
    def choices(self) -> tuple[int, ...]:
        """The candidate numbers of kept patches."""
        return proxy.candidates(self.patches, self.granularity)

    @property
    def acting(self) -> tuple[int, ...]:
        """Layers that compress."""
        return tuple(range(self.first, self.layers - self.last))

    def acts(self, layer: int, length: int) -> bool:
        """Whether `layer` compresses; it does whatever the rates are, since they are not known when the model is traced."""
        del length
        return layer in self.acting

    @nn.compact
    def __call__(self, tokens: TokenSet, signals: Signals) -> masked.MaskedReduction:
        """The masked reduction of `tokens [B, N, D]` at `signals.layer`."""
        init = nn.with_logical_partitioning(self._initial, ("layers", None, "gate"))
        logits = self.param("logits", init, (self.layers, 2, len(self.choices)), jnp.float32)[signals.layer]
        kept = jax.lax.stop_gradient(proxy.kept_tokens(logits, self.choices))
        masks = proxy.keep_mask(logits, self.choices, tokens.mass.shape[1])
        both = [proxy.PRUNE, proxy.MERGE]
        numbers, by_rank = (kept[i] for i in both), (masks[i] for i in both)
        return masked.prune_then_merge(tokens, signals, *numbers, *by_rank, ORDERS[self.order])

    def _initial(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        if self.start is None:
            return jnp.zeros(shape, dtype)
        whole = self.start.check(self.layers, self.patches + 1)
        kept = tuple(zip(whole.prune, whole.merge, strict=True))
        return jnp.asarray(proxy.logits_around(kept, self.choices), dtype)

    def schedule(self, logits: Float[Array, "L 2 G"]) -> Schedule:
        """The static numbers of trained `logits` (on the host, not under jit)."""
        return proxy.export(logits, self.choices, self.patches + 1, self.acting)


def as_reduce(schedule: Schedule, order: str = "cls_attention") -> Reduce:
    """The hook that runs a schedule with arrays that shrink."""
    return Reduce(ORDERS[order].method, schedule.merge, layered=(("alive", schedule.prune),))
