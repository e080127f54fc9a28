# SPDX-License-Identifier: Apache-2.0
"""Chunking methods with the learned parts that they need, behind one face.

A chunker reads the tokens of a backbone and proposes chunks, the features to pool into them, and its losses; it pools them
(`shorten`), and after the layers that ran on chunks it may turn them back into tokens (`finish`).

Shapes: B batch, N tokens, M slots, D width, H heads, V vocabulary, R stride.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from adaptive import flops, registry
from adaptive.chunking import boundary_predictor, gbst, hnet
from adaptive.chunking import chunks as chunks_lib
from adaptive.chunking.chunks import Chunks
from adaptive.tokens import Reduction, Signals, TokenSet
from layers.attention import Attention
from layers.byte_model import ByteModel
from layers.linear import Linear
from layers.mlp import activation
from layers.norms import RMSNorm
from layers.sharding import along_batch

ENTROPY_SPIKES = "entropy_spikes"


@flax.struct.dataclass
class Proposal:
    """What a chunker proposes.

    Attributes:
      chunks: where chunks start; features: `[B, N, D]` to be pooled.
      losses: name to `(sum over rows, rows)`, to be added to the training loss with weights.
    """

    chunks: Chunks
    features: Float[Array, "B N D"]
    losses: dict[str, tuple[Array, Array]]


class Chunker(nn.Module):
    """A registered chunking method that needs no parameters; the base of those that do.

    Attributes:
      method: name in the registry; hyper: its keyword arguments.
      vocab_size, mlp_dim, heads, head_dim, dtype: of the backbone.
      pool: "mean" or "first", see `adaptive.chunking.chunks.to_reduction`.
    """

    method: str
    hyper: tuple[tuple[str, Any], ...] = ()
    vocab_size: int = 384
    mlp_dim: int = 1024
    heads: int = 6
    head_dim: int = 64
    dtype: Any = jnp.float32
    pool: str = "mean"

    @property
    def lengthens(self) -> bool:
        """Whether `finish` gives tokens, not chunks."""
        return False

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether chunks are random even without dropout."""
        return False

    def __call__(self, tokens: TokenSet, ids: Int[Array, "B N"], *, deterministic: bool = True) -> Proposal:
        """Proposes chunks of `tokens`, whose vocabulary ids are `ids`; those that draw use the rng "chunking"."""
        features, signals = self.read(tokens, ids, deterministic)
        chunks = self.decide(tokens, signals)
        return Proposal(chunks, along_batch(features), self.losses(tokens, ids, signals, chunks))

    def read(self, tokens: TokenSet, ids: Array, deterministic: bool) -> tuple[Float[Array, "B N D"], Signals]:
        """The features to pool, and the signals of the method."""
        del deterministic
        return tokens.features, Signals(token_ids=ids)

    def decide(self, tokens: TokenSet, signals: Signals) -> Chunks:
        """The method's chunks."""
        return registry.get(self.method)(tokens, signals, **dict(self.hyper))

    def losses(self, tokens: TokenSet, ids: Array, signals: Signals, chunks: Chunks) -> dict[str, Any]:
        """What trains the learned parts."""
        del tokens, ids, signals, chunks
        return {}

    def reduction(self, chunks: Chunks, capacity: int) -> Reduction:
        """The pooling of `chunks` into `capacity` slots."""
        return chunks_lib.to_reduction(chunks, capacity, pool=self.pool)

    def shorten(self, features: Float[Array, "B N D"], reduction: Reduction) -> Float[Array, "B M D"]:
        """The features of the chunks."""
        return reduction.reduce(features)

    def finish(
        self, values: Float[Array, "B M D"], features: Float[Array, "B N D"], chunks: Chunks, reduction: Reduction
    ) -> Array:
        """`values [B, M, D]` after the layers that ran on chunks; `features` are the tokens before them."""
        del features, chunks, reduction
        return values

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """Multiply-accumulates of the chunker itself for one sequence of `tokens` tokens in `chunks` chunks."""
        return flops.merge_macs(tokens, chunks, width) if self.pool == "mean" else 0.0


