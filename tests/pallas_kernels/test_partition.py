# SPDX-License-Identifier: Apache-2.0
"""Kernels over several devices: each runs its own rows of the batch, and gradients of what all share are added up."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_values_and_gradients_are_those_of_one_device():
    script = pathlib.Path(__file__).with_name("on_devices.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 5
    for case, distances in found.items():
        assert all(value < 1e-4 for value in distances.values()), (case, distances)
