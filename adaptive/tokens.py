# SPDX-License-Identifier: Apache-2.0
"""Token sets, the signals a backbone hands over, and reductions as linear maps.

Shapes: B batch, N tokens before a reduction, M slots after it, N0 tokens of the original sequence, D features,
C coordinates or channels, H heads, Q queries.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import compact as compaction
from pallas_kernels import merge as merging

# Weighted sums of features accumulate in float32; a TPU would otherwise multiply float32 operands in bfloat16.
_PRECISION = jax.lax.Precision.HIGHEST


@flax.struct.dataclass
class TokenSet:
    """An immutable set of tokens.

    Attributes:
      features: `[B, N, D]`.
      mass: `[B, N]` float32, number of original tokens that each token stands for; 0 in padding.
      coords: `[B, N, C]` float32, position(s) in the original sequence or grid; a merged token carries the weighted mean.
      origin: `[B, N0]` int32, current slot that carries each original token; -1 when it was dropped or is padding.
      keep: `[B, N]` float32 in {0, 1}, while rates are learned: tokens at 0 are gone, though the arrays still hold them with
        the mass that they had, and its gradient says what they were worth. None elsewhere: all tokens with mass are there.
    """

    features: Float[Array, "B N D"]
    mass: Float[Array, "B N"]
    coords: Float[Array, "B N C"]
    origin: Int[Array, "B N0"]
    keep: Float[Array, "B N"] | None = None

    @classmethod
    def create(
        cls,
        features: Float[Array, "B N D"],
        *,
        mask: Bool[Array, "B N"] | None = None,
        mass: Float[Array, "B N"] | None = None,
        coords: Float[Array, "B N C"] | None = None,
    ) -> TokenSet:
        """A token set over `features [B, N, D]`, each token standing for itself.

        Args:
          features: `[B, N, D]`.
          mask: `[B, N]` bool, True for real tokens; all real when None.
          mass: `[B, N]` tokens that each token stands for already; 1 when None. Set to 0 where `mask` is False.
          coords: `[B, N, C]` positions; `0..N-1` with C=1 when None.

        Raises:
          ValueError: a shape does not fit `features`.
        """
        if features.ndim != 3:
            raise ValueError(
                f"features must be [B, N, D]; got shape {features.shape}. Add a batch axis: features[None]."
            )
        batch, length, _ = features.shape
        for name, value in (("mask", mask), ("mass", mass)):
            if value is not None and value.shape != (batch, length):
                raise ValueError(f"{name} must be [B, N] = {(batch, length)}; got shape {value.shape}")
        if coords is not None and (coords.ndim != 3 or coords.shape[:2] != (batch, length)):
            raise ValueError(f"coords must be [B, N, C] with [B, N] = {(batch, length)}; got shape {coords.shape}")
        mass = jnp.ones((batch, length), jnp.float32) if mass is None else jnp.asarray(mass, jnp.float32)
        if mask is not None:
            mass = jnp.where(mask, mass, 0.0)
        slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        coords = slots[..., None] if coords is None else coords
        return cls(features, mass, coords.astype(jnp.float32), jnp.where(mass > 0, slots, -1))

    @property
    def valid(self) -> Bool[Array, "B N"]:
        """`[B, N]` True where a token is real, and not gone."""
        return self.mass > 0 if self.keep is None else (self.mass > 0) & (self.keep > 0)

    @property
    def kept_mass(self) -> Float[Array, "B N"]:
        """`[B, N]` mass of the tokens that are there, 0 of the others."""
        return self.mass if self.keep is None else self.mass * self.keep

    @property
    def count(self) -> Int[Array, " B"]:
        """`[B]` number of real tokens."""
        return jnp.sum(self.valid, axis=-1, dtype=jnp.int32)

    @property
    def log_mass(self) -> Float[Array, "B N"]:
        """`[B, N]` log mass, the key bias of proportional attention; -inf in padding. Gone tokens have that of their mass.

        Source: Bolya et al. 2023 (ToMe), eq. 1.
        """
        # The inner where keeps the gradient finite where the mass is 0.
        real = self.mass > 0
        return jnp.where(real, jnp.log(jnp.where(real, self.mass, 1.0)), -jnp.inf)


@flax.struct.dataclass
class Signals:
    """What a backbone can hand to a method; fields that were not asked for are None.

    Attributes:
      keys, queries, values: `[B, N, C]` (ToMe's metric is the keys averaged over heads).
      cls_attention: `[B, N]` attention of the class token to every token, averaged over heads.
      attention: `[B, H, N, N]` the whole map, for small cases only.
      column_sums: `[B, N]` attention that each token receives, summed over queries and averaged over heads.
      score_excess: `[B]` how far attention logits exceed 5, on average over heads, real queries and real keys.
      text_attention: `[B, Q, N]` rows of text queries.
      text_features: `[B, Q, C]`; image_text_similarity: `[B, N]`; frame_features: `[B, T, C]`.
      token_ids: `[B, N]` vocabulary ids (byte-level methods).
      gate_logits: `[B, N]` output of a learned gate, high to keep.
      boundary_logits: `[B, N]` output of a learned boundary predictor, high where a chunk ends.
      choice_logits: `[B, N, C]` output of a gate or a router, one for each choice or unit.
      layer_scores: `[B, N, L]` what each layer says of stopping there: a halting probability, a confidence; in 0..1.
      entropies: `[B, N]` in nats, of the prediction of the next byte from the bytes up to this one.
      rng: a PRNG key for methods that draw.
      cls_token: True when slot 0 is a class token, which every method then keeps.
      grid: `(t, h, w)` of the patches; layer: index of the layer. Both are static.
    """

    keys: Any = None
    queries: Any = None
    values: Any = None
    cls_attention: Any = None
    attention: Any = None
    column_sums: Any = None
    score_excess: Any = None
    text_attention: Any = None
    text_features: Any = None
    image_text_similarity: Any = None
    frame_features: Any = None
    token_ids: Any = None
    gate_logits: Any = None
    boundary_logits: Any = None
    choice_logits: Any = None
    layer_scores: Any = None
    entropies: Any = None
    rng: Any = None
    cls_token: bool = flax.struct.field(pytree_node=False, default=False)
    grid: tuple[int, int, int] | None = flax.struct.field(pytree_node=False, default=None)
    layer: int | None = flax.struct.field(pytree_node=False, default=None)


def _gather(values: Array, index: Int[Array, "B M"]) -> Array:
    """Rows `index [B, M]` of `values [B, N, ...]`; rows with index -1 are zero."""
    expand = index.reshape(index.shape + (1,) * (values.ndim - 2))
    rows = jnp.take_along_axis(values, jnp.maximum(expand, 0), axis=1)
    return jnp.where(expand >= 0, rows, jnp.zeros((), values.dtype))


def _combine(matrix: Float[Array, "B M N"], values: Array) -> Array:
    """`matrix @ values` for `values [B, N, ...]`, accumulated in float32, in the dtype of `values`."""
    flat = values.reshape(*values.shape[:2], -1).astype(jnp.float32)
    out = jnp.einsum("bmn,bnd->bmd", matrix.astype(jnp.float32), flat, precision=_PRECISION)
    return out.reshape(matrix.shape[:2] + values.shape[2:]).astype(values.dtype)


@flax.struct.dataclass
class Reduction:
    """A reduction in which every token joins at most one slot: `out[m] = sum over assign[n] = m of weight[n] x[n]`.

    Attributes:
      slots: `[B, M]` int32, token that heads each output slot; -1 where no single token does (a fused or an empty slot).
      assign: `[B, N]` int32, slot that each token joins; -1 when dropped.
      weight: `[B, N]` float32, coefficient of each token in its slot. A method makes them sum to 1 over a slot.
      merges: static; False when every slot is exactly its head, so that a gather is enough.
      stands_at_head: static; True when a slot has the coordinates of its head whatever joins it (chunks of a text), and the
        mass of all that joins it even where its features are the head's alone.
      packed: static; True when the slots are the surviving tokens in their order, empty slots last, so that rows move by
        compaction, whose gradient is a gather too. It has no say where `merges` is True.
      odd_last: static; True when every odd token heads a slot, in order, those are the last slots, and each slot before them is
        one even token's own; a kernel then does less.
      in_order: static; True when, beside `odd_last`, those even tokens stand in their order; a kernel then does less still.
    """

    slots: Int[Array, "B M"]
    assign: Int[Array, "B N"]
    weight: Float[Array, "B N"]
    merges: bool = flax.struct.field(pytree_node=False, default=True)
    stands_at_head: bool = flax.struct.field(pytree_node=False, default=False)
    packed: bool = flax.struct.field(pytree_node=False, default=False)
    odd_last: bool = flax.struct.field(pytree_node=False, default=False)
    in_order: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def identity(cls, batch: int, length: int) -> Reduction:
        """The reduction that changes nothing, over `[batch, length]` tokens."""
        slots = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        return cls(slots, slots, jnp.ones((batch, length), jnp.float32), merges=False)

    @property
    def num_slots(self) -> int:
        """M, the static number of output slots."""
        return self.slots.shape[1]

    def support(self) -> Float[Array, "B M N"]:
        """`[B, M, N]` 1 where token n joins slot m."""
        return jax.nn.one_hot(self.assign, self.num_slots, axis=1, dtype=jnp.float32)

    def share(self) -> Float[Array, "B M N"]:
        """`[B, M, N]` how each token's mass divides over the slots: here all of it goes to the slot it joins."""
        return self.support()

    def matrix(self) -> Float[Array, "B M N"]:
        """`[B, M, N]` the linear map itself."""
        return self.support() * self.weight[:, None, :]

    def reduce(self, values: Array) -> Array:
        """`values [B, N, ...]` mapped to `[B, M, ...]` (features, or keys and values of a cache)."""
        if self.merges:
            promised = {"odd_last": self.odd_last, "in_order": self.in_order}
            return merging.merge(values, self.assign, self.weight, self.num_slots, **promised)
        if self.packed:
            return compaction.compact(values, self._packing())
        return _gather(values, self.slots)

    def reduce_mass(self, mass: Float[Array, "B N"]) -> Float[Array, "B M"]:
        """`mass [B, N]` summed over the tokens of each slot."""
        if not (self.merges or self.stands_at_head):
            return _gather(mass, self.slots)
        return merging.merge(mass[..., None], self.assign, jnp.ones_like(self.weight), self.num_slots)[..., 0]

    def apply(self, tokens: TokenSet) -> TokenSet:
        """The reduced token set: features and coordinates averaged, mass summed, origin followed.

        With `stands_at_head` coordinates are those of the heads.
        """
        features = self.reduce(tokens.features)
        if self.merges and not self.stands_at_head:
            known = tokens.mass, tokens.coords, tokens.origin
            return TokenSet(features, *merging.merge_facts(*known, self.slots, self.assign, self.weight))
        coords = _gather(tokens.coords, self.slots) if self.stands_at_head else self.reduce(tokens.coords)
        return TokenSet(features, self.reduce_mass(tokens.mass), coords, _follow(tokens.origin, self.assign))

    def restore(
        self, features: Float[Array, "B M D"], fill: Float[Array, "B N D"] | None = None
    ) -> Float[Array, "B N D"]:
        """Every token gets the features of the slot it joined; dropped tokens get `fill [B, N, D]`, or zeros."""
        if self.packed and not self.merges:
            return compaction.expand(features, self._packing(), fill)
        restored = merging.restore(features, self.assign)
        return restored if fill is None else jnp.where(self.assign[..., None] >= 0, restored, fill)

    def _packing(self) -> compaction.Packing:
        return compaction.Packing(self.slots, self.assign)

    def then(self, second: Reduction | DenseReduction) -> Reduction | DenseReduction:
        """The reduction that does this one and then `second`.

        It stands at heads only where both do; otherwise its coordinates are means over all that joins a slot.

        Raises:
          ValueError: `second` does not reduce as many tokens as this one leaves.
        """
        _check_chain(self, second)
        if isinstance(second, DenseReduction):
            return _compose(self, second)
        return Reduction(
            _follow(second.slots, self.slots),
            _follow(self.assign, second.assign),
            self.weight * _gather(second.weight, self.assign),
            merges=self.merges or second.merges,
            stands_at_head=(self.stands_at_head or second.stands_at_head) and self._at_heads and second._at_heads,
        )

    @property
    def _at_heads(self) -> bool:
        return self.stands_at_head or not self.merges


@flax.struct.dataclass
class DenseReduction:
    """A many-to-many reduction `out = matrix @ x`.

    Attributes:
      matrix_: `[B, M, N]` non-negative; rows of real slots sum to 1. `matrix()` returns it.
      share_: `[B, M, N]` how each token's mass divides over the slots, where that does not follow from `matrix_`: scaling the
        columns of a product is not the product of scaled columns. None (a single step): the columns of `matrix_` scaled to 1.
    """

    matrix_: Float[Array, "B M N"]
    share_: Float[Array, "B M N"] | None = None

    @property
    def num_slots(self) -> int:
        """M, the static number of output slots."""
        return self.matrix_.shape[1]

    @property
    def assign(self) -> Int[Array, "B N"]:
        """`[B, N]` slot that takes most of each token; -1 for tokens that no slot takes."""
        share = self.share()
        return jnp.where(jnp.any(share > 0, axis=1), jnp.argmax(share, axis=1).astype(jnp.int32), -1)

    def share(self) -> Float[Array, "B M N"]:
        """`[B, M, N]` how each token's mass divides over the slots; columns sum to 1, less what is dropped."""
        if self.share_ is not None:
            return self.share_
        total = jnp.sum(self.matrix_, axis=1, keepdims=True)
        return self.matrix_ / jnp.where(total > 0, total, 1.0)

    def matrix(self) -> Float[Array, "B M N"]:
        """`[B, M, N]` the linear map itself."""
        return self.matrix_

    def reduce(self, values: Array) -> Array:
        """`values [B, N, ...]` mapped to `[B, M, ...]`."""
        return _combine(self.matrix_, values)

    def reduce_mass(self, mass: Float[Array, "B N"]) -> Float[Array, "B M"]:
        """`mass [B, N]` divided over the slots that take each token; the total is conserved unless tokens are dropped."""
        return jnp.einsum("bmn,bn->bm", self.share(), mass, precision=_PRECISION)

    def apply(self, tokens: TokenSet) -> TokenSet:
        """The reduced token set; `origin` follows the slot that takes most of a token."""
        return TokenSet(
            self.reduce(tokens.features),
            self.reduce_mass(tokens.mass),
            self.reduce(tokens.coords),
            _follow(tokens.origin, self.assign),
        )

    def restore(
        self, features: Float[Array, "B M D"], fill: Float[Array, "B N D"] | None = None
    ) -> Float[Array, "B N D"]:
        """Every token gets the average of its slots, weighted by its share; dropped tokens get `fill`, or zeros."""
        restored = _combine(jnp.swapaxes(self.share(), 1, 2), features)
        return restored if fill is None else jnp.where(self.assign[..., None] >= 0, restored, fill)

    def then(self, second: Reduction | DenseReduction) -> DenseReduction:
        """The reduction that does this one and then `second`; errors as in `Reduction.then`."""
        _check_chain(self, second)
        return _compose(self, second)


def _check_chain(first: Reduction | DenseReduction, second: Reduction | DenseReduction) -> None:
    length = second.matrix_.shape[2] if isinstance(second, DenseReduction) else second.assign.shape[1]
    if length != first.num_slots:
        raise ValueError(f"second reduces {length} tokens, but this reduction leaves {first.num_slots}")


def _compose(first: Reduction | DenseReduction, second: Reduction | DenseReduction) -> DenseReduction:
    return DenseReduction(_combine(second.matrix(), first.matrix()), _combine(second.share(), first.share()))


def _follow(pointers: Int[Array, "B N0"], table: Int[Array, "B N"]) -> Int[Array, "B N0"]:
    """`table[pointers]` where both use -1 for nowhere."""
    return jnp.where(pointers >= 0, jnp.take_along_axis(table, jnp.maximum(pointers, 0), axis=1), -1)
