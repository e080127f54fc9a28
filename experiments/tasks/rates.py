# SPDX-License-Identifier: Apache-2.0
"""Learning how much a trained ViT compresses at each layer: its weights stand still, the rates alone learn."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from adaptive import flops
from adaptive.rates import proxy
from adaptive.rates.schedules import Schedule
from experiments.tasks.classification import Classification
from experiments.tasks.models import RATES
from layers.learned_rates import LearnedRates, as_reduce


@dataclasses.dataclass(frozen=True)
class LearnRates(Classification):
    """Cross-entropy plus `weight` times the squared distance of the multiply-adds from their target.

    Attributes:
      target: share of the dense model's multiply-adds.
      weight: of that loss.
      price: of tokens; see `adaptive.rates.proxy`.
    """

    target: float = RATES["target"]
    weight: float = RATES["weight"]
    price: str = RATES["price"]

    @classmethod
    def from_config(cls, config: ConfigDict) -> LearnRates:
        """Reads `config.model.rates` as well.

        Raises:
          ValueError: there is no such section.
        """
        if "rates" not in config.model:
            raise ValueError(
                "the task rates needs a section config.model.rates (experiments.tasks.models.rates_section)"
            )
        settings = {**RATES, **config.model.rates}
        model = Classification.from_config(config).model
        return cls(model, target=settings["target"], weight=settings["weight"], price=settings["price"])

    @property
    def hook(self) -> LearnedRates:
        """The rates."""
        return self.model.hooks[0]

    def schedule(self, params: Any) -> Schedule:
        """The static numbers that the parameters stand for."""
        return self.hook.schedule(params["hooks_0"]["logits"])

    def exported(self, params: Any) -> Classification:
        """The task of the model that runs those numbers with arrays that shrink."""
        return Classification(self.model.clone(hooks=(as_reduce(self.schedule(params), self.hook.order),)))

    def dense(self) -> Classification:
        """The same model without compression."""
        return Classification(self.model.clone(hooks=()))

    def count(self, metrics: dict[str, float]) -> flops.Count:
        """MACs of one image under the schedule that was evaluated."""
        return flops.Count({"compressed": metrics["macs_share"] * self.dense().count({}).macs})

    def loss(
        self, params: Any, batch: Any, *, rng: Any, step: Any, extra: Any, normalizers: Any, train: bool
    ) -> tuple[Any, dict[str, Any]]:
        """Cross-entropy under the masks and the budget's loss, and metrics."""
        rates = params["hooks_0"]
        frozen = jax.lax.stop_gradient({name: leaf for name, leaf in params.items() if name != "hooks_0"})
        task_loss, metrics = super().loss(
            frozen | {"hooks_0": rates},
            batch,
            rng=rng,
            step=step,
            extra=extra,
            normalizers=normalizers,
            train=train,
        )
        hook, one = self.hook, jnp.float32(1)
        budget = proxy.budget_loss(
            rates["logits"], hook.choices, self.model.spec(), hook.acting, self.target, self.price
        )
        # Microbatches add up, so each carries its part of what does not depend on the batch.
        part = batch["label"].shape[0] / normalizers["examples"]
        metrics |= {"macs_share": (self._share(rates["logits"]), one), "budget_loss": (budget, one)}
        return task_loss + part * self.weight * budget, metrics

    def eval_step(self, params: Any, batch: Any, *, extra: Any) -> dict[str, Any]:
        """As of a classification, and the share of the dense model's multiply-adds."""
        weight = jnp.sum(batch["weight"])
        share = self._share(params["hooks_0"]["logits"])
        return super().eval_step(params, batch, extra=extra) | {"macs_share": (share * weight, weight)}

    def _share(self, logits: Any) -> Any:
        hook, spec = self.hook, self.model.spec()
        return proxy.macs(logits, hook.choices, spec, hook.acting) / sum(spec.macs().values())
