# SPDX-License-Identifier: Apache-2.0
"""Generation from a run's checkpoint on the command line."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.decoder import text as decoder_text
from configs.duo import bytes as duo_bytes
from configs.mrt5 import continuation, spans
from configs.tome import digits
from experiments import evaluate, generate, tasks, train
from experiments.data import byte_vocab
from experiments.rundir import apply_overrides

TEXT = b"import \xff\xfe os"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "mrt5"
    train.train(continuation.get_config("gate=mrt5,runlocal"), path, progress=False)
    return path


def run(capsys, workdir, *arguments):
    """Records of a call with `--json`."""
    assert generate.main([f"--workdir={workdir}", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_it_prints_what_the_checkpoint_continues_greedily(workdir, capsys, tmp_path):
    (tmp_path / "text").write_bytes(TEXT)
    record, other = run(
        capsys, workdir, f"--file={tmp_path / 'text'}", "--text=def", "--max-length=5", "--deletion=none"
    )[::-1]
    assert (record["input_hex"], record["step"], record["deletion"], record["kept"]) == (TEXT.hex(), 2, "none", None)
    assert other["input"] == "def" and record["input"] == "import \\xff\\xfe os"
    assert record["tokens"] == [len(TEXT) + 1] * 3
    # The same by whole forward passes with the same weights.
    config = evaluate.load_config(workdir)
    task = tasks.build(config)
    spec = {name: jax.ShapeDtypeStruct((1, 16), jnp.int32) for name in ("input_ids", "decoder_input_ids")}
    params, _ = evaluate.restore(workdir, config, train.build_program(config, task, spec), None)
    ids, tokens, total = byte_vocab.encode(TEXT, eos=True)[None], np.zeros((1, 6), np.int32), 0.0
    score = jax.jit(lambda tokens: task.model.apply({"params": params}, ids, None, tokens)[0])
    for position in range(5):
        logits = np.asarray(score(tokens))[0, position]
        tokens[0, position + 1] = logits.argmax()
        total += np.asarray(jax.nn.log_softmax(logits)).max()
        if logits.argmax() == byte_vocab.EOS:
            break
    assert bytes.fromhex(record["continuation_hex"]) == byte_vocab.decode(tokens[0, 1:])
    assert record["log_prob"] == pytest.approx(total, abs=1e-3)


def test_deleted_bytes_are_marked_and_counted(workdir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT)))
    (record,) = run(capsys, workdir, "--file=-", "--max-length=2", "--show-deleted")
    first, *rest = record["tokens"]
    assert record["deletion"] == "hard" and first == len(TEXT) + 1 and rest[0] == rest[1]
    # The mark at the end stays or goes as any byte does.
    assert rest[0] - sum(record["kept"]) in (0, 1)
    text = TEXT.decode(errors="surrogateescape")
    assert generate.main([f"--workdir={workdir}", f"--text={text}", "--max-length=2", "--show-deleted"]) == 0
    shown = capsys.readouterr().out
    assert generate.marked(TEXT, record["kept"], colour=False) in shown
    assert f"{sum(record['kept'])} of {len(TEXT)} bytes stay" in shown


def test_sampling_follows_the_seed(workdir, capsys):
    arguments = ("--text=import", "--max-length=8", "--temperature=1", "--top-p=0.95")
    (first,), (again,), (other,) = (run(capsys, workdir, *arguments, f"--seed={seed}") for seed in (0, 0, 1))
    assert first == again and first["log_prob"] != other["log_prob"]


def test_a_text_longer_than_the_ladder_gets_a_rung_of_its_own(workdir, capsys):
    (record,) = run(capsys, workdir, f"--text={'x' * 40}", "--max-length=1")
    assert record["tokens"][0] == 40 + 1 and len(record["kept"]) == 40


def test_a_model_of_span_corruption_gets_its_input_ended(tmp_path, capsys, monkeypatch):
    config = apply_overrides(spans.get_config("runlocal"), {"model.encoder_layers": 1, "model.chunk_layer": 1})
    (tmp_path / "config.json").write_text(config.to_json())
    monkeypatch.setattr(evaluate, "restore", lambda directory, config, program, step: (zeros(program.state.params), 7))
    (record,) = run(capsys, tmp_path, "--text=abc", "--max-length=1")
    assert (record["tokens"], record["deletion"], record["step"]) == ([4], "none", 7)
    assert generate.main([f"--workdir={tmp_path}", "--text=abc", "--deletion=hard"]) == 2
    assert "needs a model with a gate" in capsys.readouterr().err


def zeros(abstract):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)


def test_marks_keep_runs_together_and_escape_what_is_no_text():
    text, kept = "aéb".encode() + b"\xff", [True, True, True, False, False]
    assert generate.marked(text, kept, colour=False) == "aé[b\\xff]"
    assert generate.marked(text, kept, colour=True) == "aé\x1b[9;31mb\\xff\x1b[0m"
    # Half of a character is bytes.
    assert generate.marked(text, [False, False, True, True, True], colour=False) == "[a\\xc3]\\xa9b\\xff"
    assert generate.marked(b"", [], colour=False) == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text=a", "--temperature=-1"], "temperature must be 0"),
        (["--text=a", "--temperature=1", "--top-p=0"], "top_p must lie in (0, 1]; got 0.0"),
        (["--text=a", "--max-length=0"], "max_length must be at least 1 token; got 0"),
        (["--text=a", "--step=999"], "999"),
        (["--text=a", "--deletion=none", "--show-deleted", "--max-length=1"], "--show-deleted needs deletion"),
        (["--text="], "there is nothing to read"),
        ([], "there is nothing to read"),
        (["--file=no_such_file"], "no_such_file"),
    ],
)
def test_mistakes_get_one_clear_line(workdir, capsys, arguments, message):
    assert generate.main([f"--workdir={workdir}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_only_runs_that_have_a_decoder_and_text_can_generate(tmp_path, capsys):
    assert generate.main([f"--workdir={tmp_path}", "--text=a"]) == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(digits.get_config("runlocal").to_json())
    assert generate.main([f"--workdir={tmp_path}", "--text=a"]) == 2
    assert "only the tasks seq2seq, language_modelling and duo generate text" in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "python -m experiments.generate --workdir=" in capsys.readouterr().out


def test_a_decoder_alone_continues_texts_of_any_length(tmp_path, capsys):
    train.train(decoder_text.get_config("runlocal"), tmp_path / "run", progress=False)
    first, second = run(capsys, tmp_path / "run", "--text=import os", "--text=x", "--max-length=4")
    assert first["tokens"] == [4, 4] and first["kept"] is None
    config = evaluate.load_config(tmp_path / "run")
    task = tasks.build(config)
    spec = {"input_ids": jax.ShapeDtypeStruct((1, 16), jnp.int32)}
    params, _ = evaluate.restore(tmp_path / "run", config, train.build_program(config, task, spec), None)
    score = jax.jit(lambda ids: task.model.apply({"params": params}, ids)[0])
    for record in (first, second):
        ids = np.zeros((1, 16), np.int32)
        text = byte_vocab.encode(record["input"])
        ids[0, : len(text)] = text
        for place in range(len(text), len(text) + 4):
            ids[0, place] = np.asarray(score(ids))[0, place - 1].argmax()
        assert bytes.fromhex(record["continuation_hex"]) == byte_vocab.decode(ids[0, len(text) : len(text) + 4])
    assert generate.main([f"--workdir={tmp_path / 'run'}", "--text=x", "--deletion=hard"]) == 2
    assert "this run is of a decoder alone" in capsys.readouterr().err


def test_a_duo_model_continues_texts_with_the_modules_of_its_stage(tmp_path, capsys):
    train.train(duo_bytes.get_config("runlocal"), tmp_path / "run", progress=False)
    (record,) = run(capsys, tmp_path / "run", "--text=import os", "--max-length=3")
    assert record["tokens"] == [3, 3]
    config = evaluate.load_config(tmp_path / "run")
    task = tasks.build(config)
    spec = {"decoder_input_ids": jax.ShapeDtypeStruct((1, 16), jnp.int32)}
    params, _ = evaluate.restore(tmp_path / "run", config, train.build_program(config, task, spec), None)
    ids = np.concatenate([[0], byte_vocab.encode("import os")])[None]
    first = task.model.apply({"params": params}, ids, method="all_big")[0, -1].argmax()
    assert bytes.fromhex(record["continuation_hex"])[:1] == byte_vocab.decode([first])
