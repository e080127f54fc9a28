# SPDX-License-Identifier: Apache-2.0
"""Prints, as one JSON object, losses, metrics and collectives of small models under every preset on 8 fake CPU devices.

python tests/experiments/sharded_models.py
"""

from __future__ import annotations

import json
import os

# Quick compilation: what is compared are losses and collectives, not speed.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import jax

from configs.acm import text as acm_text
from configs.decoder import text
from configs.mrt5 import spans
from configs.tome import digits
from experiments import data, metrics, parallel, tasks, train
from experiments.rundir import apply_overrides

STEPS = 3
VIT = {"batch_size": 16, "model.width": 32, "model.depth": 2, "data.image_size": 32, "data.valid_examples": 16}
T5 = {"batch_size": 16, "eval.batches": 1, "data.inputs_length": 32, "model.rungs": (16, 32), "model.gate_layer": 1}
T5 |= {"model.encoder_layers": 2}
# The dense model groups its layers as one with a gate does, so that programs can be compared instruction by instruction.
UNUSED = {"model.deletion.train": "", "model.deletion.evaluate": ""}
LM = {"batch_size": 16, "eval.batches": 1, "data.length": 32}
EVERY = ("none", "dp", "fsdp")
CASES = {
    "vit": (digits, "runlocal", VIT, EVERY),
    "vit-tome": (digits, "runlocal,method=tome,r=3", VIT, EVERY),
    "vit-evit": (digits, "runlocal,method=evit,r=4", VIT, ("none", "fsdp")),
    "vit-random": (digits, "runlocal,method=random,r=4", VIT, ("none", "dp")),
    "t5": (spans, "runlocal,gate=no_deletion", T5 | UNUSED, EVERY),
    "t5-mrt5": (spans, "runlocal,gate=mrt5", T5, EVERY),
    "t5-words": (spans, "runlocal,chunker=words", T5 | {"model.chunk_layer": 1}, ("none", "fsdp")),
    "lm": (text, "runlocal", LM, ("none", "fsdp")),
    "lm-mod": (text, "runlocal,share=0.25", LM, ("none", "fsdp")),
    "lm-acm": (acm_text, "runlocal", LM, EVERY),
    "t5-random": (spans, "runlocal,gate=random_deletion", T5, ("none", "fsdp")),
}


def run(case: str, preset: str) -> dict:
    """Losses of a few steps, evaluation metrics, and the collectives of both compiled programs."""
    module, arg, overrides, _ = CASES[case]
    config = apply_overrides(module.get_config(arg), {**overrides, "seed": 1, "parallel.preset": preset})
    task = tasks.build(config)
    dataset = data.build(config.data, split="train", batch_size=config.batch_size, seed=0)
    held_out = data.build(config.data, split="valid", batch_size=config.batch_size, seed=0)
    program = train.build_program(config, task, dataset.spec)
    with parallel.on_mesh(program.mesh):
        compiled = program.lower().compile()
        state, healthy = program.create(None), jax.device_put(True, program.healthy.sharding)
        batches, losses = dataset.train_iterator(), []
        for _ in range(STEPS):
            batch = parallel.shard_batch(program.mesh, next(batches))
            state, healthy, outputs = compiled(state, batch, healthy)
            losses.append(float(outputs["loss"]))
        batch = parallel.shard_batch(program.mesh, next(iter(held_out.eval_batches(1))))
        evaluation = program.eval_step.lower(state.params, batch, state.extra).compile()
        found = evaluation(state.params, batch, state.extra)
    return {
        "losses": losses,
        "evaluation": metrics.compute(found),
        "devices": len(program.mesh.devices.flat),
        "train": [[c.kind, list(c.shape)] for c in parallel.collectives(compiled)],
        "eval": [[c.kind, list(c.shape)] for c in parallel.collectives(evaluation)],
    }


if __name__ == "__main__":
    print(json.dumps({case: {preset: run(case, preset) for preset in CASES[case][-1]} for case in CASES}))
