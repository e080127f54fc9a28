# SPDX-License-Identifier: Apache-2.0
"""Models of every family on 8 fake devices: the losses of one device, and no collective that an adaptive method causes."""

import collections
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests.experiments.sharded_models import CASES

ROOT = pathlib.Path(__file__).parents[2]
# All programs of all cases are compiled for eight devices before the first test.
pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
# Adaptive case -> the dense one that it is compared with.
TWINS = {
    "vit-tome": "vit",
    "vit-evit": "vit",
    "vit-random": "vit",
    "lm-mod": "lm",
    "t5-mrt5": "t5",
    "t5-random": "t5",
    "t5-words": "t5",
}
SHARDED = [(case, preset) for case, (*_, presets) in CASES.items() for preset in presets if preset != "none"]
# Metrics and the controller add scalars; the gate's own three parameters have gradients and may be gathered.
SCALAR, GATE, BYTE_TABLE, BIAS_TABLE = 1, 32, 384 * 32, 32 * 2
# Router and predictor of a routed block have gradients and are gathered.
PREDICTOR = 32 * 16


@pytest.fixture(scope="module")
def runs():
    script = pathlib.Path(__file__).with_name("sharded_models.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=1400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def sent(rows):
    """How often each kind of collective sends arrays of each size, scalars aside."""
    sizes = ((kind, math.prod(shape)) for kind, shape in rows)
    return collections.Counter(entry for entry in sizes if entry[1] > SCALAR)


@pytest.mark.parametrize(("case", "preset"), SHARDED)
def test_losses_and_metrics_are_those_of_one_device(runs, case, preset):
    one, many = runs[case]["none"], runs[case][preset]
    assert (one["devices"], many["devices"]) == (1, 8)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert many["evaluation"] == pytest.approx(one["evaluation"], rel=1e-5)


@pytest.mark.parametrize(("case", "preset"), [(c, p) for c, p in SHARDED if c in TWINS])
@pytest.mark.parametrize("step", ["train", "eval"])
def test_an_adaptive_method_causes_no_collective(runs, case, preset, step):
    own = sent(runs[case][preset][step]) - sent(runs[TWINS[case]][preset][step])
    if case == "t5-mrt5":
        own = collections.Counter({entry: n for entry, n in own.items() if entry[1] > GATE})
    if case == "lm-mod":
        own = collections.Counter({entry: n for entry, n in own.items() if entry[1] > PREDICTOR})
    if (case, step) == ("t5-words", "train"):
        # The table of relative positions is read again for the chunks, which has a gradient of its own.
        own -= collections.Counter({("all-reduce", BIAS_TABLE): 1})
    if (preset, step) == ("fsdp", "eval") and case in ("t5-mrt5", "t5-words"):
        # Each device runs its own ladder on whole parameters, so the byte table is gathered once, where the dense model's
        # automatic sharding exchanges looked-up rows instead: a parameter for activations, and no activation of ours.
        own -= collections.Counter({("all-gather", BYTE_TABLE): 1})
        assert not any(kind == "all-to-all" for kind, _ in sent(runs[case][preset][step]))
    assert not own


def test_each_device_sorts_its_own_rows_by_their_learners(runs):
    assert not sent(runs["lm-acm"]["dp"]["eval"])


@pytest.mark.parametrize("case", ["vit", "t5", "lm-acm"])
def test_fsdp_gathers_parameters_and_moves_no_activations(runs, case):
    """The largest gathered array is a parameter: 32 wide by at most 384 (the byte table) or 16 x 128 (patches)."""
    assert max(size for _, size in sent(runs[case]["fsdp"]["eval"])) <= BYTE_TABLE
