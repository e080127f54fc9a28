# SPDX-License-Identifier: Apache-2.0
"""Duo-LLM in its two stages of training: random paths for all modules, then routers on the frozen model.

Shapes: B batch, T bytes, L layers, K = 3 choices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.width import duo
from experiments import data
from experiments.data import byte_vocab
from experiments.tasks.models import build_duo_lm, check_keys
from layers.duo_lm import DuoLM

_LOG2E = math.log2(math.e)
STAGES = ("paths", "router", "big")

# The `duo` section of a model config: `shares` of skip, small and big in the first stage, the rest of the second.
SECTION = {
    "stage": "paths",
    "shares": (0.0, 0.5, 0.5),
    "budget": 0.5,
    "alpha": 10.0,
    "sharpness": (1.0, 10.0),
    "allow_skip": False,
}


def duo_section(**values: Any) -> dict[str, Any]:
    """The `duo` section with `values` in place of the defaults."""
    check_keys("model.duo", values, SECTION)
    return {**SECTION, **values}


@dataclasses.dataclass(frozen=True)
class Duo:
    """Next-byte prediction with a `DuoLM`.

    Attributes:
      model: the module.
      length: T.
      stage: "paths" trains every module on random paths; "router" trains the routers alone, all else frozen; "big" runs the
        big module everywhere, the dense model that others are timed against.
      shares: of skip, small and big on random paths.
      budget, alpha: mean share of big that routers are to have, and the weight of the loss that asks for it.
      sharpness: first and last factor of the routers' logits in training.
      allow_skip: routers may skip; else they choose between small and big.
      steps: of training.

    Source: Alizadeh et al. 2024, stages 1 and 3.

    Differs: that all but the routers is frozen in the second stage is a reconstruction, as are alpha and the sharpness.
    """

    model: DuoLM
    length: int
    stage: str = "paths"
    shares: tuple[float, ...] = SECTION["shares"]
    budget: float = 0.5
    alpha: float = 10.0
    sharpness: tuple[float, float] = (1.0, 10.0)
    allow_skip: bool = False
    steps: int = 1

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"config.model.duo.stage={self.stage!r} is not one of {STAGES}")
        if min(self.sharpness) <= 0 or self.alpha < 0:
            raise ValueError(f"sharpness must be positive and alpha >= 0; got {self.sharpness} and {self.alpha}")
        duo.check_shares(self.shares)
        duo.check_budget(self.budget)

    @classmethod
    def from_config(cls, config: ConfigDict) -> Duo:
        """Reads `config.model` and its section `duo`, and the length of the text.

        Raises:
          ValueError: the data are not bytes to continue, or a section is wrong.
        """
        settings = data.resolve(config.data)
        if settings.source != "text" or settings.objective != "next_byte":
            raise ValueError("the task duo needs data.source='text' with data.objective='next_byte'")
        section = duo_section(**config.model.get("duo", {}))
        for name in ("shares", "sharpness"):
            section[name] = tuple(section[name])
        return cls(
            build_duo_lm(config.model, dtype=config.dtype), settings.targets_length, steps=config.steps, **section
        )

    @property
    def tokens_per_example(self) -> int:
        """Bytes that are read and predicted."""
        return self.length

    def dense(self) -> Duo:
        """The big module everywhere, with the same parameters."""
        return dataclasses.replace(self, stage="big")

    # What of a batch the model reads, and the ids before every text.
    reads: ClassVar[str] = "decoder_input_ids"
    start: ClassVar[np.ndarray] = np.array([byte_vocab.PAD], np.int32)

    @property
    def decoder(self) -> DuoLM:
        """The model as it decodes: by the routers in their stage, else with the big module everywhere."""
        if self.stage == "router":
            return self.model.clone(threshold=self._threshold, allow_skip=self.allow_skip)
        return self.model.clone(threshold=-math.inf)

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one example, from the measured mean numbers of small and big modules a token."""
        if self.stage == "big":
            return flops.Count(self.model.macs(tokens=self.length))
        return flops.Count(self.model.macs(tokens=self.length, big=metrics["big"], small=metrics["small"]))

    def init(self, rng: Any, batch: Any) -> Any:
        """Boxed variables; the mixture meets every module."""
        return self.model.init(rng, batch["decoder_input_ids"], method="soft")

    def init_extra(self) -> dict[str, Any]:
        """Nothing to carry."""
        return {}

    def normalizers(self, batch: Any) -> dict[str, Any]:
        """The number of predicted bytes."""
        return {"bytes": jnp.maximum(jnp.sum(batch["labels"] != 0, dtype=jnp.float32), 1.0)}

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Mean cross-entropy of a byte, in the router's stage with the budget loss, and metrics."""
        del extra, train
        if self.stage == "router":
            return self._router_loss(params, batch, step, normalizers["bytes"])
        ids = batch["decoder_input_ids"]
        shares = self.shares if self.stage == "paths" else (0.0, 0.0, 1.0)
        paths = duo.random_paths(rng, (*ids.shape, self.model.layers), shares)
        losses = byte_losses(self.model.apply({"params": params}, ids, paths), batch["labels"])
        total, count = jnp.sum(losses), normalizers["bytes"]
        return total / count, {"cross_entropy": (total, jnp.sum(batch["labels"] != 0))}

    def _router_loss(self, params: Any, batch: Any, step: Any, count: Any) -> tuple[Any, dict[str, Any]]:
        factor = duo.sharpness_at(step, self.steps, *self.sharpness)
        frozen = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if _of_router(path) else jax.lax.stop_gradient(leaf), params
        )
        prior = duo.prior_of(self.budget, allow_skip=self.allow_skip)
        logits, shares = self.model.apply(
            {"params": frozen}, batch["decoder_input_ids"], factor, prior=prior, method="soft"
        )
        total = jnp.sum(byte_losses(logits, batch["labels"]))
        excess, tokens = duo.budget_loss(shares, self.budget)
        # A row has all its bytes, so tokens and bytes are as many; one normalizer keeps accumulated gradients exact.
        loss = (total + self.alpha * excess) / count
        metrics = {
            "cross_entropy": (total, tokens),
            "budget_loss": (excess, tokens),
            "big_share": (jnp.sum(shares[..., duo.BIG]), tokens * self.model.layers),
        }
        return loss, metrics

    @property
    def _threshold(self) -> float:
        """Of `duo.big_score`, where big has the larger share at the end of training."""
        prior = duo.prior_of(self.budget, allow_skip=self.allow_skip)
        return math.log(prior[duo.SMALL] / prior[duo.BIG]) / self.sharpness[1]

    def update_extra(self, extra: Any, metrics: Any, step: Any) -> Any:
        """Nothing to carry."""
        del metrics, step
        return extra

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """Bits per byte, and mean numbers of big and small modules of a byte, with each module run on its own rows only.

        The routers decide in their stage; random paths, the same for every batch, in the first one.
        """
        del extra
        ids, labels = batch["decoder_input_ids"], batch["labels"]
        shape, apply = (*ids.shape, self.model.layers), functools.partial(self.model.apply, {"params": params})
        if self.stage == "router":
            logits, paths, _ = apply(ids, self._threshold, allow_skip=self.allow_skip, method="routed")
        elif self.stage == "paths":
            paths = duo.random_paths(jax.random.key(0), shape, self.shares)
            logits = apply(ids, paths, compact=True)
        else:
            paths = jnp.full(shape, duo.BIG, jnp.int32)
            logits = apply(ids, method="all_big")
        mask = (labels != 0) * batch["weight"][:, None]
        count = jnp.sum(mask)
        total = jnp.sum(byte_losses(logits, labels) * batch["weight"][:, None])

        def uses(choice: int) -> tuple[Any, Any]:
            return jnp.sum((paths == choice) * mask[..., None]), count

        return {
            "cross_entropy": (total, count),
            "bits_per_byte": (_LOG2E * total, count),
            "big": uses(duo.BIG),
            "small": uses(duo.SMALL),
        }


def byte_losses(logits: Any, labels: Any) -> Any:
    """Cross-entropies `[B, T]` in nats, 0 where there is no label."""
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), labels[..., None], axis=-1)[..., 0]
    return losses * (labels != 0)


def _of_router(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == "router" for key in path)
