# SPDX-License-Identifier: Apache-2.0
"""Every config trains two steps at `runlocal` size; its resolved values are golden."""

import json
import os
import pathlib

import pytest
from ml_collections import ConfigDict

from experiments import config as config_lib
from experiments import train
from experiments.rundir import plain

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


@pytest.mark.parametrize("name", FILES)
def test_it_runs_two_steps_at_runlocal_size(name, tmp_path):
    config = load(name, "runlocal")
    if config.data.source == "tfds_images":
        if not (DATA / "tfds").exists():
            pytest.skip("needs the CIFAR-10 folder: set ADAPTIVE_DATA_DIR to a folder that holds tfds/cifar10")
        config.data.data_dir = str(DATA / "tfds")
    result = train.train(config, tmp_path / "run", progress=False)
    assert result.step == 2
    assert all(value == value for key, value in result.metrics.items() if key.startswith("eval/"))


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
