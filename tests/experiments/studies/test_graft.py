# SPDX-License-Identifier: Apache-2.0
"""Parameters carried over from a trained model to one with another method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from experiments import tasks
from experiments.config import load
from experiments.studies.graft import graft

CONFIG = "configs/mrt5/continuation.py:gate={},runlocal"


def test_trained_parameters_stay_and_missing_ones_are_made():
    task, ids = tasks.build(load(CONFIG.format("no_deletion"))), np.full((2, 16), 5, np.int32)
    variables = task.init(jax.random.key(1), {"input_ids": ids, "decoder_input_ids": ids})
    trained = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 7.0), meta.unbox(variables)["params"])
    found = graft(load(CONFIG.format("mrt5")), trained)
    assert set(found) == {*trained, "delete_gate"}
    assert all(np.all(np.asarray(leaf) == 7.0) for name in trained for leaf in jax.tree.leaves(found[name]))
    assert not np.any(np.asarray(found["delete_gate"]["logit"]["kernel"]) == 7.0)
    wide = load(CONFIG.format("mrt5"), {"model.width": 48})
    with pytest.raises(ValueError, match=r"is \(.*32.*\) in the trained model, \(.*48.*\) here"):
        graft(wide, trained)
