# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories to runs and back: the same tensors, the same losses, and one clear line for mistakes."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs.mrt5 import continuation
from configs.tome import digits
from experiments import data, evaluate, export_hf, import_hf, tasks, train
from experiments.checkpoints import Checkpointer
from experiments.config import load_config
from experiments.rundir import RunDir
from layers import hf
from layers.decoder_lm import DecoderLM
from layers.rotary import Llama3Scaling

REPO = pathlib.Path(__file__).parents[2]
DATA = REPO / "tests" / "data" / "hf"
SHORT = ["--set", "data.inputs_length=48", "--set", "data.threads=0", "--set", "batch_size=8", "--set", "steps=2"]
SHORT += ["--set", "eval.every=2", "--set", "eval.batches=1"]


def imported(workdir, name, *arguments):
    assert import_hf.main([f"--model={DATA / name}", f"--workdir={workdir}", *SHORT, *arguments]) == 0
    return workdir


def exported(workdir, out, *arguments):
    assert export_hf.main([f"--workdir={workdir}", f"--out={out}", *arguments]) == 0
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


@pytest.fixture(scope="module")
def byt5(tmp_path_factory):
    return imported(tmp_path_factory.mktemp("byt5") / "run", "byt5_small")


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name].view(np.uint8), tensor.view(np.uint8), err_msg=name)


# ---- There and back --------------------------------------------------------------------------------------------------


def test_exporting_an_import_gives_the_same_tensors_and_config(byt5, tmp_path):
    tensors, config = exported(byt5, tmp_path / "out")
    assert_same_tensors(tensors, load_file(DATA / "byt5_small" / "model.safetensors"))
    written = json.loads((DATA / "byt5_small" / "config.json").read_text())
    assert {key: config[key] for key in written} == written


def test_half_precision_and_scanned_layers_come_back_bit_for_bit(tmp_path, capsys):
    workdir = imported(tmp_path / "run", "byt5_wide", "--scan-layers", "--dtype=bfloat16")
    config = load_config(workdir)
    assert config.model.scan_layers and config.dtype == "bfloat16"
    tensors, _ = exported(workdir, tmp_path / "out", "--dtype=bfloat16")
    stored = load_file(DATA / "byt5_wide" / "model.safetensors")
    assert_same_tensors(tensors, stored)
    # Both commands print what they mapped.
    total = f"{sum(tensor.size for tensor in stored.values()):,}"
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "total" in line] == [
        ["total", str(len(stored)), total]
    ] * 2


