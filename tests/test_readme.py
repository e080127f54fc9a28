# SPDX-License-Identifier: Apache-2.0
"""What the README shows is what the code does and what the result files say."""

import pathlib
import re

import jax.numpy as jnp
from etils import epath

from adaptive import registry
from adaptive.reduction import select
from experiments.studies import readme

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_its_tables_are_the_result_files():
    assert readme.render(TEXT, epath.Path(ROOT / "results")) == TEXT
    assert TEXT.count("<!-- table:") == 4


def test_its_examples_run():
    scope = {}
    exec(BLOCKS[0], scope)
    assert scope["merged"].features.shape == (2, 184, 64) and scope["restored"].shape == (2, 197, 64)
    # The smallest published shape stands for the one shown, which takes long to compile.
    exec(BLOCKS[1].replace("B/16", "Ti/16").replace("(8, 224", "(1, 224"), scope)
    assert scope["logits"].shape == (1, 1000) and scope["aux"]["tokens"][-1].tolist() == [41]


def test_its_example_of_an_imported_checkpoint_runs():
    scope = {"jnp": jnp}
    exec(BLOCKS[2].replace('"mrt5-small"', repr(str(ROOT / "tests/data/hf/mrt5_small"))), scope)
    assert scope["logits"].shape[:2] == (1, 1) and scope["generation"].tokens.shape == (1, 32)
    assert scope["aux"]["delete_gate"].shape == scope["ids"].shape


def test_its_example_of_a_new_method_is_complete(monkeypatch):
    monkeypatch.setattr(registry, "_RECORDS", dict(registry._RECORDS))
    scope = {"register": registry.register, "select": select, "jnp": jnp}
    exec(BLOCKS[3], scope)
    assert "norm_pruning" in registry.names("reduction")


def test_its_links_and_configs_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
    for config in set(re.findall(r"configs/\w+/\w+\.py", TEXT)):
        assert (ROOT / config).exists(), config
