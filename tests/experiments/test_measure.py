# SPDX-License-Identifier: Apache-2.0
"""Timing runs functions in turn and reports medians; benchmarks print rows with the promised keys."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import measure
from experiments.bench import __main__ as bench


def test_functions_run_in_turn_after_a_warm_up():
    calls = []

    def function(name):
        return lambda: (calls.append(name), jnp.zeros(()))[1]

    times = measure.interleaved({"a": function("a"), "b": function("b")}, repeats=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert times["a"].repeats == 3 and times["a"].low <= times["a"].median <= times["a"].high


def test_repeats_must_be_positive():
    with pytest.raises(ValueError, match="at least 1"):
        measure.interleaved({}, repeats=0)


def test_random_like_has_shapes_dtypes_and_spread():
    tree = {"a": jax.ShapeDtypeStruct((200, 50), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    drawn = measure.random_like(tree, jax.random.key(0))
    assert drawn["b"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.std(drawn["a"]), 0.02, rtol=0.05)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tome", "--variant=Ti/16", "--image-size=64", "--batch=2", "--r=1", "--repeats=1"],
        ["tome", "--variant=Ti/16", "--image-size=64", "--batch=2", "--r=1", "--repeats=1", "--method=evit"],
        ["diffrate", "--variant=Ti/16", "--image-size=64", "--batch=2", "--repeats=1"],
        ["block_sparse_attention", "--length=64", "--block=16", "--width=8", "--density=0.5", "--repeats=1"],
    ],
)
def test_a_benchmark_prints_the_promised_keys(arguments, capsys, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert bench.main([*arguments, f"--out={out}"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"name", "shape", "device", "dtype", "implied", "realised", "overhead"} <= set(row)
    assert row["implied"] > 1 and row["realised"] > 0 and row["overhead"] > 0
    assert json.loads(out.read_text()) == row


def test_a_benchmark_must_be_named(capsys):
    assert bench.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert "mrt5" in listed and "block_sparse_attention" in listed
    with pytest.raises(SystemExit):
        bench.main([])
