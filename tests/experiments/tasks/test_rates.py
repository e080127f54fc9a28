# SPDX-License-Identifier: Apache-2.0
"""The task that learns rates: only they move, the budget is met, and what is exported gives the same numbers."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax.core import meta

from experiments import config as config_lib
from experiments import tasks
from experiments.rundir import apply_overrides
from experiments.tasks.rates import LearnRates

CONFIG = "configs/diffrate/digits.py:rates,runlocal"


@functools.cache
def _world():
    overrides = {"data.image_size": 32, "model.width": 16, "model.mlp_dim": 32, "model.rates.target": 0.8}
    overrides |= {
        "model.rates.first": 1,
        "model.rates.price": "both",
        "model.rates.start": "",
        "model.rates.weight": 100.0,
    }
    task = tasks.build(apply_overrides(config_lib.load(CONFIG), overrides))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(8, 32, 32, 1)).astype(np.float32),
        "label": rng.integers(0, 10, 8).astype(np.int32),
    }
    params = meta.unbox(task.init(jax.random.key(0), batch)["params"])
    return task, batch, params


def _loss(params, task, batch):
    normalizers = task.normalizers(batch)
    return task.loss(params, batch, rng=jax.random.key(0), step=0, extra={}, normalizers=normalizers, train=True)


def test_only_the_rates_learn_and_the_budget_is_met_within_a_percent():
    task, batch, params = _world()
    assert isinstance(task, LearnRates) and task.target == 0.8
    step = jax.jit(jax.value_and_grad(functools.partial(_loss, task=task, batch=batch), has_aux=True))
    optimizer = optax.adam(0.05)
    state, first = optimizer.init(params), params
    for _ in range(60):
        (_, metrics), grads = step(params)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
    for name in first:
        assert np.any(jax.tree.leaves(grads[name])[0]) == (name == "hooks_0")
    for name in set(first) - {"hooks_0"}:
        jax.tree.map(np.testing.assert_array_equal, first[name], params[name])
    # The layers that compress learn in both operations; the first does not.
    logits = np.abs(params["hooks_0"]["logits"]).max(-1)
    assert np.all(logits[1:] > 0) and np.all(logits[0] == 0)
    share = float(metrics["macs_share"][0])
    # 17 tokens in two layers: one token is up to 2 % of the multiply-adds.
    assert abs(share - 0.8) < 0.02
    exported = task.exported(params)
    dense = task.dense().count({}).macs
    schedule = task.schedule(params)
    share = exported.count({}).macs / dense
    np.testing.assert_allclose(share, task.count({"macs_share": share}).macs / dense)
    full = {**batch, "weight": np.ones(8, np.float32)}
    masked = jax.jit(functools.partial(task.eval_step, extra={}))(params, full)
    gathered = jax.jit(functools.partial(exported.eval_step, extra={}))(params, full)
    np.testing.assert_allclose(masked["cross_entropy"], gathered["cross_entropy"], rtol=1e-4)
    np.testing.assert_allclose(masked["macs_share"][0] / 8, share, rtol=1e-5)
    assert masked["tokens_left"][0] == 8 * schedule.counts[-1] == gathered["tokens_left"][0]


def test_gradients_of_microbatches_add_up_to_those_of_the_batch():
    task, batch, params = _world()
    normalizers = task.normalizers(batch)

    def gradient(part):
        def loss(params):
            return task.loss(
                params, part, rng=jax.random.key(0), step=0, extra={}, normalizers=normalizers, train=True
            )[0]

        return jax.jit(jax.grad(loss))(params)["hooks_0"]["logits"]

    halves = [jax.tree.map(lambda leaf, half=half: leaf[4 * half : 4 * half + 4], batch) for half in (0, 1)]
    np.testing.assert_allclose(gradient(halves[0]) + gradient(halves[1]), gradient(batch), rtol=1e-3, atol=1e-6)


def test_mistakes_in_the_section_are_refused():
    def build(**overrides):
        return tasks.build(apply_overrides(config_lib.load(CONFIG), overrides))

    with pytest.raises(ValueError, match="both a reduction and rates"):
        build(**{"model.reduction.method": "tome"})
    with pytest.raises(ValueError, match="the granularity must lie in"):
        build(**{"model.rates.granularity": 1_000}).hook.choices  # noqa: B018
    dense = config_lib.load("configs/diffrate/digits.py:runlocal")
    dense.task = "rates"
    with pytest.raises(ValueError, match=r"needs a section config\.model\.rates"):
        tasks.build(dense)


def test_schedules_of_a_config_must_fit_the_model():
    def build(**overrides):
        return tasks.build(apply_overrides(config_lib.load("configs/diffrate/digits.py:runlocal"), overrides))

    counts = {"model.reduction.method": "diffrate", "model.reduction.counts": (65, 40, 10)}
    layered = {"model.reduction.layered": {"alive": (65, 50, 20)}}
    (hook,) = build(**counts, **layered).model.hooks
    assert hook.counts == (65, 40, 10) and hook.layered == (("alive", (65, 50, 20)),)
    with pytest.raises(ValueError, match="2 layers and the backbone 3"):
        build(**{**counts, "model.reduction.counts": (65, 40)})
    with pytest.raises(ValueError, match="alive of 'diffrate' has 2 values for 3 layers"):
        build(**counts, **{"model.reduction.layered": {"alive": (65, 50)}})


def test_rates_start_at_the_uniform_schedule_of_the_target():
    config = config_lib.load("configs/diffrate/digits.py:rates,target=0.6")
    task = tasks.build(config)
    logits = task.hook.bind({}, rngs={"params": jax.random.key(0)})._initial(None, (6, 2, 64), np.float32)
    schedule = task.schedule({"hooks_0": {"logits": logits}})
    spec = task.model.spec()
    assert sum(spec.macs(counts=schedule.counts).values()) / sum(spec.macs().values()) == pytest.approx(0.6, abs=0.02)
    removed = -np.diff((65, *schedule.counts[:-1]))
    assert np.ptp(removed) <= 3 and removed.min() > 0
    assert all(left < alive for alive, left in zip(schedule.prune, schedule.merge, strict=True))


def test_an_unknown_start_of_rates_is_an_error():
    config = apply_overrides(config_lib.load(CONFIG), {"model.rates.start": "linear"})
    with pytest.raises(ValueError, match="start='linear' is neither 'uniform' nor empty"):
        tasks.build(config)