class BoundaryPredictor(Chunker):
    """A two-layer perceptron says where chunks end.

    Attributes:
      hidden: inner width; that of the backbone's MLPs when 0.
      objective: "prior", which draws boundaries and holds their number near the prior; or supervised boundaries, without
        drawing: the name of a method that reads ids alone ("words", "space_patches"), or "entropy_spikes".
      prior: share of tokens that start a chunk.
      draws: "always", as in the public code, which holds the share of chunks near the prior in evaluation too; or "training",
        after which the likelier outcome is taken.
      lm_width, lm_layers, lm_heads: of the byte model behind "entropy_spikes".

    Source: Nawrot et al. 2023; sizes and initial values of MrT5's baseline (`modeling_bpt5.py`).

    Differs: the byte model of "entropy_spikes" is trained along, see `ByteModel`.
    """

    hidden: int = 0
    objective: str = "prior"
    prior: float = 0.2
    draws: str = "always"
    lm_width: int = 64
    lm_layers: int = 2
    lm_heads: int = 2

    def setup(self) -> None:
        if self.objective not in ("prior", ENTROPY_SPIKES) and not from_ids(self.objective):
            raise ValueError(
                f"objective={self.objective!r} gives no boundaries: 'prior', {ENTROPY_SPIKES!r}, or a chunking method that "
                f"reads ids alone"
            )
        if self.draws not in ("always", "training"):
            raise ValueError(f"draws={self.draws!r}; one of 'always', 'training'")
        low = nn.initializers.constant(-1.0)
        self.norm = RMSNorm(dtype=self.dtype)
        self.inner = Linear((self.hidden or self.mlp_dim,), ("embed", "mlp"), dtype=self.dtype, bias_init=low)
        self.logit = Linear((1,), ("mlp", "gate"), bias_init=low)
        if self.objective == ENTROPY_SPIKES:
            self.byte_model = ByteModel(self.vocab_size, self.lm_width, self.lm_layers, self.lm_heads)

    @property
    def draws_in_evaluation(self) -> bool:
        """Whether chunks are random even without dropout."""
        return self.objective == "prior" and self.draws == "always"

    def read(self, tokens: TokenSet, ids: Array, deterministic: bool) -> tuple[Array, Signals]:
        """Boundary logits in float32."""
        hidden = activation("gelu")(self.inner(self.norm(tokens.features)))
        logits = self.logit(hidden.astype(jnp.float32))[..., 0]
        draws = self.draws_in_evaluation or (self.objective == "prior" and not deterministic)
        return tokens.features, Signals(boundary_logits=logits, rng=self.make_rng("chunking") if draws else None)

    def decide(self, tokens: TokenSet, signals: Signals) -> Chunks:
        """The method's chunks; supervised boundaries take no gradient from the pooling."""
        chunks = super().decide(tokens, signals)
        if self.objective == "prior":
            return chunks
        return chunks.replace(probability=jax.lax.stop_gradient(chunks.probability))

    def losses(self, tokens: TokenSet, ids: Array, signals: Signals, chunks: Chunks) -> dict[str, Any]:
        """ "binomial" for the prior; "boundaries", and "next_byte" of the byte model, for supervised ones."""
        if self.objective == "prior":
            return {"binomial": boundary_predictor.binomial_loss(chunks, prior=self.prior)}
        losses = {}
        if self.objective == ENTROPY_SPIKES:
            entropies, losses["next_byte"] = self.byte_model(ids, tokens.valid)
            target = boundary_predictor.entropy_spikes(entropies, tokens)
        else:
            target = registry.get(self.objective)(tokens, Signals(token_ids=ids))
        logits = signals.boundary_logits
        return losses | {"boundaries": boundary_predictor.boundary_loss(logits, target.starts, tokens.valid)}

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """The perceptron and the mean; the byte model of "entropy_spikes" runs in training only."""
        hidden = self.hidden or self.mlp_dim
        perceptron = flops.linear_macs(tokens, width, hidden) + flops.linear_macs(tokens, hidden, 1)
        return perceptron + super().macs(tokens, chunks, width)


