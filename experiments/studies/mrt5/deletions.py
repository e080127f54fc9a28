# SPDX-License-Identifier: Apache-2.0
"""Which bytes are deleted: by class of byte, and in a picture of held-out text."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data, tasks
from experiments.data import byte_vocab
from experiments.studies import plots
from experiments.studies.mrt5.runs import Runs
from experiments.studies.mrt5.trade_off import BASES, DELETIONS, deletion_setups
from experiments.studies.study import Context


def picture(context: Context, settings: Mapping[str, Any]) -> None:
    """Draws a held-out text with the bytes that each method deletes at the middle rate of the trade-off."""
    runs = Runs(context, "trade_off", settings["config"], BASES, settings["base"], settings["tune"])
    rate = settings["rates"][len(settings["rates"]) // 2]
    lines = []
    for setup in deletion_setups(DELETIONS, (rate,)):
        _, config, result = runs.fit(setup, context.settings["seeds"][0])
        task = tasks.build(config)
        dataset = data.build(config.data, split="test", batch_size=settings["shown"], seed=config.seed)
        ids = next(iter(dataset.eval_batches(1)))["input_ids"]
        apply = functools.partial(task.model.apply, deletion="soft", rngs={"deletion": jax.random.key(0)})
        kept = jax.jit(lambda params, ids, apply=apply: apply({"params": params}, ids)[1]["kept"])
        keep = np.asarray(kept(result.state.params, jnp.asarray(ids)))
        # Sentinels and the end of sequence have no byte; they show as a dot.
        text = ids - byte_vocab.OFFSET
        plain = (text >= 0) & (text < byte_vocab.BYTES)
        shown = np.where(plain, text, 0).astype(np.uint8)
        title = f"{setup.method}: {100 * keep.mean():.0f} % of the bytes stay"
        lines += [(title, row.tobytes(), stays) for row, stays in zip(shown, keep, strict=True)]
    plots.save(plots.deleted_bytes(lines), context.results, "bytes")
