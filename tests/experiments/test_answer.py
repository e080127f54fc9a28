# SPDX-License-Identifier: Apache-2.0
"""Answers generated from a run's checkpoint, and their scores."""

import json

import pytest

from configs.mrt5 import continuation, tydiqa
from experiments import answer, generate, train
from experiments.data.pairs import PairOptions, TydiQa
from experiments.tasks import qa
from tests.experiments.tiny_data import QUESTIONS, write_pairs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    config = tydiqa.get_config(f"gate=fixed_deletion,data_dir={data_dir},runlocal")
    config.data.update(dict(name="tiny_tydi", eval_languages=("ar", "en", "ko"), targets_length=8))
    path = tmp_path_factory.mktemp("run") / "tydiqa"
    train.train(config, path, progress=False)
    return path


def test_every_question_is_answered_once_by_what_the_checkpoint_generates(workdir, data_dir):
    records = answer.answer(workdir, split="test", batch_size=4, progress=False)
    source = TydiQa("tiny_tydi", data_dir=data_dir, split="validation", languages=("ar", "en", "ko"))
    assert len(records) == len(source) == 2 * len(QUESTIONS)
    pairs = source._pairs(range(len(source)))
    fitted = [PairOptions(64, 8).fitted(text, 64) for text, _, _ in pairs]
    expected = generate.generate(workdir, fitted)
    for index, (record, other) in enumerate(zip(records, expected, strict=True)):
        assert record["answer"] == other["continuation"].decode("utf-8", errors="replace")
        assert record["accepted"] == source.answers(index)
        assert record["exact_match"] == qa.exact_match(record["answer"], record["accepted"])
        assert record["f1"] == qa.f1(record["answer"], record["accepted"])
    assert {record["language"] for record in records} == {"ar", "en", "ko"}


def test_it_prints_a_row_for_each_language_and_writes_every_answer(workdir, tmp_path, capsys):
    assert answer.main([f"--workdir={workdir}", "--split=test", "--limit=5", f"--answers={tmp_path / 'a.jsonl'}"]) == 0
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    lines = capsys.readouterr().out.splitlines()
    assert len(records) == 5 and lines[-1].split()[:2] == ["all", "5"]
    assert len(lines) == 2 + len({record["language"] for record in records}) + 1


def test_the_summary_averages_each_language_alone():
    scored = [("ko", 1.0, 1.0, 0.5), ("ko", 0.0, 0.5, 0.3), ("ar", 0.0, 0.0, 1.0)]
    records = [dict(zip(("language", "exact_match", "f1", "kept"), row, strict=True)) for row in scored]
    rows = answer.summary(records)
    assert [row["language"] for row in rows] == ["ar", "ko", "all"]
    assert [row["exact_match %"] for row in rows] == pytest.approx([0, 50, 100 / 3])
    assert [row["f1 %"] for row in rows] == pytest.approx([0, 75, 50])
    assert [row["questions"] for row in rows] == [1, 2, 3]


def test_what_it_cannot_score_is_refused(workdir, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--limit must be at least 1 question; got 0"):
        answer.answer(workdir, limit=0, progress=False)
    train.train(continuation.get_config("gate=mrt5,runlocal"), tmp_path / "text", progress=False)
    with pytest.raises(ValueError, match="only a set with accepted answers"):
        answer.answer(tmp_path / "text", progress=False)
    assert answer.main([f"--workdir={tmp_path / 'none'}"]) == 2
    assert "error" in capsys.readouterr().err
