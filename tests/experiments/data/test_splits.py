# SPDX-License-Identifier: Apache-2.0
"""Files belong to one split, in the shares asked for, the same everywhere."""

import collections

import pytest
from etils import epath

from experiments.data import splits


def test_shares():
    counts = collections.Counter(splits.split_of(f"folder/file{i}.txt", 0.1) for i in range(5000))
    assert abs(counts["valid"] - 500) < 100 and abs(counts["test"] - 500) < 100
    assert sum(counts.values()) == 5000 and set(counts) == set(splits.SPLITS)


def test_a_larger_share_keeps_what_was_held_out():
    held = [i for i in range(500) if splits.split_of(str(i), 0.05) == "valid"]
    assert held and all(splits.split_of(str(i), 0.1) == "valid" for i in held)


def test_the_hash_never_changes():
    # Another value here would move files between training and test for everyone with a trained model.
    assert [splits.split_of(name, 0.3) for name in ("heapq.py", "io.py", "json/tool.py", "os.py")] == [
        "test",
        "valid",
        "train",
        "train",
    ]


@pytest.mark.parametrize("fraction", [0, 0.5, -1])
def test_fractions_out_of_range(fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        splits.check_fraction(fraction)


def test_unknown_split():
    with pytest.raises(ValueError, match=r"'dev'.*train, valid, test"):
        splits.check_split("dev")


def test_walk_is_sorted_and_leaves_hidden_files_out(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    root = epath.Path(tmp_path)
    assert [splits.relative_name(p, root) for p in splits.walk(root)] == ["a/b/c.txt", "a/z.txt", "b.txt"]
