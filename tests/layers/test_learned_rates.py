# SPDX-License-Identifier: Apache-2.0
"""Learned rates on a ViT: the masked form of training against the gathered form of inference."""

import functools

import jax
import numpy as np
import pytest

from adaptive.rates import proxy
from adaptive.rates.schedules import Schedule
from adaptive.reduction.diffrate import ORDERS
from layers.learned_rates import LearnedRates, as_reduce
from layers.vit import ViT

DENSE = ViT(4, 16, 4, 2, 32, num_classes=5, image_size=(16, 16), channels=1)
HOOKS = {order: LearnedRates(layers=4, patches=16, granularity=1, order=order) for order in ORDERS}
HOOK = HOOKS["cls_attention"]
X = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype(np.float32)
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


@functools.cache
def _params(model=DENSE):
    shapes = jax.tree.map(
        lambda leaf: leaf.unbox() if hasattr(leaf, "unbox") else leaf,
        jax.eval_shape(model.init, jax.random.key(0), X)["params"],
        is_leaf=lambda leaf: hasattr(leaf, "unbox"),
    )
    rng = np.random.default_rng(1)
    return jax.tree.map_with_path(
        lambda path, leaf: (path[-1].key == "scale") + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes
    )


@functools.cache
def _masked(model):
    return _jit(lambda params, logits, x: model.apply({"params": params | {"hooks_0": {"logits": logits}}}, x))


def _logits(prune, merge):
    """Logits that keep these numbers, the class token included, at layers 1, 2, 3."""
    logits = np.zeros((4, 2, 16), np.float32)
    for operation, numbers in ((proxy.PRUNE, prune), (proxy.MERGE, merge)):
        for layer, number in enumerate(numbers, start=1):
            logits[layer, operation, HOOK.choices.index(number - 1)] = 50.0
    return logits


def _both(prune, merge, pool="cls", order="cls_attention"):
    model = DENSE.clone(pool=pool, class_token=True)
    logits = _logits(prune, merge)
    training = _masked(model.clone(hooks=(HOOKS[order],)))(_params(model), logits, X)
    schedule = HOOK.schedule(logits)
    inference = _jit(model.clone(hooks=(as_reduce(schedule, order),)).apply)({"params": _params(model)}, X)
    return training, inference, schedule


PRUNED_AND_MERGED = ((14, 9, 6), (12, 8, 4))
SCHEDULES = [PRUNED_AND_MERGED, ((9, 9, 9), (17, 17, 17)), ((17, 17, 17), (13, 5, 2)), ((17, 4, 12), (15, 8, 3))]


@pytest.mark.parametrize(
    ("prune", "merge", "pool", "order"),
    [
        *((*numbers, pool, "cls_attention") for numbers in SCHEDULES for pool in ("cls", "mean")),
        *((*numbers, "cls", "density") for numbers in SCHEDULES),
        (*PRUNED_AND_MERGED, "mean", "density"),
    ],
)
def test_masks_give_the_logits_counts_and_masses_of_the_gathered_path(prune, merge, pool, order):
    (logits, aux), (want, gathered), schedule = _both(prune, merge, pool, order)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    np.testing.assert_array_equal(aux["tokens"], gathered["tokens"])
    np.testing.assert_array_equal(aux["tokens"][:, 0], schedule.counts)
    left = schedule.counts[-1]
    masked, plain = aux["token_set"], gathered["token_set"]
    assert plain.features.shape == (2, left, 16)
    np.testing.assert_array_equal(masked.keep.sum(-1), left)
    np.testing.assert_array_equal(masked.mass[:, :left], plain.mass)
    np.testing.assert_array_equal(masked.origin, plain.origin)
    np.testing.assert_allclose(masked.coords[:, :left], plain.coords, atol=1e-5)
    np.testing.assert_allclose(masked.features[:, :left], plain.features, atol=1e-4)
    np.testing.assert_array_equal(aux["reduction"].assign, gathered["reduction"].assign)
    np.testing.assert_allclose(aux["reduction"].matrix()[:, :left], gathered["reduction"].matrix(), atol=1e-6)


def test_rates_of_zero_are_the_dense_model():
    (logits, _), (exact, aux), schedule = _both((17, 17, 17), (17, 17, 17))
    dense, _ = _jit(DENSE.clone(class_token=True).apply)({"params": _params(DENSE.clone(class_token=True))}, X)
    assert schedule == Schedule((17,) * 4, (17,) * 4)
    np.testing.assert_array_equal(exact, dense)
    np.testing.assert_allclose(logits, dense, atol=1e-4)
    assert aux["reduction"] is None


def test_an_order_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="order='attention' is not one of"):
        LearnedRates(layers=4, patches=16, order="attention")


def test_rates_by_density_need_no_class_token():
    model = DENSE.clone(pool="mean", class_token=False)
    with pytest.raises(ValueError, match="reads 'cls_attention', but the model has no class token"):
        jax.eval_shape(model.clone(hooks=(HOOK,)).init, jax.random.key(0), X)
    hook = HOOKS["density"].clone(first=0)
    jax.eval_shape(model.clone(hooks=(hook,)).init, jax.random.key(0), X)
