# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of decoding in fewer layers: their rows, and what they imply."""

import json

import numpy as np
import pytest

from adaptive.depth import skip_decode
from experiments.bench import __main__ as bench

FLAGS = "--width=64 --vocabulary=32 --batch=2 --length=8 --max-length=6 --repeats=1"
ATTENTION, MLP, HEAD = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 14 * 64, 3 * 64 * 256, 64 * 32


def run(name, flags, folder):
    out = folder / f"{name}.jsonl"
    assert bench.main([name, *FLAGS.split(), *flags.split(), f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        assert row["name"] == name and row["shape"].startswith("2x8+6, ") and row["device"]
        assert row["realised"] > 0 and row["dtype"] == "float32"
    return rows


def implied(layers, ran):
    """Speedup of decoding when a token runs `ran` of `layers` layers on average."""
    return (layers * (ATTENTION + MLP) + HEAD) / (ran * (ATTENTION + MLP) + HEAD)


def test_a_schedule_implies_the_layers_that_it_leaves_out(tmp_path):
    skipping, even = run("skipdecode", "--depth=3 --speedup=1.5", tmp_path)
    counts = skip_decode.counts_for_speedup(3, 1.5, horizon=6)
    assert (skipping["method"], skipping["layers_a_token"]) == ("skipdecode", np.mean(counts))
    assert (even["method"], even["layers_a_token"]) == ("evenly_spaced", 2.0)
    assert skipping["implied"] == pytest.approx(implied(3, np.mean(counts)), abs=1e-4)


def test_routed_blocks_imply_the_tokens_that_they_ran_for(tmp_path):
    forward, decode = run("mod", "--depth=2 --share=0.25", tmp_path)
    assert (forward["part"], forward["tokens_a_layer"], decode["part"]) == ("forward", (8 + 2) / 2, "decode")
    ran = 2 * decode["tokens_a_layer"] / 6
    assert 1 <= ran < 2
    assert decode["implied"] == pytest.approx(implied(2, ran), abs=1e-2)


def test_rows_that_stop_early_imply_less_than_the_batch_runs(tmp_path):
    (row,) = run("calm", "--depth=2 --first=1 --every=1", tmp_path)
    assert 1 <= row["layers_a_token"] <= row["layers_a_step"] <= 2 and row["layers_a_token"] < 2
    assert row["implied"] == pytest.approx(implied(2, row["layers_a_token"]), abs=1e-2)


def test_a_window_implies_the_slots_that_it_does_not_read(tmp_path):
    out = tmp_path / "rows.jsonl"
    flags = (
        "--width=64 --depth=1 --vocabulary=32 --batch=1 --length=120 --max-length=8 --window=16,128 --sinks=1 --page=16"
    )
    assert bench.main(["sink_window", *flags.split(), "--repeats=1", f"--out={out}"]) == 0
    short, whole = (json.loads(line) for line in out.read_text().splitlines())
    # A page for the first token and two that the latest sixteen may lie in.
    assert short["listed_share"] == 48 / 128 and whole["listed_share"] == 1
    rest = 2 * 64 * 64 + 2 * 64 * 32 + MLP + HEAD
    assert short["implied"] == pytest.approx((rest + 2 * 128 * 64) / (rest + 2 * 48 * 64), abs=1e-4)
    assert whole["implied"] == 1 and short["realised"] > 0
