# SPDX-License-Identifier: Apache-2.0
"""Next-token prediction with a decoder language model. Shapes: B batch, N tokens, L layers, V vocabulary."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.depth import calm, skip_decode
from experiments import data
from experiments.tasks.models import build_decoder
from layers.decoder_lm import DecoderLM

_LOG2E = math.log2(math.e)
EXIT_LOSSES = ("", "rising", "classifier")


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """Cross-entropy of the next token, plus the weighted losses that parts of the model hand out.

    Attributes:
      model: a decoder.
      length: N.
      losses: `((name, weight), ...)` of `aux["losses"]`; those without a weight do not count.
      exit_losses: "" trains the last layer's prediction alone; "rising" all layers', by `calm.layer_weights`, so that a token
        may stop at any of them; "classifier" also trains the classifier of exits, which does not move the model.
      skip_training: trains in the layers of the model's schedule by position, a sequence being taken for a generation from its
        first token on; evaluation always does, where there is a schedule.
    """

    model: DecoderLM
    length: int
    losses: tuple[tuple[str, float], ...] = ()
    exit_losses: str = ""
    skip_training: bool = False

    def __post_init__(self) -> None:
        if self.skip_training and self.model.policy is None:
            raise ValueError("config.model.skip_training needs a schedule in config.model.skip")
        if self.exit_losses not in EXIT_LOSSES:
            raise ValueError(f"config.model.exit_losses is {self.exit_losses!r}; one of {EXIT_LOSSES}")
        if (self.exit_losses == "classifier") != self.model.exit_classifier:
            raise ValueError(
                f"config.model.exit_losses={self.exit_losses!r} and exit_classifier={self.model.exit_classifier} do not fit: a "
                "classifier of exits is trained by exit_losses='classifier', and by nothing else"
            )

    @classmethod
    def from_config(cls, config: ConfigDict) -> LanguageModelling:
        """Reads `config.model` (see `experiments.tasks.models`), its section `losses`, and `config.data`.

        Raises:
          ValueError: the data are not of next-token prediction, or the model section is wrong.
        """
        settings = data.resolve(config.data)
        if settings.get("objective") not in data.NEXT_TOKEN:
            raise ValueError(
                f"the task language_modelling needs config.data.objective to be one of {data.NEXT_TOKEN}; got "
                f"source={settings.source!r}, objective={settings.get('objective')!r}"
            )
        losses = tuple(sorted(dict(config.model.get("losses", {})).items()))
        model = build_decoder(config.model, dtype=config.dtype)
        if (size := data.vocabulary(settings).size) > model.vocab_size:
            raise ValueError(f"config.model.vocab_size={model.vocab_size} is too small for the {size} ids of the data")
        options = {name: config.model[name] for name in ("exit_losses", "skip_training") if name in config.model}
        return cls(model, settings.length, losses, **options)

    @property
    def tokens_per_example(self) -> int:
        """Tokens of a sequence."""
        return self.length

    # What of a batch the model reads, and the ids before every text.
    reads: ClassVar[str] = "input_ids"
    start: ClassVar[np.ndarray] = np.array([], np.int32)

    @property
    def decoder(self) -> DecoderLM:
        """The model as it decodes."""
        return self.model

    def dense(self) -> LanguageModelling:
        """The same task without adaptivity; the parameters fit."""
        dense = self.model.clone(routing=None, policy=None)
        return dataclasses.replace(self, model=dense, losses=(), skip_training=False)

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one sequence, from the tokens that each layer runs for; router and predictor of routed blocks not counted."""
        model, routing = self.model, self.model.routing
        if model.policy is not None:
            # The tokens of a layer come first, since schedules fall, and attend to each other.
            return flops.count(model, tokens=self.length, counts=self._active().sum(axis=(1, 2)).tolist())
        if routing is None:
            return flops.count(model, tokens=self.length)
        routed = [routing.acts(layer) for layer in range(model.depth)]
        few = (metrics["tokens_a_layer"] * model.depth - self.length * routed.count(False)) / routed.count(True)
        return flops.count(model, tokens=self.length, counts=[few if own else self.length for own in routed])

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables."""
        return self.model.init(rng, batch["input_ids"])

    def init_extra(self) -> dict[str, Any]:
        """Nothing to carry."""
        return {}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """The number of tokens that are predicted."""
        return {"tokens": jnp.sum(real(batch))}

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy in nats a token plus the weighted losses of the model, and metrics."""
        del step, extra
        logits, aux = self.model.apply(
            {"params": params},
            batch["input_ids"],
            active=self._active() if self.skip_training else None,
            output_hidden_states=bool(self.exit_losses),
            deterministic=not train,
            rngs={"dropout": rng},
        )
        mask = real(batch)
        losses = token_losses(logits, batch["labels"], mask)
        loss = jnp.sum(losses) / normalizers["tokens"]
        metrics = {"cross_entropy": (jnp.sum(losses), jnp.sum(mask))}
        if self.exit_losses:
            total, found = self._exits(params, aux, batch["labels"], mask)
            # The last layer's own loss is one of the weighted ones.
            loss = total / normalizers["tokens"]
            metrics |= found
        for name, weight in self.losses:
            total, count = self._handed(aux, name)
            loss += weight * total / normalizers["tokens"]
            metrics[name] = (total, count)
        return loss, metrics

    def _exits(self, params: Any, aux: dict[str, Any], labels: Any, mask: Any) -> tuple[Any, dict[str, Any]]:
        """The weighted cross-entropy of all layers, summed over tokens, with the classifier's own loss; and metrics."""
        states = aux["hidden_states"][1:]
        logits = jnp.stack([self.model.apply({"params": params}, x, method="logits") for x in states])
        weights = calm.layer_weights(len(states))
        total = sum(
            weight * jnp.sum(token_losses(own, labels, mask)) for weight, own in zip(weights, logits, strict=True)
        )
        if self.exit_losses == "rising":
            return total, {}
        targets, found = calm.exit_targets(logits), aux["exit_logits"]
        losses = jnp.mean(jax.nn.softplus(found) - found * targets, axis=0) * mask
        right = jnp.mean((found > 0) == (targets > 0), axis=0) * mask
        count = jnp.sum(mask)
        return total + jnp.sum(losses), {
            "exit_loss": (jnp.sum(losses), count),
            "exit_accuracy": (jnp.sum(right), count),
        }

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing to carry."""
        del metrics, step
        return extra

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Cross-entropy a token, bits per byte, accuracy, and tokens that a layer runs for.

        Of routed blocks also how often the predictor agrees with the top-k. Their quality in decoding is that of
        `model.routing.choice="predictor"`.
        """
        del extra
        logits, aux = self.model.apply({"params": params}, batch["input_ids"], active=self._active())
        mask, weight = real(batch), batch["weight"][:, None]
        losses = token_losses(logits, batch["labels"], mask)
        total, count = jnp.sum(losses * weight), jnp.sum(mask * weight)
        right = (jnp.argmax(logits, axis=-1) == batch["labels"]) * mask
        tokens = jnp.mean(aux["tokens"].astype(jnp.float32), axis=0)
        agreed = [own["predictor_accuracy"] for own in aux["feed_forward"] if "predictor_accuracy" in own]
        predictor = tuple(jnp.sum(sum(own) * batch["weight"]) for own in zip(*agreed, strict=True))
        return {
            "cross_entropy": (total, count),
            "bits_per_byte": (_LOG2E * total, jnp.sum(batch.get("bytes", 1) * mask * weight)),
            "token_accuracy": (jnp.sum(right * weight), count),
            "tokens_a_layer": (jnp.sum(tokens * batch["weight"]), jnp.sum(batch["weight"])),
            **({"predictor_accuracy": predictor} if agreed else {}),
        }

    def _active(self) -> Any:
        """Layers that the schedule has for each token, `[L, 1, N]`; None without one."""
        policy = self.model.policy
        if policy is None:
            return None
        table = skip_decode.active_layers(policy.counts, self.model.depth, bottom=policy.bottom)
        return jnp.asarray(table[np.minimum(np.arange(self.length), len(table) - 1)].T[:, None])

    @staticmethod
    def _handed(aux: dict[str, Any], name: str) -> tuple[Any, Any]:
        if name not in aux["losses"]:
            raise ValueError(f"config.model.losses.{name}: this model has the losses {sorted(aux['losses']) or 'none'}")
        return aux["losses"][name]


def real(batch: Any) -> Any:
    """`[B, N]` float32, 1 where there is a label: byte 0 is padding, subwords have none."""
    labels = batch["labels"]
    return jnp.ones(labels.shape) if "bytes" in batch else (labels != 0).astype(jnp.float32)


def token_losses(logits: Any, labels: Any, mask: Any) -> Any:
    """Cross-entropy `[B, N]` in nats, 0 outside the mask."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0] * mask
