# SPDX-License-Identifier: Apache-2.0
"""Schedules against formulas written out, optimisers against optax's own, and who decays."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import optim, parallel
from experiments.config import base_config
from tests.experiments.toy import ToyData, ToyTask


def optimizer_config(**overrides):
    config = base_config().optimizer
    config.update(overrides)
    return config


# ---- Schedules -------------------------------------------------------------------------------------------------------


def expected(name, n, *, peak, warmup, steps, end):
    """The learning rate at step n, from the definitions."""
    if n < warmup:
        return peak * n / warmup
    if name == "constant":
        return peak
    if name == "rsqrt":
        return peak * math.sqrt(max(warmup, 1) / (max(warmup, 1) + n - warmup))
    part = min((n - warmup) / max(steps - warmup, 1), 1.0)
    if name == "linear":
        return peak + (end * peak - peak) * part
    return peak * ((1 - end) * 0.5 * (1 + math.cos(math.pi * part)) + end)


@settings(deadline=None)
@given(
    st.sampled_from(optim.SCHEDULES), st.integers(1, 200), st.floats(0, 1), st.floats(1e-5, 1.0), st.floats(0.0, 1.0)
)
def test_schedules_follow_their_formulas(name, steps, warmup_part, peak, end):
    warmup = int(warmup_part * steps)
    end = end if name in ("cosine", "linear") else 0.0
    schedule = optim.schedule(name, peak=peak, warmup=warmup, steps=steps, end=end)
    for n in {0, warmup // 2, warmup, (warmup + steps) // 2, steps - 1, steps}:
        want = expected(name, n, peak=peak, warmup=warmup, steps=steps, end=end)
        assert float(schedule(n)) == pytest.approx(want, rel=2e-5, abs=1e-6 * peak)


def test_rsqrt_without_timescale_is_the_t5_schedule():
    schedule = optim.schedule("rsqrt", peak=0.01, warmup=100, steps=10_000)
    for n in (100, 400, 2500):
        assert float(schedule(n)) == pytest.approx(0.01 * math.sqrt(100 / n), rel=1e-5)


def test_rsqrt_timescale_sets_how_fast_it_falls():
    schedule = optim.schedule("rsqrt", peak=1.0, warmup=10, steps=10_000, timescale=1000)
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(3010)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["rsqrt", "constant"])
def test_cooldown_falls_to_zero_over_the_last_steps(name):
    plain = optim.schedule(name, peak=1.0, warmup=5, steps=100)
    cooled = optim.schedule(name, peak=1.0, warmup=5, steps=100, cooldown=20)
    for n in (0, 5, 50, 80):
        assert float(cooled(n)) == float(plain(n))
    assert float(cooled(90)) == pytest.approx(0.5 * float(plain(90)))
    assert float(cooled(100)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cosin"}, "known schedules: cosine, rsqrt, linear, constant"),
        ({"peak": 0.0}, "above 0"),
        ({"warmup": 11}, r"\[0, steps\]"),
        ({"warmup": -1}, r"\[0, steps\]"),
        ({"steps": 0}, "at least 1"),
        ({"end": 1.5}, r"\[0, 1\]"),
        ({"name": "constant", "end": 0.1}, "no meaning for schedule 'constant'"),
        ({"timescale": 5}, "only rsqrt"),
        ({"cooldown": 2}, "already decays"),
        ({"name": "rsqrt", "warmup": 5, "cooldown": 6}, r"\[0, 5\]"),
    ],
)
def test_impossible_schedules_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        optim.schedule(**{"name": "cosine", "peak": 1.0, "warmup": 0, "steps": 10} | change)


# ---- Optimisers ------------------------------------------------------------------------------------------------------


def run(tx, params, grads):
    """Parameters after one update for each gradient."""
    state = tx.init(params)
    for grad in grads:
        updates, state = tx.update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params


def problem(count=4):
    rng = np.random.default_rng(0)
    make = lambda: {"w": rng.normal(size=(4, 6)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}  # noqa: E731
    return make(), [make() for _ in range(count)]


def test_adamw_is_optax_adamw_behind_a_clip():
    params, grads = problem()
    config = optimizer_config(weight_decay=0.1, clip=1.0, peak=0.05, schedule="linear", warmup=1)
    schedule = optim.schedule("linear", peak=0.05, warmup=1, steps=4)
    mask = {"w": True, "b": False}
    reference = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.1, mask=mask))
    ours, theirs = run(optim.build(config, 4), params, grads), run(reference, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_sgd_with_momentum_against_a_loop():
    params, grads = problem()
    config = optimizer_config(name="sgd", momentum=0.9, schedule="constant", peak=0.1, clip=0.0)
    velocity, want = np.zeros((4, 6)), params["w"].astype(np.float64)
    for grad in grads:
        velocity = 0.9 * velocity + grad["w"]
        want = want - 0.1 * velocity
    np.testing.assert_allclose(run(optim.build(config, 4), params, grads)["w"], want, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_update_and_keeps_its_direction():
    params, (grad,) = problem(1)
    config = optimizer_config(name="sgd", momentum=0.0, schedule="constant", peak=1.0, clip=0.5)
    new = run(optim.build(config, 1), params, [grad])
    delta = jax.tree.map(lambda a, b: a - b, params, new)
    norm = optax.tree.norm(grad)
    assert float(optax.tree.norm(delta)) == pytest.approx(0.5, rel=1e-5)
    jax.tree.map(lambda d, g: np.testing.assert_allclose(d, g * 0.5 / norm, atol=1e-6), delta, grad)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimiser_descends(name):
    config = optimizer_config(name=name, peak=0.05, schedule="constant")
    tx = optim.build(config, 60)
    target = jnp.arange(12.0).reshape(3, 4) / 12

    def loss(w):
        return jnp.sum((w - target) ** 2)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    # Away from zero and from the target: adafactor's steps are in proportion to the parameter.
    w = jnp.full((3, 4), 2.0)
    (final, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=60)
    assert float(loss(final)) < 0.05 * float(loss(w))


def test_decay_spares_vectors_biases_and_scales_also_when_scanned():
    box = nn.LogicallyPartitioned
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    boxed = {
        "kernel": box(leaf(8, 4), ("embed", "mlp")),
        "scanned_kernel": box(leaf(3, 8, 4), ("layers", "embed", "mlp")),
        "gain": box(leaf(8), ("norm",)),
        "scanned_gain": box(leaf(3, 8), ("layers", "norm")),
        "attention": {"bias": box(leaf(2, 4), ("heads", "head_dim")), "scale": leaf(2, 4)},
        "plain": leaf(2, 4),
    }
    assert optim.decay_mask(boxed) == {
        "kernel": True,
        "scanned_kernel": True,
        "gain": False,
        "scanned_gain": False,
        "attention": {"bias": False, "scale": False},
        "plain": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "known optimisers: adamw, sgd, adafactor"),
        ({"clip": -1.0}, "gradient norm"),
        ({"weight_decay": -0.1}, "0 .off. or above"),
        ({"warmup": 11}, "optimizer.warmup is 11"),
    ],
)
def test_impossible_optimisers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        optim.build(optimizer_config(**change), 10)


# ---- One update ------------------------------------------------------------------------------------------------------


class StepFixture:
    """A train step of the toy on one device."""

    def __init__(self, *, accumulate=1, ema=0.0, noise=0.0, name="sgd"):
        self.task, self.data = ToyTask(noise=noise), ToyData(batch_size=16)
        config = optimizer_config(name=name, momentum=0.0, peak=0.5, schedule="constant", clip=0.0)
        self.tx = optim.build(config, 10)
        schedule = optim.build_schedule(config, 10)
        mesh = parallel.make_mesh("none")
        self.step = jax.jit(optim.make_train_step(self.task, self.tx, schedule, mesh, accumulate=accumulate, ema=ema))
        self.batch = self.data._batch(np.arange(16))
        params = nn.unbox(self.task.init(jax.random.key(0), self.batch))["params"]
        self.state = optim.TrainState(
            step=jnp.int32(0),
            params=params,
            opt_state=self.tx.init(params),
            ema=params if ema else None,
            extra=self.task.init_extra(),
            rng=jax.random.key_data(jax.random.key(1)),
        )


@pytest.fixture(scope="module")
def whole():
    return StepFixture()


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_exact(whole, accumulate):
    # The examples of the toy carry unequal weights, so averaging microbatch means would be visibly wrong.
    parts = StepFixture(accumulate=accumulate)
    state_1, _, out_1 = whole.step(whole.state, whole.batch, True)
    state_k, _, out_k = parts.step(parts.state, parts.batch, True)
    assert float(out_1["loss"]) == pytest.approx(float(out_k["loss"]), rel=1e-6)
    assert float(out_1["grad_norm"]) == pytest.approx(float(out_k["grad_norm"]), rel=1e-5)
    for a, b in zip(jax.tree.leaves(state_1), jax.tree.leaves(state_k), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), out_1["metrics"], out_k["metrics"])


def test_each_step_and_each_microbatch_draws_its_own_noise():
    noisy = StepFixture(accumulate=2, noise=0.5)
    same_rows = {k: np.repeat(v[:1], 16, axis=0) for k, v in noisy.batch.items()}
    losses = [float(noisy.step(noisy.state.replace(step=jnp.int32(n)), same_rows, True)[2]["loss"]) for n in (0, 1)]
    assert losses[0] != losses[1]
    again = float(noisy.step(noisy.state, same_rows, True)[2]["loss"])
    assert again == losses[0]


def test_extra_is_updated_once_a_step_from_the_whole_batch(whole):
    state, _, out = whole.step(whole.state, whole.batch, True)
    want = whole.task.update_extra(whole.state.extra, out["metrics"], 0)
    assert float(state.extra["penalty"]) == pytest.approx(float(want["penalty"]), rel=1e-6)
    assert float(state.extra["penalty"]) != float(whole.state.extra["penalty"])


def test_moving_average_follows_its_recursion():
    fixture = StepFixture(ema=0.9)
    state, average = fixture.state, fixture.state.params
    for n in range(3):
        state, _, _ = fixture.step(state, fixture.batch, True)
        decay = min(0.9, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.ema, average)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was_and_so_do_all_after_it(whole):
    bad = whole.batch | {"x": np.where(np.arange(16)[:, None] == 3, np.nan, whole.batch["x"])}
    healthy, state = True, whole.state
    state, healthy, _ = whole.step(state, whole.batch, healthy)
    good = state
    for batch, expect in ((bad, False), (whole.batch, False)):
        state, healthy, _ = whole.step(state, batch, healthy)
        assert bool(healthy) is expect
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), state, good)
    assert int(state.step) == 1


def test_a_task_may_not_take_the_trainers_metric_names(whole):
    class Greedy(ToyTask):
        def loss(self, *args, **kwargs):
            loss, metrics = super().loss(*args, **kwargs)
            return loss, metrics | {"loss": (loss, 1.0)}

    step = optim.make_train_step(Greedy(), whole.tx, lambda n: 0.1, parallel.make_mesh("none"), accumulate=1, ema=0.0)
    with pytest.raises(ValueError, match=r"\['loss'\], which the trainer writes"):
        jax.eval_shape(step, whole.state, whole.batch, True)
