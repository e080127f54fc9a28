# SPDX-License-Identifier: Apache-2.0
"""Decoder language model in the style of Llama and Qwen2: rotary positions, grouped-query attention, RMSNorm, gated MLP.

Shapes: B batch, N tokens, D width, L layers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops
from adaptive.sparsity.decoding import SinkWindow
from layers.decoder_decoding import Decoding, DepthPolicy
from layers.decoder_layers import Block, FeedForward, Stream
from layers.embed import TokenEmbed
from layers.linear import Linear
from layers.mixture_of_depths import MixtureOfDepths, RoutedBlock
from layers.norms import RMSNorm
from layers.parts import Parts, check_unrolled
from layers.rotary import Llama3Scaling
from layers.sharding import along_batch


class DecoderLM(Decoding):
    """Causal language model, `(logits [B, N, V], aux)`.

    Attributes:
      vocab_size, width, depth, heads, mlp_dim: V, D, L, and the sizes of a block.
      kv_heads: heads of keys and values, which divide `heads`; as many when None.
      head_dim: D / heads when None.
      qkv_bias: biases of the projections to queries, keys and values (Qwen2).
      tie_embeddings: the head is the embedding table.
      rotary_base, rotary_scaling: see `layers.rotary`.
      feed_forward: what stands in place of the gated MLP of every block; see `layers.decoder_layers.FeedForward`.
      parts: what builds projections and feed-forward layers; see `layers.parts`.
      routing: blocks that run for a share of the tokens, see `layers.mixture_of_depths`; none when None.
      policy: which layers run in decoding (`layers.early_exit`); all when None. The call itself runs all of them.
      reads: which pages of the cache a decode step reads (`adaptive.sparsity.decoding`); all of it when None. Prompts and the
        call itself attend to everything.
      exit_classifier: has a linear classifier of features that can stop a token; it sees them without a way back.
      remat: recomputes each block in the backward pass.
      dtype: of the computation; parameters stay in `param_dtype`.

    Source: Touvron et al. 2023 (Llama); Ainslie et al. 2023 (grouped queries); Yang et al. 2024 (Qwen2).
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    tie_embeddings: bool = False
    rotary_base: float = 10_000.0
    rotary_scaling: Llama3Scaling | None = None
    activation: str = "silu"
    epsilon: float = 1e-6
    dropout: float = 0.0
    feed_forward: FeedForward | None = None
    parts: Parts = Parts()
    routing: MixtureOfDepths | None = None
    policy: DepthPolicy | None = None
    reads: SinkWindow | None = None
    exit_classifier: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def setup(self) -> None:
        check_unrolled(self.parts, scan_layers=False, remat=self.remat)
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embedding = TokenEmbed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(0.02), **common)
        self._check()
        self.block = [self._block(layer) for layer in range(self.depth)]
        self.norm = RMSNorm(self.epsilon, **common)
        if self.exit_classifier:
            self.exit = Linear((1,), ("embed", "gate"), **common)
        if not self.tie_embeddings:
            self.head = Linear((self.vocab_size,), ("embed", "vocab"), use_bias=False, **common)

    def __call__(
        self,
        input_ids: Int[Array, "B N"],
        attention_mask: Bool[Array, "B N"] | None = None,
        *,
        active: Bool[Array, "L B N"] | None = None,
        feed_forward_inputs: Any = None,
        output_hidden_states: bool = False,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B N V"], dict[str, Any]]:
        """Logits `[B, N, V]` in float32, each token scored by those up to it, and aux.

        Args:
          input_ids: `[B, N]`.
          attention_mask: `[B, N]` True for real tokens, padding on either side; all when None.
          active: `[L, B, N]` (or what broadcasts to it) False where a layer leaves a token as it is. Its keys and values of
            that layer are still those of the token as it is.
          feed_forward_inputs: a pytree whose leaves have L leading; entry l goes to the feed-forward part of layer l.
          output_hidden_states: hands out the features before the first and after each layer.
          deterministic: without dropout; else the rng "dropout" is needed.

        Returns:
          aux has "tokens" `[L, B]` real tokens that each layer ran for; "hidden_states", a tuple of L + 1 `[B, N, D]`, or
          None; "feed_forward", what the feed-forward parts hand out, a tuple of one dict a layer; "exit_logits"
          `[L, B, N]` of the classifier after each layer, or None; "losses", named pairs (sum over tokens, tokens), means
          over the layers that have them: "router" of routed blocks.

        Raises:
          ValueError: shapes do not fit, or key heads do not divide the heads.
          TypeError: ids that are no integers.
        """
        stream = Stream.create(input_ids, attention_mask)
        active = self._active(active, input_ids.shape)
        x = self.embed(input_ids)
        states, handed, counts = [x], [], []
        valid = jnp.ones(input_ids.shape, bool) if stream.valid is None else stream.valid
        for layer in range(self.depth):
            own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], feed_forward_inputs)
            y, found = self.run_layer(x, layer, stream, own, deterministic)
            x = y if active is None else jnp.where(active[layer][..., None], y, x)
            states.append(x)
            handed.append(found)
            ran = valid & found.pop("ran", True)
            counts.append(jnp.sum(ran if active is None else ran & active[layer], axis=-1))
        aux = {
            "tokens": jnp.stack(counts),
            "hidden_states": tuple(states) if output_hidden_states else None,
            "feed_forward": tuple(handed),
            "exit_logits": jnp.stack([self.exit_logits(x) for x in states[1:]]) if self.exit_classifier else None,
            "losses": _mean_losses([found.pop("losses", {}) for found in handed]),
        }
        return self.logits(x), aux

    def embed(self, input_ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        """Features before the first layer."""
        return along_batch(self.embedding(input_ids))

    def run_layer(
        self,
        x: Float[Array, "B N D"],
        layer: int,
        stream: Stream,
        inputs: Any = None,
        deterministic: bool = True,
    ) -> tuple[Float[Array, "B N D"], dict[str, Any]]:
        """Features after one layer, and what its feed-forward part hands out.

        Raises:
          ValueError: no such layer.
        """
        if not 0 <= layer < self.depth:
            raise ValueError(f"layer must lie in 0..{self.depth - 1}; got {layer}")
        return self.block[layer](x, stream, inputs, deterministic)

    def logits(self, x: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Logits in float32 of features after any layer: the last norm and the head."""
        x = self.norm(x)
        return (self.embedding.attend(x) if self.tie_embeddings else self.head(x)).astype(jnp.float32)

    def exit_confidence(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Probability, by the classifier, that the head would choose after this layer what it chooses after the last.

        Raises:
          ValueError: the model has no classifier.
        """
        return nn.sigmoid(self.exit_logits(x))

    def exit_logits(self, x: Float[Array, "... D"]) -> Float[Array, "..."]:
        """Logits of `exit_confidence`, in float32; no gradient flows into `x`.

        Raises:
          ValueError: the model has no classifier.
        """
        if not self.exit_classifier:
            raise ValueError("this model has no classifier of exits; set exit_classifier=True and train it")
        return self.exit(jax.lax.stop_gradient(x))[..., 0].astype(jnp.float32)

    def spec(self) -> flops.DecoderSpec:
        """Sizes for `adaptive.flops.count`."""
        head_dim = self._head_dim
        return flops.DecoderSpec(
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            inner=self.heads * head_dim,
            kv_inner=(self.kv_heads or self.heads) * head_dim,
        )

    @property
    def _head_dim(self) -> int:
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}; set head_dim")
        return self.head_dim or self.width // self.heads

    def _check(self) -> None:
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads; {kv_heads} does not divide {self.heads}")
        if self.routing is not None and self.policy is not None:
            raise ValueError("routing and policy both say which layers run for a token; set one of them")
        if self.routing is not None and self.reads is not None:
            raise ValueError("routed blocks keep a memory of their own, which has no pages; set routing or reads")

    def _block(self, layer: int) -> Block:
        routed = self.routing is not None and self.routing.acts(layer)
        block = RoutedBlock if routed else Block
        # Of a call's arguments, `self` being number 0, deterministic is static.
        block = nn.remat(block, static_argnums=(4,)) if self.remat else block
        return block(
            layer,
            self.heads,
            self.kv_heads or self.heads,
            self._head_dim,
            self.mlp_dim,
            activation=self.activation,
            qkv_bias=self.qkv_bias,
            rotary_base=self.rotary_base,
            rotary_scaling=self.rotary_scaling,
            epsilon=self.epsilon,
            dropout=self.dropout,
            feed_forward=self.feed_forward,
            parts=self.parts,
            reads=self.reads,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            **({"routing": self.routing} if routed else {}),
        )

    def _active(self, active: Array | None, shape: tuple[int, int]) -> Array | None:
        if active is None:
            return None
        whole = (self.depth, *shape)
        fits = active.ndim == 3 and all(own in (1, want) for own, want in zip(active.shape, whole, strict=True))
        if not fits:
            raise ValueError(f"active must broadcast to [L, B, N] = {list(whole)}; got {list(active.shape)}")
        return jnp.broadcast_to(active.astype(bool), whole)


def _mean_losses(layers: list[dict[str, tuple[Array, Array]]]) -> dict[str, tuple[Array, Array]]:
    """Pairs of the same name, averaged over the layers that hand them out."""
    names = sorted({name for losses in layers for name in losses})
    pairs = {name: [losses[name] for losses in layers if name in losses] for name in names}
    return {
        name: (sum(total for total, _ in own) / len(own), sum(count for _, count in own) / len(own))
        for name, own in pairs.items()
    }
