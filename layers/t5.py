# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder T5 (version 1.1) and byte-level ByT5, with hooks after encoder layers and a delete gate.

Shapes: B batch, N encoder tokens, M encoder tokens after a reduction, T decoder tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops, ragged, registry
from adaptive.deletion import gate as deletion_gate
from adaptive.tokens import Reduction, Signals, TokenSet
from layers.delete_gate import DeleteGate
from layers.hooks import follow
from layers.norms import RMSNorm
from layers.relative_bias import RelativeBias
from layers.sharding import along_batch
from layers.t5_layers import DecoderLayer, EncoderLayer, ScannedDecoderLayer, ScannedEncoderLayer

DELETIONS = (None, "soft", "hard")

# Encoder and decoder layers, D, MLP, heads (64 wide each). Source: Xue et al. 2022 (ByT5), table 1.
SHAPES = {
    "byt5-small": dict(encoder_layers=12, decoder_layers=4, width=1472, mlp_dim=3584, heads=6),
    "byt5-base": dict(encoder_layers=18, decoder_layers=6, width=1536, mlp_dim=3968, heads=12),
    "byt5-large": dict(encoder_layers=36, decoder_layers=12, width=1536, mlp_dim=3840, heads=16),
}


def _normal(deviation: float, axes: tuple[str, ...]) -> Any:
    return nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)


@flax.struct.dataclass
class _State:
    """The encoder between two layers.

    Attributes:
      tokens: the token set; gate: `[B, N]` values that fade keys, or None; reduction: all that hooks did so far, or None.
      excess: `[B]` sum of the score excess over the maps so far, or None; moved: static; True once the rows' positions may
        differ.
    """

    tokens: TokenSet
    gate: Any = None
    reduction: Any = None
    excess: Any = None
    moved: bool = flax.struct.field(pytree_node=False, default=False)

    @property
    def key_bias(self) -> Float[Array, "B N"]:
        """Log mass (0 for a plain token, -inf for padding) plus the gate."""
        return self.tokens.log_mass if self.gate is None else self.tokens.log_mass + self.gate

    def reduce(self, reduction: Reduction) -> _State:
        """The state after a reduction of its tokens."""
        tokens = reduction.apply(self.tokens)
        return _State(
            tokens.replace(features=along_batch(tokens.features)),
            None if self.gate is None else reduction.reduce(self.gate),
            reduction if self.reduction is None else self.reduction.then(reduction),
            self.excess,
            moved=True,
        )


