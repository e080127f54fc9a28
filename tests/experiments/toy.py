# SPDX-License-Identifier: Apache-2.0
"""A small but real training task for tests of the trainer, and a program that runs it.

Task: classify noisy, shifted sine waves [T] by their frequency, with an MLP of named axes, dropout-like noise from the
step's rng, a weight for each example, and a controller in `extra` that steers an auxiliary loss.

    python tests/experiments/toy.py WORKDIR '{"steps": 24, ...overrides by dotted key}' [DELAY] [POISON_INDEX]
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np

from experiments import train
from experiments.config import base_config
from experiments.rundir import apply_overrides

CLASSES, LENGTH = 4, 16


class Mlp(nn.Module):
    """[B, T] -> [B, CLASSES]."""

    width: int = 32

    @nn.compact
    def __call__(self, x):
        def dense(features, names):
            init = nn.with_logical_partitioning(nn.initializers.lecun_uniform(), names)
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), names[1:])
            return nn.Dense(features, kernel_init=init, bias_init=zeros)

        x = dense(self.width, ("patch", "embed"))(x)
        scale = self.param("scale", nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",)), (self.width,))
        x = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
        x = nn.relu(dense(2 * self.width, ("embed", "mlp"))(x))
        return dense(CLASSES, ("mlp", "classes"))(x)


@dataclasses.dataclass(frozen=True)
class ToyTask:
    """Weighted cross-entropy plus a controlled penalty on the size of the logits; `noise` uses the step's rng."""

    noise: float = 0.1
    tokens_per_example: int = LENGTH

    def init(self, rng, batch):
        return Mlp().init(rng, batch["x"])

    def init_extra(self):
        return {"penalty": jnp.float32(0.01)}

    def normalizers(self, batch):
        return {"weight": jnp.sum(batch["w"])}

    def loss(self, params, batch, *, rng, step, extra, normalizers, train):
        x = batch["x"] + self.noise * jax.random.uniform(rng, batch["x"].shape, minval=-1.0)
        metrics, logits = self._metrics(params, batch | {"x": x})
        size = jnp.sum(batch["w"] * jnp.mean(logits**2, axis=-1))
        loss = (metrics["cross_entropy"][0] + extra["penalty"] * size) / normalizers["weight"]
        return loss, metrics | {"size": (size, jnp.sum(batch["w"]))}

    def update_extra(self, extra, metrics, step):
        total, count = metrics["size"]
        return {"penalty": jnp.clip(extra["penalty"] * jnp.exp(0.05 * (total / count - 1.0)), 1e-4, 1.0)}

    def eval_step(self, params, batch, *, extra):
        return self._metrics(params, batch | {"w": batch["w"] * batch["weight"]})[0]

    def _metrics(self, params, batch):
        logits = Mlp().apply({"params": params}, batch["x"])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=-1)[:, 0]
        right = (jnp.argmax(logits, axis=-1) == batch["y"]).astype(jnp.float32)
        count = jnp.sum(batch["w"])
        return {
            "cross_entropy": (jnp.sum(batch["w"] * nll), count),
            "accuracy": (jnp.sum(batch["w"] * right), count),
        }, logits

    def batch_size_of(self, batch):
        return batch["y"].shape[0]


@dataclasses.dataclass(frozen=True)
class ToyData:
    """Deterministic waves; `delay` seconds a batch; the example with number `poison` holds a NaN."""

    batch_size: int = 16
    seed: int = 0
    examples: int = 256
    delay: float = 0.0
    poison: int = -1

    @property
    def spec(self):
        return {k: jax.ShapeDtypeStruct((self.batch_size, *v.shape), v.dtype) for k, v in self._example(0).items()}

    def _example(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, number))
        label = number % CLASSES
        time_axis = np.arange(LENGTH) / LENGTH
        x = np.sin(2 * np.pi * ((label + 1) * time_axis + rng.random())) + 0.3 * rng.normal(size=LENGTH)
        if number == self.poison:
            x[3] = np.nan
        return {"x": x.astype(np.float32), "y": np.int32(label), "w": np.float32(0.5 + rng.random())}

    def _batch(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.delay)
        rows = [self._example(int(n)) for n in numbers]
        return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

    def train_iterator(self):
        order = grain.MapDataset.range(self.examples).shuffle(seed=self.seed).repeat()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(order.batch(self.batch_size).map(self._batch).to_iter_dataset(options))

    def eval_batches(self, max_batches=None):
        total = self.examples // 4 + 5  # not a multiple of the batch size: the last batch is padded
        for index, first in enumerate(range(0, total, self.batch_size)):
            if index == max_batches:
                return
            numbers = 10_000 + np.arange(first, first + self.batch_size)
            yield self._batch(numbers) | {"weight": (numbers < 10_000 + total).astype(np.float32)}


def config(**overrides: Any):
    """A config that trains the toy in a second; overrides by dotted key, with '__' for '.'."""
    result = base_config()
    small = {"steps": 24, "batch_size": 16, "log_every": 1, "ema": 0.9, "parallel.preset": "none"}
    small |= {"optimizer.peak": 1e-2, "optimizer.warmup": 2, "optimizer.weight_decay": 0.01}
    small |= {"eval.every": 8, "checkpoint.every": 5, "checkpoint.keep": 2}
    return apply_overrides(result, small | {key.replace("__", "."): value for key, value in overrides.items()})


def main(argv: list[str]) -> int:
    """Runs one training; the exit code is the trainer's."""
    workdir, overrides, delay, poison = (argv + ["{}", "0", "-1"][len(argv) - 1 :])[:4]
    settings = config(**json.loads(overrides))
    dataset = ToyData(settings.batch_size, delay=float(delay), poison=int(poison))
    return train.run(settings, workdir, task=ToyTask(), dataset=dataset)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
