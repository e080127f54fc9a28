# SPDX-License-Identifier: Apache-2.0
"""Going on from a trained model with another method on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from experiments import data, tasks


def graft(config: ConfigDict, trained: Any) -> Any:
    """Fresh parameters of the config's model, with those of a trained one wherever it has them.

    Raises:
      ValueError: a parameter of the same name has another shape.
    """
    task = tasks.build(config)
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed)
    batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), dataset.spec)
    fresh = flatten_dict(meta.unbox(jax.jit(task.init)(jax.random.key(config.seed), batch))["params"])
    given = flatten_dict(trained)
    for path in fresh.keys() & given.keys():
        if fresh[path].shape != given[path].shape:
            raise ValueError(
                f"parameter {'/'.join(path)} is {given[path].shape} in the trained model, {fresh[path].shape} here"
            )
    return unflatten_dict({path: given.get(path, value) for path, value in fresh.items()})