class T5(nn.Module):
    """Encoder-decoder transformer with T5 1.1 blocks (pre-RMSNorm, no biases, gated GELU, bucketed relative positions).

    The encoder can change its tokens in two ways. `hooks` reduce them after chosen layers (`layers.hooks.Reduce` with
    place "after"), and a deletion method named by `gate` acts once, after `gate_layer` layers: with `deletion="soft"` its
    values fade keys in all later encoder layers and in cross-attention; with `deletion="hard"` the deleted tokens are gone
    from there on, packed into `capacity` slots or into the smallest rung of the ladder `rungs` that holds every row.

    Attributes:
      vocab_size, width, mlp_dim, heads, head_dim, encoder_layers, decoder_layers: sizes; 0 decoder layers is an encoder.
      softmax: "standard", or "off_by_one" as all models of the MrT5 family use.
      gate: name of a registered deletion method, or None; gate_layer: layers before it; gate_hyper: its keyword arguments.
      rungs: ladder for hard deletion, rising, the last at least N; capacity: a single static length instead. With neither,
        hard deletion compacts without shrinking.
      hooks: after encoder layers.
      hard_probability: of a training batch in which soft deletion removes keys as hard deletion would.
      score_excess: puts the pair "score_excess" into the losses: the mean of `max(S, 5) - 5` over the logits S, before gate
        values, of the encoder's self-attention above the gate and of all cross-attention, whose decoder positions all count;
        summed over rows, and their number.
      dropout, tie_embeddings, num_buckets, max_distance: as in T5.
      remat: recompute each layer in the backward pass; scan_layers: one compiled layer for the whole stack.
      dtype: of the computation; parameters stay float32.

    Source: Raffel et al. 2020 (T5), Shazeer 2020 (gated GELU), Xue et al. 2022 (ByT5), Kallini et al. 2025 (MrT5).

    Differs: the output head starts from fan-in variance, not from the unit variance of the public PyTorch code.
    """

    vocab_size: int = 384
    width: int = 512
    mlp_dim: int = 1024
    heads: int = 6
    encoder_layers: int = 8
    decoder_layers: int = 8
    head_dim: int = 64
    softmax: str = "standard"
    gate: str | None = None
    gate_layer: int = 3
    gate_hyper: tuple[tuple[str, Any], ...] = ()
    rungs: tuple[int, ...] | None = None
    capacity: int | None = None
    hooks: tuple[Any, ...] = ()
    hard_probability: float = 0.0
    score_excess: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    remat: bool = False
    scan_layers: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        """Creates all parts, so that the branches of a ladder share them."""
        self._check()
        self.embedding = nn.Embed(
            self.vocab_size, self.width, dtype=self.dtype, embedding_init=_normal(1.0, ("vocab", "embed"))
        )
        bias = dict(
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
            embedding_init=nn.initializers.normal(self.width**-0.5),
        )
        self.encoder_bias = RelativeBias(self.heads, bidirectional=True, **bias)
        self.encoder_norm = RMSNorm(dtype=self.dtype)
        split = self.gate_layer if self.gate else 0
        self.lower = self._stack(ScannedEncoderLayer, EncoderLayer, range(split), "lower_stack")
        self.upper = self._stack(ScannedEncoderLayer, EncoderLayer, range(split, self.encoder_layers), "upper_stack")
        if self.gate and "gate_logits" in registry.describe(self.gate).signals:
            self.delete_gate = DeleteGate()
        if self.decoder_layers:
            self.decoder_bias = RelativeBias(self.heads, bidirectional=False, **bias)
            self.decoder = self._stack(ScannedDecoderLayer, DecoderLayer, range(self.decoder_layers), "decoder_stack")
            self.decoder_norm = RMSNorm(dtype=self.dtype)
            if not self.tie_embeddings:
                self.head = nn.Dense(
                    self.vocab_size,
                    use_bias=False,
                    dtype=self.dtype,
                    kernel_init=_normal(self.width**-0.5, ("embed", "vocab")),
                )

    def _check(self) -> None:
        if self.gate is not None and not 1 <= self.gate_layer <= self.encoder_layers:
            raise ValueError(f"gate_layer must lie in 1..{self.encoder_layers} (the encoder); got {self.gate_layer}")
        if self.gate is not None and registry.describe(self.gate).kind != "deletion":
            raise ValueError(f"gate={self.gate!r} is no deletion method; one of {registry.names('deletion')}")
        if not 0.0 <= self.hard_probability <= 1.0:
            raise ValueError(f"hard_probability must lie in [0, 1]; got {self.hard_probability}")
        if self.rungs is not None and self.capacity is not None:
            raise ValueError("give rungs (a ladder) or capacity (one static length), not both")
        if self.hooks and self.scan_layers:
            raise ValueError(
                "hooks change the shapes between layers, so the layers must be unrolled: scan_layers=False"
            )
        for hook in self.hooks:
            if hook.place != "after":
                raise ValueError(
                    f"the encoder of T5 takes hooks after a layer (place='after'); got place={hook.place!r}"
                )

    def _stack(self, scanned: type, single: type, layers: range, name: str) -> Any:
        """The layers of a stack: one scanned module, or a list of modules numbered through the whole encoder."""
        sizes = dict(
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            softmax=self.softmax,
            dropout=self.dropout,
            dtype=self.dtype,
            score_excess=self.score_excess and name != "lower_stack",
        )
        if not layers:
            return ()
        if not self.scan_layers:
            # Argument numbers count the module itself as 0.
            arguments = (4, 5) if single is EncoderLayer else (5,)
            layer = nn.remat(single, static_argnums=arguments) if self.remat else single
            prefix = "decoder" if single is DecoderLayer else "encoder"
            return [layer(**sizes, name=f"{prefix}_{index}") for index in layers]
        arguments = 4 if single is EncoderLayer else 5
        layer = nn.remat(scanned, static_argnums=(arguments,), prevent_cse=False) if self.remat else scanned
        return nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=len(layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(sizes, name=name)

    def __call__(
        self,
        input_ids: Int[Array, "B N"],
        attention_mask: Bool[Array, "B N"] | None = None,
        decoder_input_ids: Int[Array, "B T"] | None = None,
        *,
        deletion: str | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, dict[str, Any]]:
        """Scores decoder tokens, or encodes when there are none.

        Args:
          input_ids: `[B, N]`.
          attention_mask: `[B, N]` True (or 1) for real tokens; `input_ids != 0` when None.
          decoder_input_ids: `[B, T]`, shifted right, starting with id 0.
          deletion: None (every token stays), "soft" or "hard".
          deterministic: no dropout.

        Returns:
          `(logits [B, T, V], aux)`, or `(features [B, N, D], aux)` for the encoder alone (after hard deletion the survivors
          stand left-packed with zeros behind them). `aux`: "tokens" `[L, B]` real tokens after each encoder layer;
          "token_set" after the encoder (None after hard deletion) and "reduction", all that hooks did; "delete_gate" `[B, N]`
          gate values and "gate_logits" `[B, N]` of a learned gate (without noise), "kept" `[B, N]` what hard deletion keeps,
          "gate_tokens" the token set that the gate saw; "losses", named pairs (sum, count).

        Raises:
          ValueError: an unknown deletion mode, deletion without a gate, a sequence longer than the ladder.
        """
        self._check_call(decoder_input_ids, deletion)
        mask = input_ids != 0 if attention_mask is None else attention_mask.astype(bool)
        state = _State(TokenSet.create(along_batch(self.embedding(input_ids)), mask=mask))
        counts: list[Array] = []
        state = self._encode(self.lower, 0, state, counts, deterministic)
        aux: dict[str, Any] = {"losses": {}}
        aux |= dict.fromkeys(("delete_gate", "gate_logits", "kept", "gate_tokens"))
        # Gate parameters are created even when the first call does not delete.
        if self.gate and (deletion or self.is_initializing()):
            gate, logits = self._gate_values(state, input_ids, deterministic)
            aux |= {"delete_gate": gate, "gate_logits": logits, "gate_tokens": state.tokens}
            aux["kept"] = self._survivors(gate, state.tokens)
            # Parameters must exist before the branches of a ladder share them: never initialise inside one.
            if deletion == "hard" and not self.is_initializing():
                output, excess, left = self._finish_hard(state, aux["kept"], decoder_input_ids, deterministic)
                aux["losses"] |= self._score_loss(excess, decoder_input_ids)
                counts = [*counts[:-1], *left]
                return output, aux | {"tokens": jnp.stack(counts), "token_set": None, "reduction": state.reduction}
            state = state.replace(gate=self._fading(gate, state.tokens, deterministic))
        state = self._encode(self.upper, len(counts), state, counts, deterministic)
        output, excess = self._decode(state, decoder_input_ids, deterministic)
        aux["losses"] |= self._score_loss(excess, decoder_input_ids)
        return output, aux | {"tokens": jnp.stack(counts), "token_set": state.tokens, "reduction": state.reduction}

    def _check_call(self, decoder_input_ids: Array | None, deletion: str | None) -> None:
        if deletion not in DELETIONS:
            raise ValueError(f"deletion={deletion!r}; one of {DELETIONS}")
        if deletion and not self.gate:
            raise ValueError(f"deletion={deletion!r} needs a model with a gate; this one has gate=None")
        if decoder_input_ids is not None and not self.decoder_layers:
            raise ValueError("this model has no decoder layers, but decoder_input_ids were given")

    @property
    def _scale(self) -> float:
        return dict(self.gate_hyper).get("scale", deletion_gate.SCALE)

    def _survivors(self, gate: Float[Array, "B N"], tokens: TokenSet) -> Bool[Array, "B N"]:
        """What hard deletion keeps; under a capacity the highest gate values of rows that would keep more."""
        keep = deletion_gate.kept(gate, tokens, scale=self._scale)
        if self.capacity is None:
            return keep
        return ragged.compact(keep, min(self.capacity, keep.shape[1]), overflow="best", scores=gate).assign >= 0

    def _fading(self, gate: Float[Array, "B N"], tokens: TokenSet, deterministic: bool) -> Float[Array, "B N"]:
        """What soft deletion adds to the keys: the gate, or in some batches of training what hard deletion would."""
        if deterministic or not self.hard_probability:
            return gate
        key, settings = self.make_rng("deletion"), dict(probability=self.hard_probability, scale=self._scale)
        return deletion_gate.sometimes_masked(gate, tokens, key, **settings)

    def _score_loss(self, excess: Float[Array, " B"] | None, decoder_input_ids: Array | None) -> dict[str, Any]:
        """The pair of the score excess from its sum over maps; none where it is off or there is no map."""
        if excess is None:
            return {}
        maps = self.encoder_layers - (self.gate_layer if self.gate else 0)
        maps += 0 if decoder_input_ids is None else self.decoder_layers
        return {"score_excess": (jnp.sum(excess) / maps, jnp.float32(excess.shape[0]))}

    def _gate_values(
        self, state: _State, input_ids: Int[Array, "B N"], deterministic: bool
    ) -> tuple[Float[Array, "B N"], Float[Array, "B N"] | None]:
        """Gate values `[B, N]` of the registered deletion method and its logits; Gumbel noise is for training only."""
        needs = registry.describe(self.gate).signals
        hyper = dict(self.gate_hyper)
        if deterministic:
            hyper.pop("gumbel", None)
        signals = Signals(
            gate_logits=self.delete_gate(state.tokens.features) if "gate_logits" in needs else None,
            token_ids=input_ids if state.reduction is None else state.reduction.reduce(input_ids),
            rng=self.make_rng("deletion") if "rng" in needs or hyper.get("gumbel") else None,
            layer=self.gate_layer,
        )
        return registry.get(self.gate)(state.tokens, signals, **hyper), signals.gate_logits

    def _encode(self, layers: Any, first: int, state: _State, counts: list[Array], deterministic: bool) -> _State:
        """Runs a stack of encoder layers, of which `first` is the first; appends real tokens after each to `counts`."""
        if not layers:
            return state
        if self.scan_layers:
            bias = self._encoder_bias(state)
            features, excess = layers(state.tokens.features, bias, state.key_bias, deterministic)
            layers_run = (self.gate_layer if layers is self.lower else self.encoder_layers) - first
            counts.extend([state.tokens.count] * layers_run)
            excess = None if excess is None else jnp.sum(excess, axis=0)
            return state.replace(tokens=state.tokens.replace(features=features), excess=excess)
        bias = self._encoder_bias(state)
        for index, layer in enumerate(layers, start=first):
            hooks = [hook for hook in self.hooks if hook.acts(index, state.tokens.features.shape[1])]
            asked = tuple(sorted({name for hook in hooks for name in hook.signals} - {"rng"}))
            features, signals = layer(state.tokens.features, bias, state.key_bias, asked, deterministic)
            excess = _add(state.excess, signals.score_excess)
            state = state.replace(tokens=state.tokens.replace(features=features), excess=excess)
            for hook in hooks:
                if not hook.acts(index, state.tokens.features.shape[1]):
                    continue
                rng = self.make_rng("reduction") if "rng" in hook.signals else None
                reduction = hook(state.tokens, signals.replace(layer=index, rng=rng))
                state, signals = state.reduce(reduction), follow(signals, reduction)
                bias = self._encoder_bias(state)
            counts.append(state.tokens.count)
        return state

    def _encoder_bias(self, state: _State) -> Float[Array, "b H N N"]:
        """Relative bias at the original positions; without a batch axis to repeat while all rows share them."""
        coords = state.tokens.coords[..., 0]
        if not state.moved:
            return self.encoder_bias(coords[:1], coords[:1])
        return along_batch(self.encoder_bias(coords, coords))

    def _decode(
        self, state: _State, decoder_input_ids: Array | None, deterministic: bool
    ) -> tuple[Array, Float[Array, " B"] | None]:
        """Logits `[B, T, V]`, or the normed encoder features without decoder tokens; and the score excess of all maps."""
        encoded = self.encoder_norm(state.tokens.features)
        if decoder_input_ids is None:
            return encoded, state.excess
        positions = jnp.arange(decoder_input_ids.shape[1], dtype=jnp.float32)[None]
        bias = self.decoder_bias(positions, positions)
        x = along_batch(self.embedding(decoder_input_ids))
        total = state.excess
        if self.scan_layers:
            x, excess = self.decoder(x, encoded, bias, state.key_bias, deterministic)
            total = total if excess is None else _add(total, jnp.sum(excess, axis=0))
        else:
            for layer in self.decoder:
                x, excess = layer(x, encoded, bias, state.key_bias, deterministic)
                total = _add(total, excess)
        x = self.decoder_norm(x)
        logits = self.embedding.attend(x * self.width**-0.5) if self.tie_embeddings else self.head(x)
        return logits.astype(jnp.float32), total

    def _finish_hard(
        self,
        state: _State,
        keep: Bool[Array, "B N"],
        decoder_input_ids: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Float[Array, " B"] | None, Array]:
        """What `_encode` and `_decode` give with the deleted tokens gone, and the real tokens left at each layer."""
        length = keep.shape[1]

        def work(
            reduction: Reduction, module: T5, state: _State, decoder_input_ids: Array | None
        ) -> tuple[Array, Float[Array, " B"] | None, Array]:
            state = state.reduce(reduction)
            counts = [state.tokens.count]
            state = module._encode(module.upper, module.gate_layer, state, counts, deterministic)
            output, excess = module._decode(state, decoder_input_ids, deterministic)
            if decoder_input_ids is None:
                # Every rung must return the same shape: survivors first, zeros behind them.
                output = jnp.where(state.tokens.valid[..., None], output, 0)
                output = jnp.pad(output, ((0, 0), (0, length - output.shape[1]), (0, 0)))
            return output, excess, jnp.stack(counts)

        if self.rungs is not None:
            return ragged.on_ladder(work, keep, self.rungs, self, state, decoder_input_ids, switch=_lifted_switch)
        slots = length if self.capacity is None else min(self.capacity, length)
        # At most `capacity` tokens of a row are kept, see `_survivors`.
        return work(ragged.compact(keep, slots, overflow="checked"), self, state, decoder_input_ids)

    def spec(self) -> flops.T5Spec:
        """Sizes for `adaptive.flops.count`."""
        return flops.T5Spec(
            vocab_size=self.vocab_size,
            width=self.width,
            mlp_dim=self.mlp_dim,
            inner=self.heads * self.head_dim,
            encoder_layers=self.encoder_layers,
            decoder_layers=self.decoder_layers,
        )


def _add(total: Array | None, value: Array | None) -> Array | None:
    """`total + value`, where None is nothing."""
    if total is None or value is None:
        return total if value is None else value
    return total + value


def _lifted_switch(index: Array, branches: list[Any], keep: Array, module: T5, *operands: Any) -> Any:
    """`nn.switch` with the argument order of `ragged.on_ladder`: the module is an operand there, and first here."""

    def lift(branch: Any) -> Any:
        return lambda module, keep, *operands: branch(keep, module, *operands)

    return nn.switch(index, [lift(branch) for branch in branches], module, keep, *operands)
