# SPDX-License-Identifier: Apache-2.0
"""Vision transformer over a token set, with hooks that reduce its tokens.

Shapes: B batch, N tokens, D features, L layers; grids h w, patches of p x p pixels with c channels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops
from adaptive.tokens import DenseReduction, Reduction, Signals, TokenSet
from layers.attention import SIGNALS, Attention
from layers.embed import ConvStem, LearnedPositions, PatchEmbed, grid_coords, sincos_2d
from layers.hooks import PLACES, Hook, LearnedHook, Reduce, follow
from layers.learned_rates import LearnedRates
from layers.linear import Linear
from layers.norms import LayerNorm
from layers.parts import Parts, check_unrolled
from layers.sharding import along_batch

# Width, depth, heads, MLP width. Source: Dosovitskiy et al. 2021, table 1; Touvron et al. 2021 (DeiT), table 1, for Ti and S.
SHAPES = {
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}

# Each reduction with the tokens that it reduced, and `(sum, count)` of each named loss.
Steps = tuple[tuple[Reduction | DenseReduction, TokenSet], ...]
Losses = dict[str, tuple[Array, Array]]


class Block(nn.Module):
    """`x + Attn(LN x)`, hooks, `x + MLP(LN x)`, hooks, over a token set.

    Attributes:
      layer: index from 0; None under scan.
      weighted: static; the mass goes into the attention logits. False where no token has merged and there is no padding.
      proportional: log mass as the key bias; else mass only tells padding from tokens.
      hooks: see `layers.hooks`.
      grid: `(t, h, w)` of the patches, for the hooks; class_token: slot 0 is a class token.
      parts: builds projections and feed-forward layers.
    """

    heads: int
    mlp_dim: int
    layer: int | None = None
    weighted: bool = False
    proportional: bool = True
    hooks: tuple[Hook, ...] = ()
    grid: tuple[int, int, int] | None = None
    class_token: bool = False
    parts: Parts = Parts()
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    deterministic: bool = True
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @nn.compact
    def __call__(self, tokens: TokenSet, labels: Int[Array, " B"] | None = None) -> tuple[TokenSet, Steps, Losses]:
        """The tokens after the block, the reductions done in it, in order, and the losses of its hooks."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        acting = any(hook.acts(self.layer, tokens.features.shape[1]) for hook in self.hooks)
        wanted = {name for hook in self.hooks for name in hook.signals if acting}
        y = LayerNorm(self.norm_epsilon, name="attention_norm", **common)(tokens.features)
        y, signals = Attention(
            self.heads, parts=self.parts, implementation=self.implementation, name="attention", **common
        )(
            y,
            key_bias=self._key_bias(tokens),
            key_mask=tokens.keep,
            signals=tuple(name for name in SIGNALS if name in wanted),
        )
        signals = signals.replace(layer=self.layer, grid=self.grid, cls_token=self.class_token)
        tokens = tokens.replace(features=tokens.features + self._drop(y))
        tokens, signals, steps, losses = self._reduce("between", tokens, signals, labels)
        y = LayerNorm(self.norm_epsilon, name="mlp_norm", **common)(tokens.features)
        mlp = self.parts.mlp(self.mlp_dim, activation=self.activation, dropout=self.dropout, name="mlp", **common)
        y = mlp(y, deterministic=self.deterministic)
        tokens = tokens.replace(features=tokens.features + self._drop(y))
        tokens, _, after, more = self._reduce("after", tokens, signals, labels)
        return tokens, steps + after, losses | more

    def _key_bias(self, tokens: TokenSet) -> Float[Array, "B N"] | None:
        if not self.weighted:
            return None
        return tokens.log_mass if self.proportional else jnp.where(tokens.mass > 0, 0.0, -jnp.inf)

    def _drop(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        return nn.Dropout(self.dropout)(x, deterministic=self.deterministic)

    def _reduce(
        self, place: str, tokens: TokenSet, signals: Signals, labels: Array | None
    ) -> tuple[TokenSet, Signals, Steps, Losses]:
        """Runs the hooks of one place."""
        steps, losses = (), {}
        for hook in self.hooks:
            if hook.place != place or not hook.acts(self.layer, tokens.features.shape[1]):
                continue
            rng = self.make_rng("reduction") if "rng" in hook.signals else None
            reduction = hook(tokens, signals.replace(rng=rng))
            if labels is not None and isinstance(hook, LearnedHook):
                losses |= hook.losses(tokens, signals, labels)
            steps += ((reduction, tokens),)
            tokens, signals = reduction.apply(tokens), follow(signals, reduction)
        return tokens, signals, steps, losses


class ViT(nn.Module):
    """Pre-norm vision transformer, `(logits or features, aux)`.

    Attributes:
      patch_size, width, depth, heads, mlp_dim: p, D, L, and the widths of a block.
      num_classes: 0 returns the pooled features `[B, D]`.
      image_size, channels: `(height, width)` in pixels, and c, of the images that it takes.
      pool: "cls" (the class token) or "mean" (of patch tokens, each counted by its mass).
      class_token: whether there is one; None for only with pool="cls".
      positions: "learned" or "sincos2d".
      stem: channels of convolutions that make the tokens, as many as halve p to 1 (`layers.embed.ConvStem`); empty for one
        linear map of the pixels of a patch.
      distillation_token: slot 1 is a distillation token with a classifier of its own, and logits are the mean of both (DeiT at
        inference). Reductions protect slot 0 alone, so that such a model takes none.
      representation: width of a tanh layer before the head; None for none.
      hooks: what reduces the tokens; see `layers.hooks`.
      parts: what builds the projections and feed-forward layers of the blocks; see `layers.parts`.
      proportional_attention: log mass in the attention logits once tokens have merged (ToMe eq. 1).
      last_layer_fusion: before the last block every token is back: those that were dropped as they were then, merged ones
        with the features of their slot (Cropr's fusion); hooks do not act there.
      remat: recomputes each block in the backward pass.
      scan_layers: one block scanned over stacked parameters (fast compilation); without hooks only.

    Source: Dosovitskiy et al. 2021; with the reduction between attention and MLP as in Bolya et al. 2023, section 3.
    """

    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    num_classes: int = 0
    image_size: tuple[int, int] = (224, 224)
    channels: int = 3
    pool: str = "cls"
    class_token: bool | None = None
    positions: str = "learned"
    stem: tuple[int, ...] = ()
    distillation_token: bool = False
    representation: int | None = None
    hooks: tuple[Hook, ...] = ()
    parts: Parts = Parts()
    proportional_attention: bool = True
    last_layer_fusion: bool = False
    remat: bool = False
    scan_layers: bool = False
    activation: str = "gelu"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    @classmethod
    def named(cls, name: str, **attributes: Any) -> ViT:
        """The published shape of that name, such as "B/16"; `attributes` add to it or override it.

        Raises:
          ValueError: no such shape.
        """
        shape, _, patch = name.partition("/")
        if shape not in SHAPES or not patch.isdigit():
            raise ValueError(
                f"no ViT is named {name!r}; a name is one of {sorted(SHAPES)}, a slash and the patch size: 'B/16'"
            )
        width, depth, heads, mlp_dim = SHAPES[shape]
        published = {"patch_size": int(patch), "width": width, "depth": depth, "heads": heads, "mlp_dim": mlp_dim}
        return cls(**(published | attributes))

    @property
    def grid(self) -> tuple[int, int, int]:
        """`(1, h, w)` patches."""
        return 1, self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def has_class_token(self) -> bool:
        """Whether slot 0 is a class token."""
        return self.pool == "cls" if self.class_token is None else self.class_token

    @property
    def num_tokens(self) -> int:
        """N before the first layer, the class token and a distillation token included."""
        return self.grid[1] * self.grid[2] + self.has_class_token + self.distillation_token

    def spec(self) -> flops.ViTSpec:
        """Sizes for `adaptive.flops.count`."""
        return flops.ViTSpec(
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            mlp_dim=self.mlp_dim,
            num_classes=self.num_classes,
            image_size=self.image_size,
            channels=self.channels,
            cls_token=self.has_class_token,
            distillation_token=self.distillation_token,
            last_layer_fusion=self.last_layer_fusion,
            stem=self.stem,
        )

    @nn.compact
    def __call__(
        self,
        pixel_values: Float[Array, "B y x c"],
        *,
        token_mask: Bool[Array, "B P"] | None = None,
        labels: Int[Array, " B"] | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, dict[str, Any]]:
        """Logits `[B, num_classes]` in float32 (or features `[B, D]`), and aux.

        Args:
          pixel_values: `[B, height, width, c]`.
          token_mask: `[B, h w]` True for patches that belong to the image; all when None.
          labels: `[B]` classes, for hooks with losses of their own; None leaves those out.
          deterministic: without dropout; else the rng "dropout" is needed.

        Returns:
          aux has "tokens" `[L, B]` real tokens after each layer; "reduction", all layers composed, from the input tokens to
          the final ones, or None; "token_set", the final tokens after the last norm; "losses" `{name: (sum, count)}`, those
          of learned hooks.

        Raises:
          ValueError: the image has another shape than `image_size`, a hook under `scan_layers`, a schedule of another depth.
        """
        self._check(pixel_values)
        tokens = self._embed(pixel_values, token_mask, deterministic)
        if self.scan_layers:
            tokens, reduction, handed = self._scan(tokens, token_mask is not None, deterministic), None, {}
            counts = jnp.broadcast_to(tokens.count, (self.depth, tokens.count.shape[0]))
        else:
            tokens, reduction, counts, handed = self._unroll(tokens, token_mask is not None, labels, deterministic)
        features = LayerNorm(self.norm_epsilon, self.dtype, self.param_dtype, name="final_norm")(tokens.features)
        tokens = tokens.replace(features=features)
        aux = {"tokens": counts, "reduction": reduction, "token_set": tokens, "losses": {}} | handed
        logits = self._head(self._pool(tokens), "head")
        if self.distillation_token and self.num_classes:
            logits = 0.5 * (logits + self._head(tokens.features[:, 1], "distillation_head"))
        return logits, aux

    def _check(self, pixels: Array) -> None:
        if pixels.shape[1:] != (*self.image_size, self.channels):
            raise ValueError(
                f"pixel_values must be [B, height, width, channels] = [B, {self.image_size[0]}, {self.image_size[1]}, "
                f"{self.channels}]; got {pixels.shape}. Resize the images, or set image_size and channels."
            )
        if self.stem and 2 ** len(self.stem) != self.patch_size:
            raise ValueError(
                f"a stem of {len(self.stem)} convolutions of stride 2 makes patches of {2 ** len(self.stem)} pixels; "
                f"patch_size={self.patch_size}"
            )
        if self.pool not in ("cls", "mean") or self.positions not in ("learned", "sincos2d"):
            raise ValueError(
                f"pool is 'cls' or 'mean' and positions 'learned' or 'sincos2d'; got {self.pool!r} and {self.positions!r}"
            )
        if self.pool == "cls" and not self.has_class_token:
            raise ValueError("pool='cls' needs a class token; set pool='mean' or class_token=None")
        if self.distillation_token and (self.pool != "cls" or self.hooks):
            raise ValueError(
                f"a model with a distillation token needs pool='cls' and no hooks, which would not protect slot 1; got "
                f"pool={self.pool!r} and {len(self.hooks)} hook(s). Undistilled DeiT checkpoints take reductions"
            )
        if self.scan_layers and self.hooks:
            raise ValueError(
                "adaptive shapes need unrolled layers: set scan_layers=False for a model with hooks; use "
                "layers.stacking.unstack on the parameters of a scanned one"
            )
        check_unrolled(self.parts, scan_layers=self.scan_layers, remat=self.remat)
        for hook in self.hooks:
            if isinstance(hook, LearnedRates):
                self._check_rates(hook)
            counts = getattr(hook, "counts", None)
            if counts is not None and len(counts) != self.depth:
                method = hook.method if isinstance(hook, Reduce) else type(hook).__name__
                raise ValueError(
                    f"the schedule of {method!r} has {len(counts)} counts for {self.depth} layers: {counts}"
                )
            if "cls_attention" in hook.signals and not self.has_class_token:
                raise ValueError(
                    f"{hook} reads 'cls_attention', but the model has no class token; set class_token=True"
                )
            if hook.place not in PLACES:
                raise ValueError(f"{type(hook).__name__}.place={hook.place!r} is not one of {PLACES}")

    def _check_rates(self, hook: LearnedRates) -> None:
        if len(self.hooks) > 1:
            raise ValueError("learned rates mask tokens that other hooks would take as there; use them alone")
        patches = self.num_tokens - self.has_class_token
        if (hook.layers, hook.patches) != (self.depth, patches):
            raise ValueError(
                f"learned rates for {hook.layers} layers and {hook.patches} patches do not fit a model of {self.depth} layers "
                f"and {patches} patches"
            )

    def _embed(self, pixels: Array, token_mask: Array | None, deterministic: bool) -> TokenSet:
        """Patches, class token and positions as a token set."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.stem:
            x = ConvStem(self.stem, self.width, name="patch_embed", **common)(pixels)
        else:
            x = PatchEmbed(self.patch_size, self.width, name="patch_embed", **common)(pixels)
        batch, (_, height, width) = x.shape[0], self.grid
        coords = grid_coords(height, width)
        if self.positions == "sincos2d":
            x += sincos_2d(height, width, self.width).astype(self.dtype)
        if self.has_class_token:
            names = ("class_token", "distillation_token")[: 1 + self.distillation_token]
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("embed",))
            added = [self.param(name, init, (self.width,), self.param_dtype).astype(self.dtype) for name in names]
            x = jnp.concatenate([*(jnp.broadcast_to(token, (batch, 1, self.width)) for token in added), x], axis=1)
            coords = jnp.concatenate([jnp.full((len(added), 2), -1.0), coords])
            if token_mask is not None:
                token_mask = jnp.pad(token_mask, ((0, 0), (len(added), 0)), constant_values=True)
        if self.positions == "learned":
            x = LearnedPositions(name="positions", **common)(x)
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return TokenSet.create(along_batch(x), mask=token_mask, coords=jnp.broadcast_to(coords, (batch, *coords.shape)))

    def _block(self, **attributes: Any) -> Block:
        block = nn.remat(Block, prevent_cse=not self.scan_layers) if self.remat else Block
        return block(
            self.heads,
            self.mlp_dim,
            proportional=self.proportional_attention,
            grid=self.grid,
            class_token=self.has_class_token,
            parts=self.parts,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            dropout=self.dropout,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            implementation=self.implementation,
            **attributes,
        )

    def _unroll(
        self, tokens: TokenSet, weighted: bool, labels: Array | None, deterministic: bool
    ) -> tuple[TokenSet, Reduction | DenseReduction | None, Array, dict[str, Any]]:
        """All blocks; the composed reduction; the counts `[L, B]`; what hooks or a kind of ViT add to aux."""
        padded, steps, counts, losses = weighted, (), [], {}
        for layer in range(self.depth):
            hooks = self.hooks
            if self.last_layer_fusion and layer == self.depth - 1:
                tokens, steps, weighted, hooks = _bring_back(tokens, steps), (), padded, ()
            block = self._block(
                layer=layer, weighted=weighted, hooks=hooks, deterministic=deterministic, name=f"block_{layer}"
            )
            tokens, done, more = block(tokens, labels)
            steps, losses = steps + done, losses | more
            weighted = weighted or bool(done)
            counts.append(tokens.count)
        total = None
        for reduction, _ in steps:
            total = reduction if total is None else total.then(reduction)
        return tokens, total, jnp.stack(counts), {"losses": losses}

    def _scan(self, tokens: TokenSet, weighted: bool, deterministic: bool) -> TokenSet:
        def body(block: Block, tokens: TokenSet, _: None) -> tuple[TokenSet, None]:
            return block(tokens)[0], None

        scanned = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(self._block(weighted=weighted, deterministic=deterministic, name="blocks"), tokens, None)[0]

    def _pool(self, tokens: TokenSet) -> Float[Array, "B D"]:
        if self.pool == "cls":
            return tokens.features[:, 0]
        first = int(self.has_class_token)
        features, mass = tokens.features[:, first:].astype(jnp.float32), tokens.kept_mass[:, first:]
        total = jax.lax.stop_gradient(jnp.maximum(jnp.sum(mass, axis=-1, keepdims=True), 1.0))
        return jnp.einsum("bnd,bn->bd", features, mass / total).astype(self.dtype)

    def _head(self, pooled: Float[Array, "B D"], name: str) -> Array:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if self.representation is not None:
            pooled = jnp.tanh(Linear((self.representation,), ("embed", "mlp"), name="representation", **common)(pooled))
        if not self.num_classes:
            return pooled
        axes = ("embed" if self.representation is None else "mlp", "classes")
        init = nn.initializers.truncated_normal(0.02)
        return Linear((self.num_classes,), axes, kernel_init=init, name=name, **common)(pooled).astype(jnp.float32)


def _bring_back(tokens: TokenSet, steps: Steps) -> TokenSet:
    """The tokens before the first of `steps`, each with the last features that it, or the slot that it joined, had."""
    features = tokens.features
    for reduction, before in reversed(steps):
        features = reduction.restore(features, before.features)
    return steps[0][1].replace(features=features) if steps else tokens
