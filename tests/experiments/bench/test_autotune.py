# SPDX-License-Identifier: Apache-2.0
"""Block sizes that are tried: which, on what arguments, and what is said of them."""

import json
import re

import jax
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import autotune
from pallas_kernels.sparse_decode_attention import specs, xla


@pytest.fixture
def small(monkeypatch):
    """Lists of 256 slots: blocks of 128 and of 256 of them make two programs, larger ones no other."""
    monkeypatch.setitem(specs.NAMED, "small", specs.Spec(2, 4, 2, 8, 40, 8, 32, "float32"))


def test_the_fastest_candidate_stands_beside_the_heuristics(small, tmp_path, capsys):
    out = tmp_path / "autotune.jsonl"
    flags = ["--op=sparse_decode_attention", "--spec=small", "--implementation=xla", "--repeats=2", f"--out={out}"]
    assert bench.main(["autotune", *flags]) == 0
    printed = capsys.readouterr()
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(printed.out) == row and "ETA" in printed.err
    assert (row["op"], row["spec"], row["implementation"]) == ("sparse_decode_attention", "small", "xla")
    assert row["constants"] == ["sparse_decode_attention.xla._SLOTS"] and row["heuristic"] == [xla._SLOTS] == [512]
    medians = {name: median for name, (_, median, _) in row["milliseconds"].items()}
    assert set(medians) == {"(512,)", "(128,)"} and row["refused"] == {}
    assert medians[str(tuple(row["found"]))] == min(medians.values())
    assert row["ratio"] == pytest.approx(medians["(512,)"] / min(medians.values()), rel=0.05)


def test_a_candidate_that_is_refused_is_listed_with_the_reason(small, monkeypatch):
    def refuse(*arguments):
        if xla._SLOTS == 128:
            raise NotImplementedError("too small")
        return arguments[0] * xla._SLOTS

    case = autotune.kernels.Case("small", "one query row", refuse, (jax.ShapeDtypeStruct((3,), "float32"),))
    monkeypatch.setitem(autotune.kernels.KERNELS, "sparse_decode_attention", lambda implementation: iter([case]))
    options = bench.argparse.Namespace(op="sparse_decode_attention", spec="", implementation="xla", repeats=1, out="x")
    (row,) = autotune.rows(options)
    assert row["refused"] == {"(128,)": "too small"}
    assert set(row["milliseconds"]) == {"(512,)", "(256,)", "(1024,)", "(2048,)"}
    assert xla._SLOTS == 512


@pytest.mark.parametrize("op", autotune.KNOBS)
def test_every_knob_is_there_and_its_values_fit(op):
    for knob in autotune.KNOBS[op].values():
        own = knob.own()
        assert all(len(values) == len(own) for values in knob.values)
        assert all(type(new) is type(old) for values in knob.values for new, old in zip(values, own, strict=True))
        with knob.set(knob.values[0]):
            assert knob.own() == knob.values[0]
        assert knob.own() == own


def test_integers_are_what_the_ops_allow():
    key = jax.random.key(0)
    spec = specs.Spec(2, 4, 2, 8, 40, 8, 32)
    pages = np.asarray(autotune.INTEGERS["sparse_decode_attention"](spec, (2, 2, 32), key))
    assert all(len(set(row)) == 32 and max(row) < 40 for row in pages.reshape(4, 32))
    stairs = autotune._SPECS["ragged_prefix_mlp"]["vit_base"]
    counts = np.asarray(autotune.INTEGERS["ragged_prefix_mlp"](stairs, (4,), key))
    assert counts[0] == stairs.rows and np.all(np.diff(counts) < 0) and counts[-1] > 0
    lists = autotune._SPECS["block_sparse_attention"]["llama_8b_topk"]
    blocks = np.asarray(autotune.INTEGERS["block_sparse_attention"](lists, (1, 8, 32, 8), key))
    lengths = np.asarray(autotune.INTEGERS["block_sparse_attention"](lists, (1, 8, 32), key))
    assert np.all((blocks >= 0) & (blocks < 32)) and lengths.min() == 1 and lengths.max() == 8
    # No list names a block that is later than its own.
    assert all(np.all(blocks[0, 0, row, : lengths[0, 0, row]] <= row) for row in range(32))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--op=merge", "--implementation=xla"],
            "merge has nothing to vary in implementation 'xla'; it has in gpu, tpu",
        ),
        (["--op=bipartite_match", "--spec=nix"], "bipartite_match has no shape nix; it has vit_large_197,"),
    ],
)
def test_wrong_names_are_errors(flags, message, capsys):
    assert bench.main(["autotune", *flags]) == 2
    assert re.search(message, capsys.readouterr().err)
