# SPDX-License-Identifier: Apache-2.0
"""Every kernel's benchmark prints rows with the promised keys, here at shapes small enough for a test."""

import json

import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import biased_flash_attention as biased
from pallas_kernels.biased_flash_attention import specs as biased_specs
from pallas_kernels.bipartite_match import specs as match_specs
from pallas_kernels.compact import specs as compact_specs
from pallas_kernels.merge import specs as merge_specs
from pallas_kernels.position_bias import PositionBias
from pallas_kernels.ragged_prefix_mlp import specs as staircase_specs
from pallas_kernels.sparse_decode_attention import specs as decode_specs

SMALL = {
    "biased_flash_attention": (
        biased_specs,
        biased_specs.Spec(2, 24, 4, 2, 8, causal=True, softmax="off_by_one", dtype="float32"),
        {"realised", "gradients_share", "statistics_share"},
        (),
    ),
    "bipartite_match": (match_specs, match_specs.Spec(2, 24, 8, "float32"), {"realised"}, ()),
    "merge": (merge_specs, merge_specs.Spec(2, 24, 20, 128, "float32"), {"realised", "copy_share"}, ()),
    "compact": (compact_specs, compact_specs.Spec(2, 24, 12, 128, "float32"), {"realised", "copy_share"}, ()),
    "ragged_prefix_mlp": (
        staircase_specs,
        staircase_specs.Spec(24, 16, 2, 32, "float32"),
        {"implied", "realised", "realised_gradient", "overhead"},
        ("--share=0.5",),
    ),
    "sparse_decode_attention": (
        decode_specs,
        decode_specs.Spec(2, 4, 2, 8, 6, 8, 3, "float32"),
        {"implied", "realised", "copy_share", "bandwidth_share"},
        (),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_kernel_benchmark_prints_the_promised_keys(name, monkeypatch, capsys):
    module, spec, keys, flags = SMALL[name]
    monkeypatch.setattr(module, "NAMED", {"small": spec})
    assert bench.main([name, "--spec=all", "--repeats=2", *flags]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"name", "spec", "shape", "device", "dtype", "implementation", "milliseconds"} | keys <= set(row)
    assert row["spec"] == "small" and all(row[key] > 0 for key in keys)
    assert all(median > 0 for _, median, _ in row["milliseconds"].values())


def test_biased_attention_is_timed_with_the_positions_of_its_shape(monkeypatch):
    spec = biased_specs.Spec(2, 24, 4, 2, 8, dtype="float32", buckets=8)
    assert biased.positions(biased_specs.Spec(2, 24, 4, 2, 8)) is None
    bias = biased.positions(spec)
    assert bias.shape == (2, 4, 24, 24) and bias.table.shape == (8, 4)
    # In order and with gaps.
    steps = np.diff(np.asarray(bias.query_positions), axis=1)
    assert steps.min() == 1 and steps.max() > 1
    given = []
    for name in ("biased_attention", "attention_column_stats"):
        op = getattr(biased, name)
        monkeypatch.setattr(
            biased, name, lambda *a, op=op, **options: given.append(options["bias"]) or op(*a, **options)
        )
    monkeypatch.setattr(biased_specs, "NAMED", {"positions": spec})
    assert bench.main(["biased_flash_attention", "--spec=positions", "--repeats=1"]) == 0
    assert len(given) == 4 and all(isinstance(one, PositionBias) for one in given)