class StridedConv(Chunker):
    """Equal strides, each pooled by a convolution over its tokens and a GELU.

    Source: Clark et al. 2022 (CANINE); MrT5's baseline "CP" (`modeling_canine.py`).

    Differs: padding enters the convolution as zeros, so that its amount changes nothing.
    """

    pool: str = "first"

    @property
    def stride(self) -> int:
        """Tokens in a chunk."""
        return dict(self.hyper).get("stride", registry.describe(self.method).hyper["stride"])

    @nn.compact
    def read(self, tokens: TokenSet, ids: Array, deterministic: bool) -> tuple[Array, Signals]:
        """The convolution's output at every token of its window."""
        del ids, deterministic
        batch, length, width = tokens.features.shape
        x = RMSNorm(dtype=self.dtype, name="norm")(tokens.features)
        x = jnp.where(tokens.valid[..., None], x, 0)
        windows = jnp.pad(x, ((0, 0), (0, -length % self.stride), (0, 0))).reshape(batch, -1, self.stride, width)
        bound = (self.stride * width) ** -0.5
        pooled = Linear(
            (width,),
            ("position", "embed", "mlp"),
            dtype=self.dtype,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
            name="conv",
        )(windows)
        return jnp.repeat(activation("gelu")(pooled), self.stride, axis=1)[:, :length], Signals()

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """The convolution."""
        return flops.linear_macs(-(-tokens // self.stride), self.stride * width, width)


class BlockMixer(Chunker):
    """A convolution, then every token as a mixture of the blocks that it lies in; for a place on the embeddings.

    Attributes:
      blocks: largest block, and width of the convolution; consensus: see `adaptive.chunking.gbst.mix`.

    Source: Tay et al. 2022 (Charformer).
    """

    blocks: int = 4
    consensus: bool = True

    @nn.compact
    def read(self, tokens: TokenSet, ids: Array, deterministic: bool) -> tuple[Array, Signals]:
        """The mixture."""
        del ids, deterministic
        x = nn.Conv(
            tokens.features.shape[-1],
            (self.blocks,),
            padding=((0, self.blocks - 1),),
            dtype=self.dtype,
            kernel_init=nn.with_logical_partitioning(
                nn.initializers.lecun_normal(in_axis=(0, 1)), ("position", "embed", "mlp")
            ),
            bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",)),
            name="conv",
        )(jnp.where(tokens.valid[..., None], tokens.features, 0))
        scorer = Linear((1,), ("embed", "gate"), dtype=jnp.float32, name="score")
        mixed, _ = gbst.mix(
            along_batch(x),
            tokens.valid,
            lambda means: scorer(means.astype(jnp.float32))[..., 0],
            blocks=self.blocks,
            consensus=self.consensus,
        )
        return mixed, Signals()

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """Convolution, scores, consensus and mean."""
        scores = sum(flops.linear_macs(-(-tokens // size), width, 1) for size in range(1, self.blocks + 1))
        consensus = 2 * tokens * tokens * self.blocks if self.consensus else 0
        conv = flops.linear_macs(tokens, self.blocks * width, width)
        return conv + scores + consensus + super().macs(tokens, chunks, width)


def _identity(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    del key
    return jnp.eye(*shape, dtype=dtype)


class SquareMap(nn.Module):
    """`x W`, `[..., D] -> [..., D]` without a bias.

    Attributes:
      kernel_init: first value of W; dtype: of the computation.
    """

    kernel_init: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return Linear(
            x.shape[-1:], ("embed", "mlp"), use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init, name="map"
        )(x)


class CosineRouter(Chunker):
    """H-Net's router: a chunk starts where neighbours differ, and is carried by its first token.

    Attributes:
      target: tokens a chunk that the ratio loss rewards.
      dechunk: turn chunks back into tokens after the layers that ran on them, with a residual from before; the router then also
        learns by its confidence. Otherwise the smoothed chunks go on, and it learns by the smoothing and the ratio loss.

    Source: Hwang et al. 2025 (H-Net).

    Differs: one stage inside T5's encoder, all widths alike, transformer layers on both sides; the residual map has no bias.
    """

    pool: str = "first"
    target: float = 6.0
    dechunk: bool = True

    def setup(self) -> None:
        self.query = SquareMap(_identity, self.dtype)
        self.key = SquareMap(_identity, self.dtype)
        if self.dechunk:
            self.residual = SquareMap(nn.initializers.zeros_init())

    @property
    def lengthens(self) -> bool:
        """Whether chunks turn back into tokens."""
        return self.dechunk

    def read(self, tokens: TokenSet, ids: Array, deterministic: bool) -> tuple[Array, Signals]:
        """Queries and keys of the router."""
        del ids, deterministic
        x = tokens.features
        return x, Signals(queries=self.query(x), keys=self.key(x))

    def losses(self, tokens: TokenSet, ids: Array, signals: Signals, chunks: Chunks) -> dict[str, Any]:
        """ "ratio"."""
        del tokens, ids, signals
        return {"ratio": hnet.ratio_loss(chunks, target=self.target)}

    def finish(self, values: Array, features: Array, chunks: Chunks, reduction: Reduction) -> Array:
        """Tokens `[B, N, D]`, or smoothed chunks `[B, M, D]`."""
        if not self.dechunk:
            return hnet.smooth(values, hnet.at_heads(chunks.probability, reduction), reduction.slots >= 0)
        residual = self.residual(features).astype(values.dtype)
        return hnet.dechunk(values, chunks, reduction) + residual

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """Router, and residual map."""
        maps = 3 if self.dechunk else 2
        return maps * flops.linear_macs(tokens, width, width) + super().macs(tokens, chunks, width)


class EntropyPatcher(Chunker):
    """Patches cut by the entropy of a byte model inside; each is the largest value of its bytes, refined by attention to them.

    Attributes:
      lm_width, lm_layers, lm_heads: of the byte model.

    Source: Pagnoni et al. 2025 (BLT), local encoder: queries from max pooling, cross-attention to the bytes of the own patch.

    Differs: the byte model is trained along (see `ByteModel`), not beforehand; one vector a patch, no hashed n-gram embeddings,
    one cross-attention after the lower layers, and the residual is added once (the release adds it twice).
    """

    pool: str = "first"
    lm_width: int = 64
    lm_layers: int = 2
    lm_heads: int = 2

    def setup(self) -> None:
        self.byte_model = ByteModel(self.vocab_size, self.lm_width, self.lm_layers, self.lm_heads)
        self.patch_norm = RMSNorm(dtype=self.dtype)
        self.byte_norm = RMSNorm(dtype=self.dtype)
        self.attention = Attention(self.heads, self.head_dim, use_bias=False, dtype=self.dtype)

    def __call__(self, tokens: TokenSet, ids: Int[Array, "B N"], *, deterministic: bool = True) -> Proposal:
        """Patches of `tokens`, and the loss "next_byte" of the byte model."""
        del deterministic
        entropies, loss = self.byte_model(ids, tokens.valid)
        return Proposal(self.decide(tokens, Signals(entropies=entropies)), tokens.features, {"next_byte": loss})

    def shorten(self, features: Float[Array, "B N D"], reduction: Reduction) -> Float[Array, "B M D"]:
        """Max pooling, and a cross-attention from each patch to its bytes."""
        patches = chunks_lib.max_pool(features, reduction)
        own = reduction.assign[:, None, :] == jnp.arange(reduction.num_slots)[:, None]
        mask = jnp.where(own, 0.0, -jnp.inf)[:, None]
        mask = jnp.broadcast_to(mask, (mask.shape[0], self.heads, *mask.shape[2:]))
        return patches + self.attention(self.patch_norm(patches), self.byte_norm(features), bias=along_batch(mask))[0]

    def macs(self, tokens: float, chunks: float, width: int) -> float:
        """Byte model and cross-attention."""
        model = ByteModel(self.vocab_size, self.lm_width, self.lm_layers, self.lm_heads, parent=None)
        return model.macs(tokens) + flops.attention_macs(chunks, tokens, width, self.heads * self.head_dim)


# Methods with learned parts; every other one is a plain `Chunker`.
LEARNED: Mapping[str, type[Chunker]] = {
    "boundary_predictor": BoundaryPredictor,
    "strided": StridedConv,
    "gbst": BlockMixer,
    "hnet": CosineRouter,
    "entropy_patches": EntropyPatcher,
}


def from_ids(method: str) -> bool:
    """Whether a registered chunking method can do with vocabulary ids alone."""
    return method in registry.names("chunking") and set(registry.describe(method).signals) <= {"token_ids"}


def build(method: str, hyper: tuple[tuple[str, Any], ...], **sizes: Any) -> Chunker:
    """The chunker of a registered method.

    Args:
      method: name in the registry.
      hyper: keyword arguments of the method, and attributes of its learned part.
      **sizes: of the backbone, see `Chunker`.

    Raises:
      KeyError: no such method.
      ValueError: it is no chunking method.
      TypeError: neither the method nor its learned part has such a hyper-parameter.
    """
    record = registry.describe(method)
    if record.kind != "chunking":
        raise ValueError(f"chunker={method!r} is no chunking method; one of {registry.names('chunking')}")
    kind = LEARNED.get(method, Chunker)
    taken = {"parent", "name", "method", "hyper", "vocab_size", "mlp_dim", "heads", "head_dim", "dtype"}
    own = {field.name for field in dataclasses.fields(kind)} - taken
    given = dict(hyper)
    if unknown := sorted(set(given) - own - set(record.hyper)):
        raise TypeError(f"{method} has no hyper-parameter {unknown}; it has {sorted(own | set(record.hyper))}")
    method_hyper = tuple((name, value) for name, value in hyper if name in record.hyper)
    return kind(method, method_hyper, **sizes, **{name: given[name] for name in own & set(given)})
