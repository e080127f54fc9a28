# SPDX-License-Identifier: Apache-2.0
"""ViT, DeiT and ViT-MAE directories to runs of classification and back."""

import json
import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file

from experiments import evaluate, export_hf, import_hf, tasks
from experiments.config import load_config
from layers import hf

REPO = pathlib.Path(__file__).parents[2]
DATA = REPO / "tests" / "data" / "hf"
SHORT = ["--set", "data.scale=[0.7,1.0]", "--set", "data.threads=0", "--set", "batch_size=8", "--set", "eval.batches=1"]
SHORT += ["--set", "data.examples=16", "--set", "data.valid_examples=8"]


def imported(workdir, name, *arguments):
    assert import_hf.main([f"--model={DATA / name}", f"--workdir={workdir}", *arguments]) == 0
    return workdir


@pytest.mark.parametrize("name", ["vit_small", "deit_distilled_small"])
def test_exporting_an_import_gives_the_same_tensors_and_config(tmp_path, name, capsys):
    workdir = imported(tmp_path / "run", name, *SHORT, "--set", "model.num_classes=5")
    assert "(new)" not in capsys.readouterr().out
    assert export_hf.main([f"--workdir={workdir}", f"--out={tmp_path / 'out'}"]) == 0
    want, got = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path / "out"))
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(got[key], tensor, err_msg=key)
    written = json.loads((DATA / name / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in written} == written


def test_a_run_without_a_recipe_has_digits_and_a_new_classifier_and_evaluates(tmp_path, capsys):
    workdir = imported(
        tmp_path / "run",
        "vit_mae_small",
        *SHORT,
        "--set",
        "model.reduction.method=tome",
        "--set",
        "model.reduction.r=1",
    )
    table = capsys.readouterr().out
    assert "head (new)" in table and "embedding" in table
    config = load_config(workdir)
    assert (config.data.image_size, config.data.channels, config.model.num_classes) == (12, 3, 10)
    assert evaluate.main([f"--workdir={workdir}", "--split=valid"]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_a_learned_reduction_starts_anew(tmp_path, capsys):
    arguments = ["model.reduction.method=cropr", "model.reduction.r=2", "model.reduction.place=after"]
    sets = [part for argument in (*arguments, "model.num_classes=5") for part in ("--set", argument)]
    workdir = imported(tmp_path / "run", "vit_small", *SHORT, *sets)
    assert "reduction (new)" in capsys.readouterr().out
    params = flatten_dict(hf.abstract_params(tasks.build(load_config(workdir)).model), sep="/")
    assert "hooks_0/layer_1/queries" in params


def write_images(folder):
    """Two classes of four small pictures."""
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True)
        for index in range(4):
            Image.fromarray(rng.integers(0, 255, (14, 16, 3), dtype=np.uint8)).save(folder / label / f"{index}.png")
    return folder


def test_images_are_prepared_as_the_checkpoint_says(tmp_path):
    images = write_images(tmp_path / "images")
    config = REPO / "configs" / "vit" / "imagenet.py"
    workdir = imported(
        tmp_path / "run",
        "vit_small",
        f"--config={config}:path={images},valid_path={images}",
        *("--set", "data.valid_fraction=0.0001", "--set", "data.threads=0"),
        *("--set", "batch_size=8", "--set", "model.num_classes=2", "--set", "data.std=[0.5,0.5,0.5]"),
    )
    data = load_config(workdir).data
    assert data.image_size == 12 and tuple(data.mean) == (0.5, 0.4, 0.3)
    # What is set by hand has the last word.
    assert tuple(data.std) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_in21k_small", [], "the checkpoint takes images of 8 x 12; runs are fed square ones"),
        ("vit_small", ["--set", "model.num_classes=0"], "a run needs classes: set model.num_classes"),
        ("vit_small", [*SHORT, "--set", "data.image_size=16"], "positions/embedding: read (10, 12), set (17, 12)"),
        (
            "vit_small",
            [*SHORT, "--set", "model.pool=mean", "--set", "model.class_token=false"],
            "cls_token: unexpected, found [1, 1, 12]",
        ),
        ("vit_small", ["--config=configs/mrt5/spans.py"], "these models are trained on classification"),
        (
            "deit_distilled_small",
            [*SHORT, "--set", "model.reduction.method=tome", "--set", "model.reduction.r=1"],
            "a model with a distillation token needs pool='cls' and no hooks",
        ),
        (
            "vit_small",
            [*SHORT, "--set", "model.reduction.r=9", "--set", "model.reduction.method=tome"],
            "at most 4 can go",
        ),
        ("vit_small", ["--set", "model.layers=3"], "ViT has no attribute layers"),
    ],
)
def test_mistakes_get_one_clear_line(tmp_path, capsys, monkeypatch, name, arguments, message):
    monkeypatch.chdir(REPO)
    assert import_hf.main([f"--model={DATA / name}", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err
    assert "error: " in error and message in error
    assert not (tmp_path / "run").exists()
