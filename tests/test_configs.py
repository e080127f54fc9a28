# SPDX-License-Identifier: Apache-2.0
"""Every config trains two steps at `runlocal` size; its resolved values are golden."""

import json
import os
import pathlib

import flax.linen as nn
import jax
import pytest
from flax.core import meta
from ml_collections import ConfigDict

from experiments import config as config_lib
from experiments import data, tasks, train
from experiments.rundir import plain
from tests.experiments import tiny_data

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"
DATA = pathlib.Path(os.environ.get("ADAPTIVE_DATA_DIR", ROOT.parent / "shared" / "data"))
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").glob("*/*.py"))


def load(name: str, arg: str | None = None) -> ConfigDict:
    return config_lib.load(str(ROOT / name) + (f":{arg}" if arg else ""))


@pytest.mark.parametrize("name", FILES)
def test_the_resolved_config_is_the_golden_one(name):
    """A changed default is a visible change: renew with `python tests/test_configs.py`."""
    want = json.loads((GOLDEN / (name.removeprefix("configs/").replace("/", "_")[:-3] + ".json")).read_text())
    assert plain(load(name)) == want


def with_data(config: ConfigDict, folder: pathlib.Path) -> ConfigDict:
    """The config with data in place of those that nobody can be expected to have; skips the test where that cannot be."""
    section = config.data
    if section.source == "tfds_images":
        if not (DATA / "tfds").exists():
            pytest.skip("needs the CIFAR-10 folder: set ADAPTIVE_DATA_DIR to a folder that holds tfds/cifar10")
        section.data_dir = str(DATA / "tfds")
        section.name = "cifar10"
    if section.source == "pairs":
        section.data_dir = tiny_data.write_pairs(folder)
        section.name = {"xnli": "tiny_xnli", "tydi_qa": "tiny_tydi"}[section.pairs]
        section.eval_languages = {"xnli": tiny_data.NLI_LANGUAGES, "tydi_qa": ("ar", "en", "ko")}[section.pairs]
        if section.pairs == "xnli":
            section.train_name = "tiny_multi_nli"
    if section.get("text") == "languages":
        section.path = tiny_data.write_languages(folder)
    return config


@pytest.mark.parametrize("name", FILES)
def test_it_runs_two_steps_at_runlocal_size(name, tmp_path):
    (tmp_path / "data").mkdir()
    config = with_data(load(name, "runlocal"), tmp_path / "data")
    result = train.train(config, tmp_path / "run", progress=False)
    assert result.step == 2
    assert all(value == value for key, value in result.metrics.items() if key.startswith("eval/"))


@pytest.mark.parametrize("name", FILES)
def test_no_parameter_has_two_axes_of_one_name(name, tmp_path):
    """Flax refuses such names as soon as there is a mesh."""
    config = with_data(load(name, "runlocal"), tmp_path)
    dataset = data.build(config.data, split="train", batch_size=2, seed=0)
    params = jax.eval_shape(tasks.build(config).init, jax.random.key(0), dataset.spec)["params"]
    for path, spec in jax.tree_util.tree_leaves_with_path(nn.get_partition_spec(params)):
        named = [axis for axis in spec if axis is not None]
        assert len(set(named)) == len(named), (jax.tree_util.keystr(path), spec)


@pytest.mark.parametrize(
    ("name", "arg", "metric"),
    [
        ("configs/mrt5/diagnostics.py", "task=sequence_merge,gate=mrt5,full", "sequence_accuracy"),
        ("configs/mrt5/characters.py", "task=word_search,gate=mrt5", "kept/oov_overlap"),
        ("configs/mrt5/languages.py", "objective=next_byte,gate=random_deletion,include=*_ud.*", "bits_per_byte/zh"),
        ("configs/mrt5/xnli.py", "gate=mrt5", "token_accuracy/ur"),
        ("configs/mrt5/tydiqa.py", "gate=fixed_deletion", "cross_entropy/ko"),
    ],
)
def test_full_sizes_can_be_evaluated(name, arg, metric, tmp_path):
    """Shapes of ladder, lengths and layers agree; traced, not run."""
    config = with_data(load(name, arg), tmp_path)
    task = tasks.build(config)
    batch = next(data.build(config.data, split="valid", batch_size=2, seed=0).eval_batches(1))
    params = jax.eval_shape(lambda: meta.unbox(task.init(jax.random.key(0), batch)["params"]))
    found = jax.eval_shape(lambda p: task.eval_step(p, batch, extra={}), params)
    assert metric in found and batch["input_ids"].shape == (2, task.inputs_length)
    assert batch["labels"].shape == (2, task.targets_length)


@pytest.mark.parametrize("name", FILES)
def test_the_docstring_is_a_receipt(name):
    text = (ROOT / name).read_text()
    assert f"--config={name}" in text and "--workdir=" in text
    assert len(text.splitlines()) <= 150


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for file in FILES:
        target = GOLDEN / (file.removeprefix("configs/").replace("/", "_")[:-3] + ".json")
        target.write_text(json.dumps(plain(load(file)), indent=1, sort_keys=True) + "\n")
