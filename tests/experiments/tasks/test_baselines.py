# SPDX-License-Identifier: Apache-2.0
"""What ACM is compared with, as tasks: experts cut from a trained layer, switched channels, early exits, halting tokens."""

import functools

import jax
import numpy as np
import pytest
from flax.core import meta

from adaptive import flops
from experiments.tasks.classification import Classification
from experiments.tasks.depth import EarlyExit, Halting
from experiments.tasks.language_modelling import LanguageModelling
from experiments.tasks.token_exits import TokenExit
from experiments.tasks.width import DynamicWidth, Grouped, RouterTraining, moefy, with_routers
from layers.decoder_lm import DecoderLM
from layers.experts import DynamicParts, ExpertParts
from layers.vit import ViT
from layers.vit_depth import ExitViT, HaltingViT

SIZES = dict(patch_size=4, width=8, depth=2, heads=2, mlp_dim=16, num_classes=3, image_size=(8, 8), channels=1)
VIT = ViT(**SIZES, activation="relu")
EXIT, HALTING = ExitViT(**SIZES), HaltingViT(**SIZES, halt_scale=3.0, halt_center=2.0, target_depth=1.0)
BATCH = {
    "image": np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32),
    "label": np.arange(6, dtype=np.int32) % 3,
    "weight": np.array([1, 1, 1, 1, 1, 0], np.float32),
}
IDS = np.random.default_rng(1).integers(1, 20, (3, 7)).astype(np.int32)
TEXT = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:], "weight": np.ones(3, np.float32)}
LANGUAGE = DecoderLM(20, 8, 2, 2, 16, kv_heads=1)
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def drawn(task, batch=BATCH):
    shapes = meta.unbox(jax.eval_shape(task.init, jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(2)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.4 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def dense():
    return drawn(Classification(VIT))


def evaluated(task, params, batch=BATCH):
    found = _jit(lambda p: task.eval_step(p, batch, extra=task.init_extra()))(params)
    return {name: float(total / count) for name, (total, count) in found.items()}


@functools.cache
def evaluated_dense():
    return evaluated(Classification(VIT), dense())


def loss_of(task):
    """`(params, step) -> (loss, metrics)` of the task, nothing drawn."""
    options = dict(rng=jax.random.key(0), normalizers=task.normalizers(BATCH), train=False)
    return lambda params, step=0: task.loss(params, BATCH, step=step, extra=task.init_extra(), **options)


@functools.cache
def experts():
    task = RouterTraining(VIT.clone(parts=ExpertParts(groups=4, router_hidden=3)))
    return task, moefy(dense(), task, jax.random.key(0), BATCH)


@pytest.mark.parametrize("number", [2, 4])
def test_clusters_of_all_neurons_are_the_model_and_fewer_cost_their_share(number):
    parts = ExpertParts(groups=4, router_hidden=3, hyper=(("experts", number),))
    task, params = Grouped(VIT.clone(parts=parts)), experts()[1]
    found = evaluated(task, params)
    assert found["share"] == number / 4 and task.dense() == Classification(VIT)
    same = abs(found["cross_entropy"] - evaluated_dense()["cross_entropy"]) < 1e-4
    assert same == (number == 4)
    whole, tokens = flops.count(VIT).blocks, VIT.num_tokens
    routers = 2 * tokens * 3 * (8 + 4)
    assert task.count(found).macs == sum(whole.values()) - (1 - number / 4) * whole["mlp"] + routers


def test_routers_learn_from_activations_and_nothing_else_moves():
    task, params = experts()
    (loss, metrics), gradients = _jit(jax.value_and_grad(loss_of(task), has_aux=True))(params)
    np.testing.assert_allclose(loss, metrics["router"][0] / metrics["router"][1], rtol=1e-6)
    moved = {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
        if np.any(leaf)
    }
    routers = ("first/kernel", "second/kernel")
    assert moved == {f"block_{layer}/mlp/router/{name}" for layer in range(2) for name in routers}


def test_switches_start_with_all_on_and_pay_for_their_distance_from_the_target():
    task = DynamicWidth(VIT.clone(parts=DynamicParts(groups=4)), target=0.25, warmup=10)
    params = with_routers(dense(), task, jax.random.key(0), BATCH)
    loss = _jit(loss_of(task))
    for step, distance in ((0, 0.0), (5, 0.375), (20, 0.75)):
        value, metrics = loss(params, step)
        assert float(metrics["share"][0] / metrics["share"][1]) == 1
        # With all on it is the dense model: all examples count in training.
        total, count = metrics["cross_entropy"]
        assert float(value - total / count) == pytest.approx(2 * distance**2, abs=1e-5)
    assert evaluated(task, params) == pytest.approx(evaluated_dense() | {"share": 1.0}, rel=1e-5)


def test_images_leave_at_the_first_confident_exit():
    params = drawn(EarlyExit(EXIT))
    logits = np.asarray(_jit(lambda p: EarlyExit(EXIT).logits(p, BATCH["image"]))(params))
    each = -np.asarray(jax.nn.log_softmax(logits))[np.arange(5), :, BATCH["label"][:5]].mean(axis=0)
    for threshold, exit_taken in ((0.0, 0), (1.0, 1)):
        task = EarlyExit(EXIT, threshold=threshold)
        found = evaluated(task, params)
        assert found[f"exit/{exit_taken}"] == 1
        assert task.count(found).macs == EXIT.exit_macs()[exit_taken]
        assert found["cross_entropy"] == pytest.approx(each[exit_taken], rel=1e-4)
    # Without leaving, heads are not paid for.
    assert task.dense().count({}).macs == flops.count(EXIT).macs


def test_ponder_and_depth_losses_have_their_weights_and_halted_tokens_cost_nothing():
    task = Halting(HALTING, ponder_weight=0.3, depth_weight=0.7)
    params = drawn(task)
    loss, metrics = _jit(loss_of(task))(params)
    value = {name: float(total / count) for name, (total, count) in metrics.items()}
    ponder, depth = (float(metrics[name][0]) / 6 for name in ("ponder", "depth"))
    assert float(loss) == pytest.approx(value["cross_entropy"] + 0.3 * ponder + 0.7 * depth, rel=1e-5)
    found, whole = evaluated(task, params), task.dense().count({}).macs
    assert task.count(found).macs < whole
    assert task.count({"running/0": VIT.num_tokens, "running/1": VIT.num_tokens}).macs == whole


def test_bytes_stop_at_the_first_confident_layer():
    params = drawn(TokenExit(LANGUAGE, 6), TEXT)
    found = {}
    for threshold, layers in ((0.0, 1), (2.0, 2)):
        task = TokenExit(LANGUAGE, 6, threshold=threshold)
        found[layers] = evaluated(task, params, TEXT)
        assert found[layers]["layers"] == layers
    plain = evaluated(LanguageModelling(LANGUAGE, 6), params, TEXT)
    assert found[2]["cross_entropy"] == pytest.approx(plain["cross_entropy"], rel=1e-5)
    assert found[1]["cross_entropy"] != pytest.approx(plain["cross_entropy"], rel=1e-2)
    head, whole = 6 * 8 * 20, flops.count(LANGUAGE, tokens=6).macs
    assert TokenExit(LANGUAGE, 6).count(found[1]).macs == (whole - head) / 2 + head
    # A head after every layer, even where all are run.
    assert TokenExit(LANGUAGE, 6).count(found[2]).macs == whole + head
