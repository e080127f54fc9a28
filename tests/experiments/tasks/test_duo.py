# SPDX-License-Identifier: Apache-2.0
"""The two stages of Duo-LLM: all modules learn on random paths, then routers alone meet their budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from flax.traverse_util import flatten_dict

from adaptive.width import duo
from experiments import config as config_lib
from experiments import measure, tasks
from experiments.rundir import apply_overrides

BATCH = {
    "decoder_input_ids": jax.random.randint(jax.random.key(0), (8, 16), 3, 259),
    "labels": jax.random.randint(jax.random.key(1), (8, 16), 3, 259),
    "weight": jnp.ones(8),
}
SIZES = {"model.layers": 2, "model.width": 16, "model.heads": 2, "model.big": 32, "model.small": 4}


def build(**overrides):
    config = config_lib.load("configs/duo/bytes.py", {**SIZES, "data.targets_length": 16, **overrides})
    return tasks.build(config)


@pytest.fixture(scope="module")
def params():
    """Drawn, routers too, which start from zero: they prefer something then."""
    shapes = jax.eval_shape(lambda: meta.unbox(build().init(jax.random.key(0), BATCH))["params"])
    return measure.random_like(shapes, jax.random.key(9), deviation=0.3)


def gradients(task, params, steps=(0,)):
    def loss(params, step):
        normalizers = task.normalizers(BATCH)
        return task.loss(params, BATCH, rng=jax.random.key(2), step=step, extra={}, normalizers=normalizers, train=True)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found = [run(params, step) for step in steps]
    return [(value, metrics, flatten_dict(grads)) for (value, metrics), grads in found]


def test_the_first_stage_trains_all_but_the_routers(params):
    [(_, _, found)] = gradients(build(), params)
    for path, gradient in found.items():
        assert bool(jnp.any(gradient != 0)) == ("router" not in path), path


def test_the_second_stage_trains_the_routers_alone_and_hardens_them(params):
    """The loss is that of the mixture plus alpha times the budget's; the routers sharpen from step to step."""
    changes = {"steps": 100, "model.duo.sharpness": (1.0, 50.0), "model.duo.alpha": 3.0, "model.duo.budget": 0.25}
    task = build(**{"model.duo.stage": "router", **changes})
    first, last = gradients(task, params, steps=(0, 99))
    for path, gradient in first[2].items():
        assert bool(jnp.any(gradient != 0)) == ("router" in path), path
    soft = jax.jit(
        lambda p, factor: task.model.apply(
            {"params": p}, BATCH["decoder_input_ids"], factor, prior=(0.0, 0.75, 0.25), method="soft"
        )
    )
    for (value, metrics, _), factor in ((first, 1.0), (last, 50.0)):
        logits, shares = soft(params, factor)
        entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["labels"][..., None], axis=-1).mean()
        budget = jnp.mean(jnp.square(shares[..., duo.BIG].mean(axis=-1) - 0.25))
        np.testing.assert_allclose(value, entropy + 3.0 * budget, rtol=1e-4)
        np.testing.assert_allclose(metrics["big_share"][0] / metrics["big_share"][1], shares[..., 2].mean(), rtol=1e-4)


def test_evaluation_reports_the_modules_that_ran(params):
    for stage in ("paths", "router", "big"):
        task = build(**{"model.duo.stage": stage, "model.duo.shares": (0.5, 0.25, 0.25)})
        found = jax.jit(lambda p, task=task: task.eval_step(p, BATCH, extra={}))(params)
        big, small = (float(found[name][0] / found[name][1]) for name in ("big", "small"))
        assert big + small == pytest.approx({"paths": 1.0, "router": 2.0, "big": 2.0}[stage], abs=0.3)
        macs = task.count({"big": big, "small": small}).macs
        assert (macs == task.dense().count({}).macs) == (stage == "big")
        if stage == "big":
            logits = task.model.apply({"params": params}, BATCH["decoder_input_ids"], jnp.full(2, duo.BIG))
            want = -jnp.take_along_axis(jax.nn.log_softmax(logits), BATCH["labels"][..., None], axis=-1).mean()
            np.testing.assert_allclose(found["cross_entropy"][0] / found["cross_entropy"][1], want, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.duo.stage": "both"}, "stage='both' is not one of"),
        ({"model.duo.budget": 1.5}, r"in 0\.\.1; got 1\.5"),
        ({"model.duo.shares": (0.5, 0.2, 0.2)}, "with sum 1; got"),
        ({"model.duo.sharpness": (0.0, 1.0)}, "sharpness must be positive"),
        ({"data.objective": "span_corruption"}, "needs data.source='text'"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    config = config_lib.load("configs/duo/bytes.py", {**SIZES})
    if "data.objective" in changes:
        with config.unlocked():
            config.data = {"source": "text", "objective": "span_corruption"}
        changes = {}
    with pytest.raises(ValueError, match=message):
        tasks.build(apply_overrides(config, changes))
