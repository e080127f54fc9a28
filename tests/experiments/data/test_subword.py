# SPDX-License-Identifier: Apache-2.0
"""Subword vocabularies: what ids stand for in bytes, and runs that are trained, scored and continued in them."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax.core import meta
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.decoder import text as decoder_text
from experiments import data, evaluate, generate, import_hf, tasks, train
from experiments.data import next_token, subword, text
from experiments.data.vocabulary import Bytes
from layers import hf
from layers.decoder_lm import DecoderLM

SAMPLE = "def f(x):\n    return x + 1\n\n\nGrüße, 世界 🎉 — naïve café\n" * 40


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    path.write_text(subword.train(np.frombuffer(SAMPLE.encode(), np.uint8), 300))
    return str(path)


@pytest.fixture(scope="module")
def vocabulary(path):
    return subword.Subword(path)


def as_bytes(string):
    return np.frombuffer(string.encode(), np.uint8)


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=80).filter(lambda s: s.isprintable() or "\n" in s))
def test_ids_come_back_as_the_text_and_their_sizes_add_up_to_its_bytes(vocabulary, string):
    ids, sizes = vocabulary.encode_corpus(as_bytes(string))
    assert vocabulary.decode(ids) == string.encode()
    assert sizes.sum() == len(string.encode()) and sizes.min() >= 0 and len(sizes) == len(ids)


def test_sizes_are_the_bytes_of_each_id(vocabulary):
    # Only ASCII, so that each id is whole characters.
    ids, sizes = vocabulary.encode_corpus(as_bytes("def f(x):\n    return x"))
    assert [len(vocabulary.decode([id_])) for id_ in ids] == sizes.tolist()
    assert len(ids) < sizes.sum()


def test_a_long_text_is_cut_at_line_ends_without_loss(vocabulary, monkeypatch):
    whole = vocabulary.encode_corpus(as_bytes(SAMPLE))
    monkeypatch.setattr(subword, "_PIECE", 100)
    ids, sizes = vocabulary.encode_corpus(as_bytes(SAMPLE))
    assert vocabulary.decode(ids) == SAMPLE.encode() and sizes.sum() == whole[1].sum()


@settings(max_examples=20, deadline=None)
@given(st.text(alphabet="aé世🎉", min_size=8, max_size=60), st.integers(4, 9))
def test_a_line_longer_than_a_piece_is_cut_between_characters(vocabulary, string, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subword, "_PIECE", piece)
        ids, sizes = vocabulary.encode_corpus(as_bytes(string))
    assert vocabulary.decode(ids) == string.encode() and sizes.sum() == len(string.encode())


def test_bytes_that_are_no_text_become_the_replacement_character(vocabulary):
    assert vocabulary.decode(vocabulary.encode(b"a\xffb")).decode() == "a\ufffdb"


def test_the_mark_of_the_end_is_the_last_id(vocabulary):
    assert (vocabulary.size, vocabulary.eos_id) == (300, 299)
    assert vocabulary.decode([vocabulary.encode(b"x")[0], 299]) == b"x"


def test_what_is_no_vocabulary_is_refused(tmp_path, vocabulary):
    with pytest.raises(ValueError, match=r"is no tokenizer\.json"):
        subword.Subword(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read as a tokenizer"):
        subword.Subword(str(tmp_path))
    with pytest.raises(ValueError, match="at least 257"):
        subword.train(as_bytes(SAMPLE), 256)
    with pytest.raises(ValueError, match=r"0\.\.299"):
        vocabulary.decode([300])


def test_without_a_tokenizer_ids_are_bytes():
    config = data.resolve(dict(source="text", objective="next_token"))
    assert isinstance(data.vocabulary(config), Bytes)


def test_labels_come_with_the_bytes_they_stand_for(vocabulary):
    ids, sizes = vocabulary.encode_corpus(as_bytes(SAMPLE))
    source = text.TextSource(ids, decoder_objective(7), sizes)
    batch = source.batch(np.array([0, 2]), np.zeros((2, 2), np.uint32), augment=False)
    np.testing.assert_array_equal(batch["labels"][1], ids[17:24])
    np.testing.assert_array_equal(batch["bytes"][1], sizes[17:24])
    with pytest.raises(ValueError, match="ids but one example needs"):
        text.TextSource(ids[:5], decoder_objective(7), sizes[:5])


def decoder_objective(length):
    return next_token.NextToken(length)


def test_a_run_is_scored_in_bits_per_byte_and_continued_in_text(path, tmp_path, capsys):
    config = decoder_text.get_config(f"tokenizer={path},runlocal")
    assert config.model.vocab_size == 384 and config.data.objective == "next_subword"
    config.data.max_bytes = 50_000
    workdir = tmp_path / "run"
    train.train(config, workdir, progress=False)
    # Id 0 is a subword like any other, not padding.
    task = tasks.build(config)
    batch = {name: np.zeros((2, 16), np.int32) for name in ("input_ids", "labels")}
    batch |= {"bytes": np.full((2, 16), 3, np.int32), "weight": np.ones(2, np.float32)}
    params = jax.jit(lambda: meta.unbox(task.init(jax.random.key(0), batch))["params"])()
    found = jax.jit(lambda params: task.eval_step(params, batch, extra={}))(params)
    assert (found["cross_entropy"][1], found["bits_per_byte"][1]) == (32, 96)
    assert generate.main([f"--workdir={workdir}", "--text=def", "--text=class A", "--max-length=4", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(bytes.fromhex(record["continuation_hex"]).decode() for record in records)
    with pytest.raises(ValueError, match="too small for the 300 ids"):
        config.model.vocab_size = 299
        tasks.build(config)


def test_an_import_takes_the_tokenizer_of_the_directory(path, tmp_path):
    model, module = tmp_path / "model", DecoderLM(384, 8, 1, 2, 12)
    hf.save(model, module, jax.jit(lambda: module.init(jax.random.key(0), np.ones((1, 2), int)))())
    (model / "tokenizer.json").write_text(pathlib.Path(path).read_text())
    import_hf.import_checkpoint(model, tmp_path / "run", overrides={"data.max_bytes": 50_000, "data.length": 8})
    config = evaluate.load_config(tmp_path / "run")
    assert (config.data.objective, config.data.tokenizer) == ("next_subword", str(model / "tokenizer.json"))


def test_the_command_learns_a_vocabulary(tmp_path, capsys):
    (tmp_path / "text").write_text(SAMPLE)
    out = tmp_path / "tokenizer.json"
    assert subword.main([f"--path={tmp_path / 'text'}", "--size=280", f"--out={out}"]) == 0
    assert "280 ids" in capsys.readouterr().out and subword.Subword(str(out)).size == 280
    assert subword.main([f"--path={tmp_path / 'none'}", f"--out={out}"]) == 2
    assert "matches no file" in capsys.readouterr().err