def test_evaluation_sees_the_imported_weights(byt5):
    assert evaluate.main([f"--workdir={byt5}", "--no-speed", "--batches=1"]) == 0
    row = json.loads((byt5 / "evaluations.jsonl").read_text().splitlines()[-1])
    config = load_config(byt5)
    batch = next(iter(data.build(config.data, split="valid", batch_size=8, seed=config.seed).eval_batches(1)))
    module, variables, _ = hf.load(DATA / "byt5_small")
    inputs = (batch["input_ids"], batch["input_ids"] != 0, batch["decoder_input_ids"])
    logits = np.asarray(jax.jit(module.apply)(variables, *inputs)[0], np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    assert row["step"] == 0 and row["kept"] == 1.0
    np.testing.assert_allclose(row["cross_entropy"], losses[batch["labels"] != 0].mean(), rtol=1e-5)


def test_training_goes_on_from_an_import_without_being_told_its_config(tmp_path):
    workdir = imported(tmp_path / "run", "byt5_small", "--scan-layers", "--set", "eval.every=0")
    command = [sys.executable, "-m", "experiments.train", f"--workdir={workdir}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Complete at step 2" in done.stdout
    start, _ = exported(workdir, tmp_path / "start", "--step=0")
    end, config = exported(workdir, tmp_path / "end")
    changes = {name: np.abs(end[name] - start[name]).max() for name in start}
    assert 0 < max(changes.values()) < 0.5  # two small steps from the imported weights
    assert_same_tensors(start, load_file(DATA / "byt5_small" / "model.safetensors"))
    assert config["torch_dtype"] == "float32" and config["decoder_start_token_id"] == 0


def test_a_new_gate_on_a_byt5_makes_an_mrt5(tmp_path, capsys):
    gate = ["--set", "model.gate=mrt5", "--set", "model.gate_layer=1", "--set", "model.softmax=off_by_one"]
    workdir = imported(tmp_path / "run", "byt5_small", *gate, "--set", "model.deletion.target=0.25")
    assert [line.split() for line in capsys.readouterr().out.splitlines() if "(new)" in line] == [
        ["delete_gate", "(new)", "0", "25"]
    ]
    model = load_config(workdir).model
    assert model.deletion.target == 0.25 and list(model.rungs) == [6, 12, 18, 24, 30, 36, 42, 48]
    tensors, config = exported(workdir, tmp_path / "out")
    assert config["architectures"] == ["MrT5ForConditionalGeneration"] and config["delete_gate_layer"] == 1
    stored = load_file(DATA / "byt5_small" / "model.safetensors")
    assert_same_tensors({name: tensors[name] for name in stored}, stored)
    assert tensors["encoder.block.1.delete_gate.feed_forward.bias"].tolist() == [1.0]
    module, _, _ = hf.load(tmp_path / "out")
    assert (module.gate, module.softmax) == ("mrt5", "off_by_one")


def test_a_recipe_gives_all_but_the_model(tmp_path):
    recipe = REPO / "configs" / "mrt5" / "spans.py"
    workdir = imported(
        tmp_path / "run", "byt5_small", f"--config={recipe}:runlocal,rate=0.3", "--set", "optimizer.peak=0.5"
    )
    config = load_config(workdir)
    assert (config.optimizer.name, config.optimizer.peak, config.optimizer.warmup) == ("adafactor", 0.5, 1)
    assert config.model.deletion.target == 0.3 and config.model.scan_layers and list(config.model.rungs) == [32, 64]
    assert (config.model.width, config.model.softmax, config.model.gate) == (12, "standard", "")


def test_a_run_that_was_never_imported_is_exported(tmp_path):
    config = continuation.get_config("gate=mrt5,runlocal")
    task = tasks.build(config)
    spec = data.build(config.data, split="train", batch_size=config.batch_size, seed=config.seed).spec
    state = train.build_program(config, task, spec).create(None)
    with Checkpointer(RunDir.open(tmp_path / "run", config).checkpoints, every=None) as checkpointer:
        checkpointer.maybe_save(3, state, None, {}, force=True)
    exported(tmp_path / "run", tmp_path / "out")
    module, variables, _ = hf.load(tmp_path / "out")
    assert (module.gate, module.gate_layer, module.gate_hyper) == ("mrt5", 2, (("scale", -30.0),))
    jax.tree.map(np.testing.assert_array_equal, variables["params"], state.params)


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("nothing", [], "has no config.json"),
        ("t5_encoder_small", [], "an encoder alone"),
        ("t5_tied_small", [], "vocab_size is 72; the bytes that runs are trained on have ids up to 258"),
        ("byt5_small", ["--set", "model.widht=3"], "T5 has no attribute widht"),
        ("byt5_small", ["--set", "model.width=16"], "shared.weight: found [384, 12], expected [384, 16]"),
        ("byt5_small", ["--set", "optimiser.peak=1"], "config has no key 'optimiser.peak'"),
        ("byt5_small", ["--set", "model.deletion.target=2.0"], "config.model.deletion.target is 2.0"),
        ("byt5_small", [f"--config={REPO / 'configs' / 'tome' / 'digits.py'}"], "for the task 'classification'"),
        ("byt5_small", ["--config=nowhere.py"], "there is no config file 'nowhere.py'"),
    ],
)
def test_an_import_that_cannot_be_gets_one_clear_line_and_no_run(tmp_path, capsys, name, arguments, message):
    assert import_hf.main([f"--model={DATA / name}", f"--workdir={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err.split("[import]")[-1]
    assert "error: " in error and message in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_replaced_only_when_asked(tmp_path, capsys):
    workdir = imported(tmp_path / "run", "byt5_small")
    arguments = [f"--model={DATA / 'byt5_wide'}", f"--workdir={workdir}", *SHORT]
    assert import_hf.main(arguments) == 2
    assert "holds a run; pass --overwrite" in capsys.readouterr().err
    assert load_config(workdir).model.width == 12
    assert import_hf.main([*arguments, "--overwrite"]) == 0
    assert load_config(workdir).model.width == 20


def test_an_export_that_cannot_be_gets_one_clear_line(byt5, tmp_path, capsys):
    vit = tmp_path / "vit"
    RunDir.open(vit, digits.get_config("runlocal"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    cases = [
        (tmp_path / "nowhere", "out", [], "holds no run"),
        (vit, "out", [], "a ViT has no Hugging Face form"),
        (byt5, "out", ["--step=7"], "no checkpoint of step 7"),
        (byt5, "full", [], "already holds config.json"),
    ]
    for workdir, out, arguments, message in cases:
        assert export_hf.main([f"--workdir={workdir}", f"--out={tmp_path / out}", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "config.json").read_text() == "{}"


# ---- Decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_becomes_a_run_that_trains_and_comes_back(tmp_path, capsys):
    """The stored models have fewer ids than there are bytes, so a larger one is made first."""
    module = DecoderLM(384, 8, 2, 2, 12, kv_heads=1, qkv_bias=True, rotary_scaling=Llama3Scaling())
    model, workdir = tmp_path / "model", tmp_path / "run"
    hf.save(model, module, module.init(jax.random.key(0), np.ones((1, 2), int)))
    short = ["--set", "data.length=16", "--set", "data.threads=0", "--set", "steps=1", "--set", "batch_size=8"]
    short += ["--set", "eval.batches=1"]
    assert import_hf.main([f"--model={model}", f"--workdir={workdir}", *short]) == 0
    assert "total" in capsys.readouterr().out
    tensors, config = exported(workdir, tmp_path / "out")
    assert_same_tensors(tensors, load_file(model / "model.safetensors"))
    assert config == json.loads((model / "config.json").read_text())
    assert train.train(load_config(workdir), workdir, progress=False).step == 1
    config = load_config(workdir)
    assert (config.task, config.data.objective) == ("language_modelling", "next_token")
    assert tasks.build(config).model.rotary_scaling == Llama3Scaling()


def test_a_recipe_of_another_task_is_refused(tmp_path, capsys):
    model = REPO / "tests" / "data" / "hf_llama" / "llama_small"
    spec = REPO / "configs" / "mrt5" / "spans.py"
    assert import_hf.main([f"--model={model}", f"--workdir={tmp_path / 'run'}", f"--config={spec}"]) == 2
    assert "is for the task 'seq2seq'; these models are trained on language_modelling" in capsys.readouterr().err
