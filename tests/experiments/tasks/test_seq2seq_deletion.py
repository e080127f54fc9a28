# SPDX-License-Identifier: Apache-2.0
"""The deletion gate in the sequence-to-sequence task: its loss terms, its controller, its ablations and its metrics."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from adaptive.deletion import gate as deletion_gate
from adaptive.deletion import objective
from adaptive.deletion.controller import Controller
from configs.mrt5 import spans
from experiments import data, metrics, optim, parallel, tasks, train
from experiments.config import ConfigError
from experiments.rundir import apply_overrides

TINY = {
    "model.width": 16,
    "model.mlp_dim": 24,
    "model.head_dim": 8,
    "model.encoder_layers": 2,
    "model.gate_layer": 1,
    "data.inputs_length": 32,
    "model.rungs": (16, 32),
    "batch_size": 16,
}
QUICK = {"xla_backend_optimization_level": "0"}


def make_config(arg="gate=mrt5", **deletion):
    """The config of span corruption at its smallest; keyword arguments go to `model.deletion`."""
    config = apply_overrides(spans.get_config(f"runlocal,{arg}"), TINY)
    config.model.deletion.update(deletion)
    return config


def make_task(arg="gate=mrt5", **deletion):
    return tasks.build(make_config(arg, **deletion))


@functools.cache
def batch():
    """A batch whose last row is shorter than the others."""
    config = make_config()
    dataset = data.build(config.data, split="valid", batch_size=4, seed=0)
    found = {name: np.array(value) for name, value in next(iter(dataset.eval_batches(1))).items()}
    found["input_ids"][-1, 20:] = 0
    return found


@functools.cache
def params():
    """Parameters with a gate on both sides of its threshold and attention logits over 5."""
    found = meta.unbox(jax.jit(make_task().init)(jax.random.key(0), batch()))["params"]
    found = jax.tree.map_with_path(
        lambda path, leaf: 30 * leaf if "query" in jax.tree_util.keystr(path) else leaf, jax.tree.map(np.asarray, found)
    )
    logit = {"kernel": 4 * found["delete_gate"]["logit"]["kernel"], "bias": np.zeros(1, np.float32)}
    return found | {"delete_gate": found["delete_gate"] | {"logit": logit}}


def loss_of(task, alpha=0.0, step=0, seed=0):
    """`(loss, metrics)` with a controller at rest at `alpha`."""

    def run(params, batch):
        return task.loss(
            params,
            batch,
            rng=jax.random.key(seed),
            step=step,
            extra={"controller": Controller.create(alpha)},
            normalizers=task.normalizers(batch),
            train=True,
        )

    loss, found = jax.jit(run, compiler_options=QUICK)(params(), batch())
    return float(loss), metrics.compute(found)


@functools.cache
def gate_outputs():
    """What the model hands out of its gate for the batch."""
    apply = jax.jit(functools.partial(make_task().model.apply, deletion="soft"), compiler_options=QUICK)
    return apply({"params": params()}, batch()["input_ids"], None, batch()["decoder_input_ids"])[1]


# --- Loss terms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", objective.REGULARIZERS)
def test_the_loss_is_cross_entropy_plus_alpha_times_the_regulariser(name):
    loss, found = loss_of(make_task(regularizer=name), alpha=0.05)
    aux = gate_outputs()
    total, count = objective.regularizer(name)(aux["delete_gate"], aux["gate_logits"], aux["gate_tokens"])
    assert found["regularizer"] == pytest.approx(float(total / count), rel=1e-4)
    assert loss == pytest.approx(found["cross_entropy"] + 0.05 * float(total / count), rel=1e-5)
    assert found["gate"] == pytest.approx(float(np.mean(aux["delete_gate"][batch()["input_ids"] != 0])), rel=1e-4)


def test_entropy_terms_are_added_with_their_signs_and_without_alpha():
    loss, found = loss_of(make_task(entropy_each=0.3, entropy_mean=0.7), alpha=0.0)
    each, mean = objective.entropies(gate_outputs()["delete_gate"], gate_outputs()["gate_tokens"])
    want = 0.3 * float(each[0] / each[1]) - 0.7 * float(mean[0] / mean[1])
    assert abs(want) > 0.01
    assert loss == pytest.approx(found["cross_entropy"] + want, rel=1e-5)


def test_the_score_excess_is_added_with_its_weight_also_to_a_dense_model():
    loss, found = loss_of(make_task(score_weight=0.5))
    assert found["score_excess"] > 0.01
    assert loss == pytest.approx(found["cross_entropy"] + 0.5 * found["score_excess"], rel=1e-5)
    dense, dense_found = loss_of(make_task(score_weight=0.5, train=""))
    assert dense == pytest.approx(dense_found["cross_entropy"] + 0.5 * dense_found["score_excess"], rel=1e-5)
    assert "score_excess" not in loss_of(make_task())[1]


def test_before_the_delay_the_gate_is_free_and_the_controller_rests():
    task = make_task(delay=3, entropy_each=0.3)
    early, early_found = loss_of(task, alpha=0.05, step=2)
    late, late_found = loss_of(task, alpha=0.05, step=3)
    assert early == pytest.approx(early_found["cross_entropy"], rel=1e-6) and early_found["gate_alpha"] == 0
    assert abs(late - late_found["cross_entropy"]) > 0.1 and late_found["gate_alpha"] == pytest.approx(0.05)
    extra, share = task.init_extra(), {"deleted": (jnp.float32(1), jnp.float32(10))}
    assert float(task.update_extra(extra, share, jnp.int32(2))["controller"].alpha) == 0
    assert float(task.update_extra(extra, share, jnp.int32(3))["controller"].alpha) > 0


@pytest.mark.parametrize(
    "deletion",
    [
        dict(regularizer="gate_variance", entropy_each=0.1, entropy_mean=0.2, score_weight=0.5),
        dict(regularizer="clamped_logits_mean", score_weight=0.5, train=""),
    ],
)
def test_accumulated_gradients_are_exact_for_every_term(deletion):
    task = make_task(**deletion)
    state = optim.TrainState(
        jnp.int32(5),
        params(),
        None,
        None,
        {"controller": Controller.create(0.05)},
        jax.random.key_data(jax.random.key(1)),
    )
    mesh = parallel.make_mesh("none")

    def run(accumulate):
        step = functools.partial(optim.accumulated_gradients, task, mesh=mesh, accumulate=accumulate)
        with parallel.on_mesh(mesh):
            return jax.jit(step, compiler_options=QUICK)(state, batch())

    (whole, whole_metrics), gradient = run(1)
    (parts, parts_metrics), parts_gradient = run(2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    for name, value in metrics.compute(whole_metrics).items():
        assert metrics.compute(parts_metrics)[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for (path, got), want in zip(jax.tree.leaves_with_path(parts_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# --- Controller ---------------------------------------------------------------------------------------------------


def update(task, deleted=0.1, alpha=0.0):
    share = {"deleted": (jnp.float32(deleted * 40), jnp.float32(40))}
    return task.update_extra({"controller": Controller.create(alpha)}, share, jnp.int32(0))["controller"]


def test_the_controller_moves_by_the_share_deleted_once_a_step_or_once_a_microbatch():
    task = dataclasses.replace(make_task(kp=0.4, ki=1e-3), microbatches=4)
    want = Controller.create().update(0.1, target=0.5, kp=0.4, ki=1e-3)
    np.testing.assert_allclose(update(task).alpha, want.alpha, rtol=1e-6)
    each = dataclasses.replace(task, deletion=dataclasses.replace(task.deletion, per="microbatch"))
    for _ in range(3):
        want = want.update(0.1, target=0.5, kp=0.4, ki=1e-3)
    np.testing.assert_allclose(update(each).alpha, want.alpha, rtol=1e-5)
    assert tasks.build(apply_overrides(make_config(), {"accumulate": 2})).microbatches == 2


def test_a_fixed_alpha_stays_and_a_limit_reaches_the_controller():
    fixed = make_task(controller=False, alpha=0.02)
    assert float(fixed.init_extra()["controller"].alpha) == pytest.approx(0.02)
    assert float(update(fixed, alpha=0.02).alpha) == pytest.approx(0.02)
    assert float(update(make_task(ki=1.0, windup_limit=0.01)).integral) == pytest.approx(0.01)
    assert float(update(make_task(ki=1.0)).integral) == pytest.approx(0.4)
    assert float(update(make_task(), deleted=0.9).alpha) == 0
    assert float(update(make_task(floor=-0.01), deleted=0.9).alpha) == pytest.approx(-0.01)


# --- Hard deletion in training ------------------------------------------------------------------------------------


def test_the_dense_task_of_a_gate_that_meets_hard_batches_keeps_every_byte():
    dense = make_task(hard_probability=0.5).dense()
    assert (dense.deletion.train, dense.deletion.evaluate, dense.deletion.hard_probability) == ("", "", 0.0)


def test_soft_training_with_probability_1_scores_as_hard_training():
    soft, hard = loss_of(make_task())[1], loss_of(make_task(train="hard"))[1]
    masked = loss_of(make_task(hard_probability=1.0))[1]
    assert abs(soft["cross_entropy"] - hard["cross_entropy"]) > 1e-3
    assert masked["cross_entropy"] == pytest.approx(hard["cross_entropy"], abs=1e-4)
    assert masked["deleted"] == soft["deleted"] and masked["gate"] == pytest.approx(soft["gate"], rel=1e-5)


# --- Evaluation ---------------------------------------------------------------------------------------------------


def evaluate(task, **changes):
    step = jax.jit(lambda params, batch: task.eval_step(params, batch, extra={}), compiler_options=QUICK)
    return metrics.compute(step(params(), batch() | changes))


@pytest.mark.parametrize("mode", ["soft", "hard"])
def test_evaluation_says_how_the_gate_decides_and_what_it_deletes(mode):
    found = evaluate(make_task(evaluate=mode, by_class=True))
    aux, real = gate_outputs(), batch()["input_ids"] != 0
    kept = np.asarray(aux["kept"])
    for name, pair in deletion_gate.saturation(aux["delete_gate"], aux["gate_tokens"]).items():
        assert found[name] == pytest.approx(float(pair[0] / pair[1]), rel=1e-3, abs=1e-5)
    letters = np.vectorize(lambda token: token >= 3 and chr(token - 3).isalpha() and token < 131)(batch()["input_ids"])
    assert 0 < kept[letters].mean() < 1
    assert found["deleted/letter"] == pytest.approx(1 - kept[letters].mean(), abs=1e-6)
    if mode == "hard":
        assert found["kept"] == pytest.approx(kept.sum() / real.sum(), abs=1e-6)


def test_examples_of_weight_0_count_nowhere_in_the_evaluation():
    task = make_task(by_class=True)
    weight = np.array([1, 1, 0, 1], np.float32)
    other = batch()["input_ids"].copy()
    other[2] = other[0][::-1]
    first, second = evaluate(task, weight=weight), evaluate(task, weight=weight, input_ids=other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    assert evaluate(task)["gate_entropy"] != pytest.approx(first["gate_entropy"], rel=1e-4)


def test_only_a_learned_gate_has_an_entropy_and_only_a_gate_in_use_has_classes():
    drawn = jax.eval_shape(
        lambda params: make_task("gate=fixed_deletion", by_class=True).eval_step(params, batch(), extra={}), params()
    )
    assert "deleted/letter" in drawn and "gate_entropy" not in drawn
    unused = jax.eval_shape(
        lambda params: make_task(evaluate="", by_class=True).eval_step(params, batch(), extra={}), params()
    )
    assert set(unused) == {"cross_entropy", "bits_per_byte", "kept", "token_accuracy", "sequence_accuracy"}


# --- Ablations through the training loop --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        {
            "model.softmax": "standard",
            "model.gate_layer": 2,  # the last one
            "model.gate_hyper.gumbel": True,
            "model.gate_hyper.scale": -10.0,
            "model.deletion.hard_probability": 0.5,
            "model.deletion.regularizer": "clamped_logits_mean",
            "model.deletion.entropy_each": 0.01,
            "model.deletion.by_class": True,
        },
        {
            "model.gate_layer": 1,
            "model.deletion.regularizer": "gate_variance",
            "model.deletion.score_weight": 0.5,
            "model.deletion.per": "microbatch",
            "model.deletion.windup_limit": 0.1,
            "accumulate": 2,
            "dtype": "bfloat16",
        },
        {
            "model.deletion.regularizer": "logits_mean",
            "model.deletion.controller": False,
            "model.deletion.alpha": 0.01,
            "model.deletion.delay": 1,
        },
    ],
    ids=["standard softmax, last layer, noise, scale -10, hard batches", "score loss, microbatches", "fixed alpha"],
)
def test_ablations_train_and_evaluate(overrides, tmp_path):
    config = apply_overrides(make_config(), overrides)
    result = train.train(config, tmp_path / "run", progress=False)
    assert result.step == 2
    own = {name: value for name, value in result.metrics.items() if name.startswith(("train/", "eval/"))}
    absent = {name for name, value in own.items() if math.isnan(value)}
    # A class of which a few rows hold no byte has no share.
    assert all(name.startswith("eval/deleted/") for name in absent)
    assert "eval/gate_entropy" in own and "train/regularizer" in own
    assert ("eval/deleted/letter" in own) == ("model.deletion.by_class" in overrides)
    if overrides.get("model.deletion.alpha"):
        assert own["train/gate_alpha"] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("deletion.target", 1.0, r"config.model.deletion.target is 1.0; a share must lie in \(0, 1\)"),
        (
            "deletion.regularizer",
            "gate_median",
            r"deletion.regularizer is 'gate_median'; one of 'gate_mean', 'clamped_",
        ),
        ("deletion.per", "epoch", r"deletion.per is 'epoch'; one of 'step', 'microbatch'"),
        ("deletion.train", "medium", r"deletion.train is 'medium'; one of 'soft', 'hard', ''"),
        ("deletion.alpha", -0.1, r"deletion.alpha is -0.1; it must be 0 or above"),
        ("deletion.floor", 0.1, r"deletion.floor is 0.1; the least alpha is 0 or below"),
        ("deletion.score_weight", -1.0, r"deletion.score_weight is -1.0; it must be 0 or above"),
        ("deletion.hard_probability", 2.0, r"hard_probability is 2.0; a probability lies in \[0, 1\]"),
        ("deletion.regulariser", "gate_mean", r"model.deletion.regulariser does not exist; did you mean regularizer"),
        ("hard_probability", 0.5, r"config.model.hard_probability does not exist"),
        ("gate_layer", 3, r"gate_layer must lie in 1..2 \(the encoder\); got 3"),
        ("gate_layer", 0, r"gate_layer must lie in 1..2 \(the encoder\); got 0"),
        ("softmax", "off_by_two", r"softmax='off_by_two' is not one of"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(section, value, message, tmp_path):
    config = make_config()
    *path, name = section.split(".")
    target = functools.reduce(getattr, path, config.model)
    with config.unlocked():
        target[name] = value
    with pytest.raises((ConfigError, ValueError), match=message):
        train.train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_hard_batches_need_soft_training():
    with pytest.raises(ValueError, match=r"makes some soft batches hard; set train='soft' \(got 'hard'\)"):
        make_task(train="hard", hard_probability=0.5)
