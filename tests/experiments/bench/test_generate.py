# SPDX-License-Identifier: Apache-2.0
"""The benchmark of generation: its rows, and what they imply."""

import json

import pytest

from experiments.bench import __main__ as bench
from layers.t5 import SHAPES

TINY = dict(encoder_layers=2, decoder_layers=1, width=16, mlp_dim=8, heads=2)
INNER = 2 * 64


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", TINY)
        flags = "--variant=tiny --length=32 --max-length=4 --deleted=0.5 --gate-layer=1 --rungs=1 --repeats=1"
        assert bench.main(["generate", *flags.split(), f"--out={out}"]) == 0
    return {row["part"]: row for row in map(json.loads, out.read_text().splitlines())}


def test_rows_have_what_every_benchmark_reports(rows):
    assert list(rows) == ["cached", "decode", "generate"]
    for row in rows.values():
        assert row["name"] == "generate" and row["shape"].startswith("tiny 2x32+4, ")
        assert row["device"] and row["dtype"] == "float32" and row["implied"] > 1 and row["realised"] > 0
        assert all(rate > 0 for rate in row["tokens_per_second"].values())


def test_a_loop_without_a_cache_scores_everything_at_every_step(rows):
    assert rows["cached"]["implied"] == 4.0


def test_speedups_are_implied_by_the_bytes_that_are_left(rows):
    kept = sum(rows["decode"]["kept"]) / 2
    assert rows["decode"]["kept"] == rows["generate"]["kept"] and 10 < kept < 22

    def decoding(encoded):
        step = 4 * 16 * INNER + 2 * 4 * INNER + 2 * 16 * INNER + 2 * encoded * INNER + 3 * 16 * 8 + 16 * 384
        return 2 * encoded * 16 * INNER + 4 * step

    def encoding(left):
        return sum(4 * n * 16 * INNER + 2 * n * n * INNER + 3 * n * 16 * 8 for n in (32, left))

    assert rows["decode"]["implied"] == pytest.approx(decoding(32) / decoding(kept), abs=1e-4)
    whole = [encoding(left) + decoding(left) for left in (32, kept)]
    assert rows["generate"]["implied"] == pytest.approx(whole[0] / whole[1], abs=1e-4)
