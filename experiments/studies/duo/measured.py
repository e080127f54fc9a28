# SPDX-License-Identifier: Apache-2.0
"""One trained Duo-LLM with its routers, and the losses of all its paths on held-out text.

Shapes: S sequences, T bytes, L layers, P patterns of skip, small and big.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from adaptive.routing import oracle, patterns
from adaptive.width import duo
from experiments import data, tasks
from experiments.rundir import apply_overrides
from experiments.studies.study import Context
from layers.duo_lm import DuoLM
from layers.duo_oracle import as_layered, embed, token_losses

# Sequences that go through all patterns at a time.
_TOGETHER = 8
# Draws of the random router, over which its loss is averaged.
_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Text:
    """Held-out text: `ids`, `labels` and `shuffled` labels (the control), `[S, T]` each."""

    ids: np.ndarray
    labels: np.ndarray
    shuffled: np.ndarray


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model trained on random paths, measured on the test split; thresholds and fixed patterns come from the valid split.

    Attributes:
      context: of the study; seed: of the run.
      overrides: of the config for the model's training; router: on top of them, for the routers.
      sequences: S of each split.
    """

    context: Context
    seed: int
    overrides: Mapping[str, Any]
    router: Mapping[str, Any]
    sequences: int

    @functools.cached_property
    def config(self) -> ConfigDict:
        """Of the model's training."""
        return apply_overrides(self.context.config("duo/bytes.py"), {**self.overrides, "seed": self.seed})

    @functools.cached_property
    def model(self) -> DuoLM:
        """The module."""
        return tasks.build(self.config).model

    @functools.cached_property
    def params(self) -> Any:
        """Of the trained model; its routers are untrained."""
        return self.context.train(f"base-seed{self.seed}", self.config).state.params

    @functools.cached_property
    def test(self) -> Text:
        """What is measured on."""
        return self._text("test")

    @functools.cached_property
    def valid(self) -> Text:
        """What thresholds and fixed patterns are chosen on."""
        return self._text("valid")

    @functools.cached_property
    def patterns(self) -> np.ndarray:
        """`[P, L]`."""
        return patterns.all_patterns(self.model.layers, len(duo.CHOICES))

    @functools.cached_property
    def bigs(self) -> np.ndarray:
        """`[P]` big modules of each pattern."""
        return (self.patterns == duo.BIG).sum(axis=1)

    @functools.cached_property
    def without_skip(self) -> np.ndarray:
        """`[P]` bool."""
        return (self.patterns != duo.SKIP).all(axis=1)

    @functools.cached_property
    def losses(self) -> dict[str, np.ndarray]:
        """`[P, S, T]` of every pattern on the test split, for the true and the shuffled labels."""
        return self._all_losses(self.test)

    @functools.cached_property
    def valid_losses(self) -> np.ndarray:
        """`[P, S, T]` of every pattern on the valid split."""
        return self._all_losses(self.valid)["true"]

    def members(self, budget: int, *, skip: bool = False) -> np.ndarray:
        """Numbers of the patterns with exactly `budget` big modules, those with skips only if asked for."""
        return np.flatnonzero((self.bigs == budget) & (skip | self.without_skip))

    def uniform(self, choice: int) -> int:
        """Number of the pattern with the same choice everywhere."""
        return int(np.flatnonzero((self.patterns == choice).all(axis=1))[0])

    def kmacs(self, budget: float) -> float:
        """Thousands of multiply-accumulates a byte when it meets `budget` big modules and small ones else."""
        length = self.test.ids.shape[1]
        macs = self.model.macs(tokens=length, big=budget, small=self.model.layers - budget)
        return sum(macs.values()) / length / 1e3

    def on_paths(self, paths: np.ndarray) -> np.ndarray:
        """Losses `[S, T]` on the test split when every byte takes its own path `[S, T, L]`."""
        return np.asarray(self._path_losses(self.params, self.test.ids, self.test.labels, jnp.asarray(paths)))

    def random_router(self, budget: int) -> np.ndarray:
        """Losses `[S, T]` with big drawn at random for each byte and layer, `budget` times a byte on average."""
        share = budget / self.model.layers
        shape = (*self.test.ids.shape, self.model.layers)
        keys = jax.random.split(jax.random.key(self.seed), _DRAWS)
        drawn = [duo.random_paths(key, shape, (0.0, 1.0 - share, share)) for key in keys]
        return np.mean([self.on_paths(paths) for paths in drawn], axis=0)

    def routed(self, budget: int) -> tuple[np.ndarray, np.ndarray]:
        """`(losses [S, T], paths [S, T, L])` of the router that was trained for a budget.

        Its threshold is set on the valid split, so that it takes as many big modules there as the budget says.
        """
        share = budget / self.model.layers
        params = self.params if share in (0.0, 1.0) else self._router_params(budget)
        scores = self._route(params, self.valid.ids, jnp.float32(0.0))[2]
        logits, paths, _ = self._route(params, self.test.ids, self._settled(params, scores, share))
        return np.asarray(token_losses(logits, self.test.labels)), np.asarray(paths)

    def _settled(self, params: Any, scores: Any, share: float) -> Any:
        """The threshold at which a share of big results; later layers see what earlier ones chose, so it is set in rounds."""
        threshold = duo.calibrate(scores, share)
        for _ in range(3):
            threshold = duo.calibrate(self._route(params, self.valid.ids, threshold)[2], share)
        return threshold

    def _router_params(self, budget: int) -> Any:
        changes = {"model.duo.stage": "router", "model.duo.budget": budget / self.model.layers}
        config = apply_overrides(self.config.copy_and_resolve_references(), {**self.router, **changes})
        name = f"router{budget}-seed{self.seed}"
        return self.context.train(name, config, params=self.params).state.params

    @functools.cached_property
    def _route(self) -> Any:
        return jax.jit(lambda p, ids, threshold: self.model.apply({"params": p}, ids, threshold, method="routed"))

    @functools.cached_property
    def _path_losses(self) -> Any:
        return jax.jit(
            lambda p, ids, labels, paths: token_losses(
                self.model.apply({"params": p}, ids, paths, compact=True), labels
            )
        )

    def _text(self, split: str) -> Text:
        dataset = data.build(self.config.data, split=split, batch_size=self.sequences, seed=self.config.seed)
        batch = next(dataset.eval_batches(1))
        ids, labels = batch["decoder_input_ids"], batch["labels"]
        return Text(ids, labels, np.asarray(oracle.shuffled(jnp.asarray(labels), jax.random.key(self.seed))))

    @functools.cached_property
    def _every_path(self) -> Any:
        @jax.jit
        def every(params: Any, ids: Any, labels: Any, shuffled: Any) -> dict[str, Any]:
            def readout(logits: Any) -> dict[str, Any]:
                return {"true": token_losses(logits, labels), "shuffled": token_losses(logits, shuffled)}

            return oracle.all_losses(as_layered(self.model, params, readout), embed(self.model, params, ids))

        return every

    def _all_losses(self, text: Text) -> dict[str, np.ndarray]:
        arrays = (text.ids, text.labels, text.shuffled)
        parts = [
            self._every_path(self.params, *(array[i : i + _TOGETHER] for array in arrays))
            for i in range(0, self.sequences, _TOGETHER)
        ]
        return {name: np.concatenate([np.asarray(part[name]) for part in parts], axis=1) for name in parts[0]}
