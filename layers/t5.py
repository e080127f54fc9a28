# SPDX-License-Identifier: Apache-2.0
"""Encoder-decoder T5 (version 1.1) and byte-level ByT5, with hooks after encoder layers, a delete gate, or a chunker.

Shapes: B batch, N encoder tokens, M encoder tokens after a reduction, T decoder tokens, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from adaptive import flops, ragged, registry
from adaptive.chunking import chunks as chunks_lib
from adaptive.deletion import gate as deletion_gate
from adaptive.tokens import Reduction, Signals, TokenSet
from layers import chunkers
from layers.delete_gate import DeleteGate
from layers.hooks import follow
from layers.norms import RMSNorm
from layers.parts import Parts, check_unrolled
from layers.relative_bias import RelativeBias, by_kernels
from layers.sharding import along_batch
from layers.t5_decoding import Decoding, add
from layers.t5_layers import DecoderLayer, EncoderLayer, EncoderState, ScannedDecoderLayer, ScannedEncoderLayer
from pallas_kernels.position_bias import PositionBias

DELETIONS = (None, "soft", "hard")

# Encoder and decoder layers, D, MLP, heads (64 wide each). Source: Xue et al. 2022 (ByT5), table 1.
SHAPES = {
    "byt5-small": dict(encoder_layers=12, decoder_layers=4, width=1472, mlp_dim=3584, heads=6),
    "byt5-base": dict(encoder_layers=18, decoder_layers=6, width=1536, mlp_dim=3968, heads=12),
    "byt5-large": dict(encoder_layers=36, decoder_layers=12, width=1536, mlp_dim=3840, heads=16),
}


def _normal(deviation: float, axes: tuple[str, ...]) -> Any:
    return nn.with_logical_partitioning(nn.initializers.normal(deviation), axes)


class _Done(NamedTuple):
    """What the layers above a gate or a chunker give.

    Attributes:
      output: of the model; counts: real tokens left at each layer; key_bias: `[B, N]` of cross-attention; excess: see `T5`.
    """

    output: Array
    counts: Array
    key_bias: Array
    excess: Array | None


class T5(Decoding):
    """Encoder-decoder transformer with T5 1.1 blocks (pre-RMSNorm, no biases, gated GELU, bucketed relative positions).

    The encoder can change its tokens in two ways. `hooks` reduce them after chosen layers (`layers.hooks.Reduce` with
    place "after"), and a deletion method named by `gate` acts once, after `gate_layer` layers: with `deletion="soft"` its
    values fade keys in all later encoder layers and in cross-attention; with `deletion="hard"` the deleted tokens are gone
    from there on, packed into `capacity` slots or into the smallest rung of the ladder `rungs` that holds every row.

    Instead, a `chunker` groups bytes after `chunk_layer` layers, and the layers above run on the chunks, each standing where
    its first byte stood. It always acts: in training on as many slots as there are bytes (or `capacity`), otherwise on a rung
    of the ladder too. `model.clone(chunker=None)` is the dense model over the same parameters.

    Attributes:
      vocab_size, width, mlp_dim, heads, head_dim, encoder_layers, decoder_layers: sizes; 0 decoder layers is an encoder.
      softmax: "standard", or "off_by_one" as all models of the MrT5 family use.
      gate: name of a registered deletion method, or None; gate_layer: layers before it; gate_hyper: its keyword arguments.
      chunker: name of a registered chunking method, or None; chunk_layer: layers before it, 0 to act on the embeddings;
        chunk_hyper: keyword arguments of the method and attributes of its learned part in `layers.chunkers`.
      chunk_local: in the layers before, bytes attend to their own chunk alone; for methods that read ids alone. With
        chunker="words" and `pool="first"` this is a hierarchical model of bytes and words.
      rungs: ladder for hard deletion and chunks, rising, the last at least N; capacity: a single static length instead. With
        neither, nothing shrinks.
      hooks: after encoder layers.
      parts: what builds the projections and feed-forward layers of the encoder; see `layers.parts`.
      hard_probability: of a training batch in which soft deletion removes keys as hard deletion would.
      score_excess: puts the pair "score_excess" into the losses: the mean of `max(S, 5) - 5` over the logits S, before gate
        values, of the encoder's self-attention above the gate and of all cross-attention, whose decoder positions all count;
        summed over rows, and their number.
      dropout, tie_embeddings, num_buckets, max_distance, epsilon (of the norms): as in T5.
      remat: recompute each layer in the backward pass; scan_layers: one compiled layer for the whole stack.
      dtype: of the computation; parameters stay float32.

    Source: Raffel et al. 2020 (T5), Shazeer 2020 (gated GELU), Xue et al. 2022 (ByT5), Kallini et al. 2025 (MrT5),
    Neitemeier et al. 2025 (HAT: bytes that see their own word, then words).

    Differs: the output head starts from fan-in variance, not from the unit variance of the public PyTorch code. HAT reads a
    word off an extra token and decodes byte by byte inside a word; here its first byte carries it and the decoder is T5's.
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
    chunker: str | None = None
    chunk_layer: int = 0
    chunk_hyper: tuple[tuple[str, Any], ...] = ()
    chunk_local: bool = False
    rungs: tuple[int, ...] | None = None
    capacity: int | None = None
    hooks: tuple[Any, ...] = ()
    parts: Parts = Parts()
    hard_probability: float = 0.0
    score_excess: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    epsilon: float = 1e-6
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
        self.encoder_norm = RMSNorm(self.epsilon, dtype=self.dtype)
        split, layers = self._split, self.encoder_layers
        self.lower = self._stack(ScannedEncoderLayer, EncoderLayer, range(split), "lower_stack")
        self.upper = self._stack(ScannedEncoderLayer, EncoderLayer, range(split, layers), "upper_stack")
        if self.chunker:
            self.chunking = self._chunker()
        if self.gate and "gate_logits" in registry.describe(self.gate).signals:
            self.delete_gate = DeleteGate()
        if self.decoder_layers:
            self.decoder_bias = RelativeBias(self.heads, bidirectional=False, **bias)
            self.decoder = self._stack(ScannedDecoderLayer, DecoderLayer, range(self.decoder_layers), "decoder_stack")
            self.decoder_norm = RMSNorm(self.epsilon, dtype=self.dtype)
            if not self.tie_embeddings:
                self.head = nn.Dense(
                    self.vocab_size,
                    use_bias=False,
                    dtype=self.dtype,
                    kernel_init=_normal(self.width**-0.5, ("embed", "vocab")),
                )

    @property
    def _split(self) -> int:
        """Encoder layers before the gate or the chunker; the same without the chunker, so that parameters fit."""
        return self.gate_layer if self.gate else self.chunk_layer

    def _chunker(self, **attributes: Any) -> chunkers.Chunker:
        sizes = {name: getattr(self, name) for name in ("vocab_size", "mlp_dim", "heads", "head_dim", "dtype")}
        return chunkers.build(self.chunker, self.chunk_hyper, **sizes, **attributes)

    def _check(self) -> None:
        self._check_chunker()
        check_unrolled(self.parts, scan_layers=self.scan_layers, remat=self.remat)
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

    def _check_chunker(self) -> None:
        if not 0 <= self.chunk_layer <= self.encoder_layers:
            raise ValueError(f"chunk_layer must lie in 0..{self.encoder_layers} (the encoder); got {self.chunk_layer}")
        if self.chunker is None:
            return
        if self.gate is not None or self.hooks:
            other = f"gate={self.gate!r}" if self.gate is not None else "hooks"
            raise ValueError(f"chunker={self.chunker!r} and {other} would both shorten the encoder; give one of them")
        if self.chunk_local and not (self.chunk_layer and chunkers.from_ids(self.chunker)):
            raise ValueError(
                f"chunk_local needs chunks that are known from the ids before layers run on bytes: a chunk_layer over 0 and a "
                f"method that reads ids alone; got chunk_layer={self.chunk_layer} and chunker={self.chunker!r}"
            )

    def _stack(self, scanned: type, single: type, layers: range, name: str) -> Any:
        """The layers of a stack: one scanned module, or a list of modules numbered through the whole encoder."""
        sizes = dict(
            heads=self.heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            softmax=self.softmax,
            dropout=self.dropout,
            epsilon=self.epsilon,
            dtype=self.dtype,
            score_excess=self.score_excess and name != "lower_stack",
        )
        if single is EncoderLayer:
            sizes["parts"] = self.parts
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
        lift = dict(
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=len(layers),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        methods = {"__call__": dict(in_axes=nn.broadcast, **lift)}
        if scanned is ScannedDecoderLayer:
            every = nn.broadcast
            methods |= {"remember": lift, "step": dict(in_axes=(0, 0, every, every, every), **lift)}
        return nn.scan(layer, methods=methods)(sizes, name=name)

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
          "gate_tokens" the token set that the gate saw; "chunks" of a chunker (then "token_set" is None, and features stand as
          after hard deletion unless the chunker turns chunks back into bytes); "key_bias" `[B, M]` of the encoder's output in
          cross-attention; "losses" `{name: (sum, count)}`.

        Raises:
          ValueError: an unknown deletion mode, deletion without a gate, a sequence longer than the ladder.
        """
        self._check_call(decoder_input_ids, deletion)
        mask = input_ids != 0 if attention_mask is None else attention_mask.astype(bool)
        state = EncoderState(TokenSet.create(along_batch(self.embedding(input_ids)), mask=mask))
        if self.chunker and self.chunk_local:
            own = self.chunking.decide(state.tokens, Signals(token_ids=input_ids))
            state = state.replace(chunk=chunks_lib.segments(own))
        counts: list[Array] = []
        state = self._encode(self.lower, 0, state, counts, deterministic)
        aux: dict[str, Any] = {"losses": {}}
        aux |= dict.fromkeys(("delete_gate", "gate_logits", "kept", "gate_tokens", "chunks"))
        if self.chunker:
            found = self.chunking(state.tokens, input_ids, deterministic=deterministic)
            done = self._finish_short(state, found.chunks.starts, found, decoder_input_ids, deterministic)
            # A chunker on the embeddings comes before the first layer.
            counts = [*counts[:-1], *(done.counts if counts else done.counts[1:])]
            aux |= {"chunks": found.chunks, "losses": found.losses | self._score_loss(done.excess, decoder_input_ids)}
            aux |= {"tokens": jnp.stack(counts), "key_bias": done.key_bias}
            return done.output, aux | {"token_set": None, "reduction": None}
        # Gate parameters are created even when the first call does not delete.
        if self.gate and (deletion or self.is_initializing()):
            gate, logits = self._gate_values(state, input_ids, deterministic)
            aux |= {"delete_gate": gate, "gate_logits": logits, "gate_tokens": state.tokens}
            aux["kept"] = self._survivors(gate, state.tokens)
            # Parameters must exist before the branches of a ladder share them: never initialise inside one.
            if deletion == "hard" and not self.is_initializing():
                done = self._finish_short(state, aux["kept"], None, decoder_input_ids, deterministic)
                aux |= {"tokens": jnp.stack([*counts[:-1], *done.counts]), "key_bias": done.key_bias}
                aux["losses"] |= self._score_loss(done.excess, decoder_input_ids)
                return done.output, aux | {"token_set": None, "reduction": state.reduction}
            state = state.replace(gate=self._fading(gate, state.tokens, deterministic))
        state = self._encode(self.upper, len(counts), state, counts, deterministic)
        output, excess = self._decode(state, decoder_input_ids, deterministic)
        aux["losses"] |= self._score_loss(excess, decoder_input_ids)
        aux |= {"tokens": jnp.stack(counts), "key_bias": state.key_bias}
        return output, aux | {"token_set": state.tokens, "reduction": state.reduction}

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
        maps = self.encoder_layers - self._split
        maps += 0 if decoder_input_ids is None else self.decoder_layers
        return {"score_excess": (jnp.sum(excess) / maps, jnp.float32(excess.shape[0]))}

    def _gate_values(
        self, state: EncoderState, input_ids: Int[Array, "B N"], deterministic: bool
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

    def _encode(
        self, layers: Any, first: int, state: EncoderState, counts: list[Array], deterministic: bool
    ) -> EncoderState:
        """Runs a stack of encoder layers, of which `first` is the first; appends real tokens after each to `counts`."""
        if not layers:
            return state
        if self.scan_layers:
            bias = self._encoder_bias(state)
            features, excess = layers(state.tokens.features, bias, state.key_bias, deterministic)
            layers_run = (self._split if layers is self.lower else self.encoder_layers) - first
            counts.extend([state.tokens.count] * layers_run)
            excess = None if excess is None else jnp.sum(excess, axis=0)
            return state.replace(tokens=state.tokens.replace(features=features), excess=excess)
        bias = self._encoder_bias(state)
        for index, layer in enumerate(layers, start=first):
            hooks = [hook for hook in self.hooks if hook.acts(index, state.tokens.features.shape[1])]
            asked = tuple(sorted({name for hook in hooks for name in hook.signals} - {"rng"}))
            features, signals = layer(state.tokens.features, bias, state.key_bias, asked, deterministic)
            excess = add(state.excess, signals.score_excess)
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

    def _encoder_bias(self, state: EncoderState) -> Float[Array, "b H N N"] | PositionBias:
        """Relative bias at the original positions; without a batch axis to repeat while all rows share them."""
        coords = state.tokens.coords[..., 0] if state.moved else state.tokens.coords[:1, :, 0]
        if by_kernels() and (state.moved or state.chunk is None):
            return self.encoder_bias(coords, coords, dense=False)
        bias = self.encoder_bias(coords, coords)
        if state.moved:
            return along_batch(bias)
        if state.chunk is None:
            return bias
        own = state.chunk[:, :, None] == state.chunk[:, None, :]
        return along_batch(bias + jnp.where(own, 0.0, -jnp.inf)[:, None])

    def _decode(
        self, state: EncoderState, decoder_input_ids: Array | None, deterministic: bool
    ) -> tuple[Array, Float[Array, " B"] | None]:
        """Logits `[B, T, V]`, or the normed encoder features without decoder tokens; and the score excess of all maps."""
        encoded = self.encoder_norm(state.tokens.features)
        if decoder_input_ids is None:
            return encoded, state.excess
        logits, excess = self._score(encoded, state.key_bias, decoder_input_ids, deterministic)
        return logits, add(state.excess, excess)

    def _finish_short(
        self,
        state: EncoderState,
        heads: Bool[Array, "B N"],
        found: chunkers.Proposal | None,
        decoder_input_ids: Array | None,
        deterministic: bool,
    ) -> _Done:
        """What `_encode` and `_decode` give on the slots that `heads` begin.

        The slots are the tokens that a gate keeps, or the chunks that were `found`.
        """
        length = heads.shape[1]

        def reduce(source: Any, slots: int) -> Reduction:
            # At most `capacity` tokens of a row are kept, see `_survivors`.
            return ragged.compact(source, slots, overflow="checked") if found is None else pool(source, slots)

        def work(
            reduction: Reduction, module: T5, state: EncoderState, found: Any, decoder_input_ids: Array | None
        ) -> _Done:
            short = state.reduce(reduction) if found is None else module._pooled(state, found, reduction)
            counts = [short.tokens.count]
            short = module._encode(module.upper, module._split, short, counts, deterministic)
            if found is not None:
                short = module._chunks_done(state, short, found, reduction)
            output, excess = module._decode(short, decoder_input_ids, deterministic)
            # Every rung must return the same shapes: survivors first, nothing behind them.
            behind = length - short.key_bias.shape[1]
            key_bias = jnp.pad(short.key_bias, ((0, 0), (0, behind)), constant_values=-jnp.inf)
            if decoder_input_ids is None:
                output = jnp.where(short.tokens.valid[..., None], output, 0)
                output = jnp.pad(output, ((0, 0), (0, behind), (0, 0)))
            return _Done(output, jnp.stack(counts), key_bias, excess)

        source = heads if found is None else found.chunks
        pool = self.chunking.reduction if found is not None else None
        # Parameters must exist before the branches of a ladder share them, and training has no use for a ladder.
        on_ladder = found is None or (deterministic and not self.is_initializing())
        if self.rungs is not None and on_ladder:
            return ragged.on_ladder(
                work,
                heads,
                self.rungs,
                *(self, state, found, decoder_input_ids),
                reduce=reduce,
                source=source,
                switch=_lifted_switch,
            )
        slots = length if self.capacity is None else min(self.capacity, length)
        return work(reduce(source, slots), self, state, found, decoder_input_ids)

    def _pooled(self, state: EncoderState, found: chunkers.Proposal, reduction: Reduction) -> EncoderState:
        """The chunks; a chunk is one key, however many bytes it stands for."""
        short = state.reduce(reduction)
        features = along_batch(self.chunking.shorten(found.features, reduction))
        return short.replace(tokens=short.tokens.replace(features=features), proportional=False)

    def _chunks_done(
        self, state: EncoderState, short: EncoderState, found: chunkers.Proposal, reduction: Reduction
    ) -> EncoderState:
        """What the decoder sees: the chunks, or the bytes that the chunker makes of them."""
        values, features = short.tokens.features, state.tokens.features
        finished = self.chunking.finish(values, features, found.chunks, reduction)
        after = state if self.chunking.lengthens else short
        return after.replace(tokens=after.tokens.replace(features=along_batch(finished)))

    @property
    def draws_chunks(self) -> bool:
        """Whether evaluation draws chunks, from the rng "chunking"."""
        return self.chunker is not None and self._chunker(parent=None).draws_in_evaluation

    def chunk_sizes(self, inputs: int, chunks: float) -> dict[str, Any]:
        """What `spec().macs` takes for sequences of `inputs` bytes in `chunks` chunks, the chunker's own MACs included."""
        chunker = self._chunker(parent=None)
        whole = max(self.chunk_layer - 1, 0)
        return dict(
            inputs=inputs,
            counts=(inputs,) * whole + (chunks,) * (self.encoder_layers - whole),
            entering=None if self.chunk_layer else chunks,
            attended=inputs if chunker.lengthens else None,
            chunker=chunker.macs(inputs, chunks, self.width),
        )

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


def _lifted_switch(index: Array, branches: list[Any], keep: Array, module: T5, *operands: Any) -> Any:
    """`nn.switch` with the argument order of `ragged.on_ladder`: the module is an operand there, and first here."""

    def lift(branch: Any) -> Any:
        return lambda module, keep, *operands: branch(keep, module, *operands)

    return nn.switch(index, [lift(branch) for branch in branches], module, keep, *operands)
