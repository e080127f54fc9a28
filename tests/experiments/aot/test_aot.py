# SPDX-License-Identifier: Apache-2.0
"""Compiling for TPUs that are not there."""

import importlib.util
import json
import re
import subprocess
import sys

import jax
import pytest
from etils import epath

from experiments.aot import __main__ as aot
from experiments.aot import compiler, kernels

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is in libtpu, which is not installed"
)


def run(*arguments):
    """Rows of a call in a process of its own: libtpu reads its settings once."""
    command = [sys.executable, "-m", "experiments.aot", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_compiler
def test_a_kernels_schedule_is_read(tmp_path):
    rows = run("--kernel=bipartite_match", "--chips=v5e", f"--out={tmp_path}")
    assert json.loads((tmp_path / "bipartite_match.json").read_text()) == rows
    matched = 0
    for row in rows:
        (kernel,) = row["kernels"]
        assert row["kernel_calls"] == 1 and kernel["schedule_us"] > 0 and row["other_us"] >= 0
        if kernel["name"].startswith("bipartite_match"):
            (grid,) = kernel["regions"]
            assert grid["kind"] == "loop" and grid["trips"] > 1 and grid["matmul_slots"] > 0
            matched += 1
    assert matched


@needs_compiler
@pytest.mark.parametrize(
    ("config", "preset"),
    [
        pytest.param("configs/mrt5/continuation.py:gate=mrt5,runlocal", "dp", marks=pytest.mark.every_chip),
        pytest.param("configs/acm/text.py:runlocal", "dp", marks=pytest.mark.every_chip),
        ("configs/decoder/text.py:runlocal", "fsdp"),
    ],
)
def test_a_config_is_compiled_with_its_kernels_for_all_devices_of_a_machine(config, preset):
    overrides = ("--set", f"parallel.preset={preset}")
    training, evaluation = run(f"--config={config}", "--topology=v5e:2x2", *overrides)
    assert (training["devices"], training["part"], evaluation["part"]) == (4, "training step", "evaluation step")
    assert training["collectives"]["all-reduce"]["count"] > 0
    for row in (training, evaluation):
        assert row["kernel_calls"] > 0
        used = row["bytes_a_device"]
        assert used["all"] == sum(value for name, value in used.items() if name != "all") > 0


def test_every_kernel_has_cases_and_they_can_be_traced():
    for name, cases in kernels.KERNELS.items():
        found = list(cases("tpu"))
        assert len({(case.shape, case.part) for case in found}) == len(found) >= 2, name
        small = min(found, key=lambda case: sum(leaf.size for leaf in jax.tree.leaves(case.arguments)))
        jax.jit(small.function).trace(*small.arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--kernel=merge", "--chips=v5e,v7"), r"--chips=v5e,v7: \['v7'\] is not one of v4, v5e, v5p, v6e, h200"),
        (("--config=configs/tome/digits.py", "--topology=v9:2x2"), "unknown TPU generation 'v9' in topology 'v9:2x2'"),
        (("--config=configs/tome/digits.py", "--set", "steps"), "--set takes KEY=VALUE; got 'steps'"),
    ],
)
def test_what_it_cannot_do_is_said(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(compiler, "prepare", lambda dump: None)
    assert aot.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_rows_are_kept_as_they_come_in_place_of_older_ones_of_their_chips(tmp_path):
    path = epath.Path(tmp_path) / "merge.json"
    older = [{"shape": shape, "part": "merge", "chip": chip, "us": 1} for shape in "abx" for chip in ("v5e", "v6e")]
    path.write_text(json.dumps(older))
    made = [{"shape": shape, "part": "merge", "chip": "v5e", "us": 2} for shape in "ab"]

    def us():
        return {(row["shape"], row["chip"]): row["us"] for row in json.loads(path.read_text())}

    rows = aot.kept(iter(made), path, ("v5e",))
    assert next(rows) == made[0]
    # What is cut off here has lost nothing.
    assert us() == {(row["shape"], row["chip"]): 1 for row in older} | {("a", "v5e"): 2}
    assert list(rows) == made[1:]
    assert us() == {("a", "v5e"): 2, ("b", "v5e"): 2, ("a", "v6e"): 1, ("b", "v6e"): 1, ("x", "v6e"): 1}


def test_without_the_compiler_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert aot.main(["--kernel=merge"]) == 2
    assert "pip install libtpu" in capsys.readouterr().err
