# SPDX-License-Identifier: Apache-2.0
"""Which pages of a cache a decode step reads.

Shapes: B batch, K slots of the cache, S slots of a page, L pages listed.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Pages:
    """Listed pages of each row's own cache, for `pallas_kernels.sparse_decode_attention`.

    Attributes:
      numbers: `[B, 1, L]`, shared by the heads. lengths: `[B, 1]` slots listed, the last page being cut short.
      size: S.
    """

    numbers: Int[Array, "B 1 L"]
    lengths: Int[Array, "B 1"]
    size: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class SinkWindow:
    """The first tokens of a row and the latest ones, in whole pages.

    Attributes:
      window, sinks: tokens at the end, the current one included, and at the start that are read at least; pages are read
        whole, so that up to S - 1 more may be on each side.
      page: S, a multiple of 16.

    Raises:
      ValueError: no window, a negative number of sinks, or a page of another size.

    Source: Xiao et al. 2024 (StreamingLLM): attention sinks and a sliding window.

    Differs: positions stay those of the text; the cache keeps all tokens, of which a step reads these.
    """

    window: int = 1024
    sinks: int = 4
    page: int = 64

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1 or self.page < 16 or self.page % 16:
            raise ValueError(
                "sinks must not be negative, window at least 1 and page a positive multiple of 16; got "
                f"sinks={self.sinks}, window={self.window}, page={self.page}"
            )

    def pages(self, key_bias: Float[Array, "B K"], slot: Int[Array, ""]) -> Pages:
        """The pages for a token in `slot`, where a `key_bias` of -inf marks slots that hold no token of the row."""
        first = jnp.argmax(key_bias > -jnp.inf, axis=1).astype(jnp.int32)[:, None] // self.page
        starts, ends = self._listed()
        now = slot // self.page
        lowest = jnp.maximum(now - ends + 1, first)
        before = jnp.clip(lowest - first, 0, starts)
        place = jnp.arange(starts + ends, dtype=jnp.int32)
        numbers = jnp.where(place < before, first + place, jnp.minimum(lowest + place - before, now))
        lengths = (before + now - lowest) * self.page + slot % self.page + 1
        return Pages(numbers[:, None], lengths.astype(jnp.int32), self.page)

    @property
    def slots(self) -> int:
        """Slots that a step reads at most."""
        return sum(self._listed()) * self.page

    def _listed(self) -> tuple[int, int]:
        """Pages of the sinks and of the window, as runs of tokens that start anywhere in a page touch them."""
        starts, ends = ((tokens + self.page - 2) // self.page + 1 for tokens in (self.sinks, self.window))
        return starts if self.sinks else 0, ends
