# SPDX-License-Identifier: Apache-2.0
"""The phases of ACM as tasks: what each trains, what it reports, and what an evaluation counts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from ml_collections import ConfigDict

from experiments import tasks
from experiments.acm import Phases
from experiments.config import load
from experiments.tasks import acm as acm_tasks
from experiments.tasks.acm import acm_section
from experiments.train import train

SMALL = {
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.mlp_dim": 16,
    "model.patch_size": 16,
    "data.image_size": 32,
    "model.acm.start": "random",
}
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def config(**changes):
    return load("configs/acm/digits.py:runlocal", {**SMALL, **changes})


def batch(size=8, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(size, 32, 32, 1)).astype(np.float32)
    labels = rng.integers(0, 10, size).astype(np.int32)
    return {"image": jnp.asarray(images), "label": jnp.asarray(labels), "weight": jnp.ones(size)}


@functools.cache
def teacher():
    inner = tasks.build(config()).inner
    shapes = meta.unbox(jax.eval_shape(lambda: inner.init(jax.random.key(0), batch())))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.4 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def started():
    return tasks.build(config()).start(teacher(), jax.random.key(0))


def options(task):
    return dict(rng=jax.random.key(0), step=0, normalizers=task.normalizers(batch()), extra=task.init_extra())


@functools.cache
def step(phase):
    """`(loss, metrics, gradients)` of a phase in one compiled program."""
    task = tasks.build(config())
    task = {
        "distill": lambda: task.distillation(teacher()),
        "gate": lambda: task.gate_training(teacher(), 0.9),
        "tune": lambda: task,
    }[phase]()
    loss = jax.value_and_grad(lambda p: task.loss(p, batch(), train=True, **options(task)), has_aux=True)
    return _jit(loss)(started())


def trained(phase):
    """Names of the leaves that a phase moves."""
    return {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(step(phase)[1])
        if np.any(leaf)
    }


def test_distillation_trains_all_learners_at_once_and_reports_a_loss_for_each():
    (loss, metrics), _ = step("distill")
    losses = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert len(losses) == 10 and all(name.startswith("distillation/block_") for name in losses)
    np.testing.assert_allclose(loss, np.mean(list(losses.values())), rtol=1e-5)
    moved = trained("distill")
    assert all("learners/" in name and "gate" not in name for name in moved)
    assert len(moved) == 30


def test_twelve_layers_are_distilled_in_one_program_with_a_loss_for_each_module():
    task = tasks.build(config(**{"model.depth": 12}))
    dense = meta.unbox(jax.eval_shape(lambda: task.inner.init(jax.random.key(0), batch())))["params"]

    def loss(params, dense):
        phase = task.distillation(dense)
        return phase.loss(params, batch(), train=True, **options(phase))

    start = jax.eval_shape(task.start, dense, jax.random.key(0))
    (value, metrics), _ = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), start, dense)
    modules = ("attention/key", "attention/out", "attention/query", "attention/value", "mlp")
    assert metrics.keys() == {f"distillation/block_{layer}/{name}" for layer in range(12) for name in modules}
    assert value.shape == ()


def test_gate_training_moves_gates_alone():
    (loss, metrics), _ = step("gate")
    assert np.isfinite(loss) and len(metrics) == 10
    moved = trained("gate")
    assert moved and all("learners/gate/" in name for name in moved)


def test_the_last_phase_moves_gates_learners_and_the_rest():
    (loss, metrics), _ = step("tune")
    assert {"share", "acm/budget", "acm/entropy", "acm/diversity", "cross_entropy"} <= metrics.keys()
    value = {name: float(total / count) for name, (total, count) in metrics.items()}
    want = value["cross_entropy"] + 5 * value["acm/budget"] + 0.05 * (value["acm/entropy"] + value["acm/diversity"])
    np.testing.assert_allclose(loss, want, rtol=1e-4)
    np.testing.assert_allclose(value["acm/budget"], abs(value["share"] - 0.5), atol=1e-5)
    moved = trained("tune")
    assert {"head/kernel", "block_0/mlp/learners/up", "block_1/attention/key/learners/gate/layer_0/kernel"} <= moved


@functools.cache
def evaluated():
    task = tasks.build(config())
    found = _jit(lambda p: task.eval_step(p, batch(), extra={}))(started())
    return task, {name: float(total / jnp.maximum(count, 1e-9)) for name, (total, count) in found.items()}


def test_an_evaluation_counts_learners_loads_and_macs():
    task, found = evaluated()
    modules = task.modules(batch())
    dense = task.inner.count({}).macs
    spent = 0.0
    for module in modules:
        used = found[f"learners/{module.path}"]
        load = [found.get(f"load/{module.path}/{number}", 0.0) for number in range(5)]
        np.testing.assert_allclose(sum(load), 1.0, rtol=1e-5)
        np.testing.assert_allclose(np.dot(load, range(5)), used, rtol=1e-5)
        spent += task.tokens_per_example * (module.gate + module.learner * used - module.dense)
    np.testing.assert_allclose(task.count(found).macs, dense + spent, rtol=1e-5)
    whole = sum(4 * module.learner for module in modules)
    share = sum(module.learner * found[f"learners/{module.path}"] for module in modules) / whole
    np.testing.assert_allclose(found["share"], share, rtol=1e-4)
    assert set(acm_tasks.loads(found)) == {module.path for module in modules}
    assert task.dense().count(found).macs == dense


def test_examples_without_weight_do_not_count():
    task, _ = evaluated()
    half = {**batch(), "weight": jnp.asarray([1.0] * 4 + [0.0] * 4)}
    got = _jit(lambda p: task.eval_step(p, half, extra={}))(started())
    alone = jax.tree.map(lambda x: x[:4], batch())
    want = _jit(lambda p: task.eval_step(p, alone, extra={}))(started())
    for name in ("share", "cross_entropy", "learners/block_0/mlp"):
        np.testing.assert_allclose(got[name][0] / got[name][1], want[name][0] / want[name][1], rtol=1e-4)


def test_uniform_learners_have_no_gates_to_pay_for():
    task = tasks.build(config(**{"model.acm.uniform": 2}))
    found = _jit(lambda p: task.eval_step(p, batch(), extra={}))(started())
    value = {name: float(total / count) for name, (total, count) in found.items()}
    assert value["macs/gates"] == 0 and value["learners/block_0/mlp"] == 2 and "share" not in value
    assert task.count(value).macs < task.dense().count(value).macs


def test_labels_that_are_all_alike_are_warned_of_in_the_phase(tmp_path):
    changes = {"model.acm.phases.tau": 1e-6, "data.examples": 16, "data.valid_examples": 8}
    # A phase without steps is left out.
    changes |= {"model.acm.phases.distill_steps": 0}
    phases = Phases(config(**changes), lambda name, own, **given: train(own, tmp_path / name, progress=False, **given))
    dense = teacher()
    with pytest.warns(
        UserWarning, match=r"tau=1e-06 labels nearly every token of block_./.* alike .*2 learners: 1.000"
    ):
        gated = phases.gated(dense, phases.distilled(dense))
    result = phases.tuned(dense, gated)
    assert result.step == 2 and 0 < result.metrics["eval/share"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.acm.target": 1.5}, r"target budget must lie in \(0, 1\]"),
        ({"model.acm.target": 0.0}, r"target budget must lie in \(0, 1\]"),
        ({"model.acm.task": "seq2sec"}, "model.acm.task is 'seq2sec'; one of"),
        ({"model.acm.loss": "teacher"}, "model.acm.loss is 'teacher'; one of task, distillation"),
    ],
)
def test_settings_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(config(**changes))


def test_unknown_settings_are_named():
    with pytest.raises(
        ValueError, match=r"config\.model\.acm\.budgets_weight does not exist; did you mean budget_weight"
    ):
        acm_section(budgets_weight=1.0)
    with pytest.raises(ValueError, match=r"config\.model\.acm\.phases\.gate_step does not exist"):
        acm_section(phases=ConfigDict({"gate_step": 1}))


def test_a_distillation_loss_at_the_end_is_nought_for_the_teacher_itself():
    changes = {"loss": "distillation", "uniform": 4, "projections": False, "start": "dense"}
    task = tasks.build(config(**{f"model.acm.{name}": value for name, value in changes.items()}))
    model = task.inner.model.clone(activation="gelu_tanh")
    task = dataclasses.replace(task, inner=dataclasses.replace(task.inner, model=model))
    own = jax.tree.map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key == "bias" and path[-2].key == "out" else leaf, teacher()
    )
    task = dataclasses.replace(task, teacher=own)
    start = task.start(own, jax.random.key(0))
    loss = _jit(lambda p: task.loss(p, batch(), train=True, **options(task))[0])
    np.testing.assert_allclose(loss(start), 0.0, atol=1e-5)
    assert float(loss(jax.tree.map(lambda leaf: 1.1 * leaf, start))) > 1e-3
