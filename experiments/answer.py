# SPDX-License-Identifier: Apache-2.0
"""Answers the questions of a data set with the checkpoint of a run: exact match and F1 of generated answers, by language.

    python -m experiments.answer --workdir=runs/tydiqa --split=test
    python -m experiments.answer --workdir=runs/tydiqa --split=test --deletion=none --limit=200 --batch-size=16
    python -m experiments.answer --workdir=runs/tydiqa --answers=answers.jsonl

Decoding is greedy, through the bucket ladder where the run deletes for real. The table is printed; `--answers` also writes
every question's answer, with those that are accepted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tabulate import tabulate

from experiments import data, evaluate, tasks, train
from experiments.data import byte_vocab, pairs
from experiments.generate import DELETIONS, deletion_mode
from experiments.memory import keep_freed_pages
from experiments.progress import Progress
from experiments.tasks import qa
from layers.generation import generate_t5


def answer(
    workdir: str,
    *,
    split: str = "",
    deletion: str | None = None,
    step: int | str | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """One record for each question, from a run's checkpoint.

    Args:
      workdir: directory of a run of the task seq2seq on question answering.
      split: of the data; the run's evaluation split when empty.
      deletion: "hard", "soft" or "none"; as the run evaluates when None.
      step: of the checkpoint; see `experiments.evaluate`.
      batch_size: questions at once; as in training when None.
      limit: the first so many questions; all when None.
      progress: whether to draw a bar.

    Returns:
      Records with "answer", "accepted" (texts), "language", "exact_match" and "f1" (0 to 1), "kept" (share of input bytes
      that the last encoder layer saw).

    Raises:
      FileNotFoundError, ValueError: no such run, step or split, another task, data without accepted answers, a limit below 1.
    """
    directory = epath.Path(workdir)
    config = evaluate.load_config(directory)
    task = tasks.build(config)
    split, batch_size = split or config.eval.split, batch_size or config.batch_size
    dataset = data.build(config.data, split=split, batch_size=batch_size, seed=config.seed)
    if not isinstance(dataset.source, pairs.TydiQa):
        raise ValueError(
            f"only a set with accepted answers can be scored (data.pairs='tydi_qa'); {workdir} has another"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1 question; got {limit}")
    mode = deletion_mode(task, deletion)
    program = train.build_program(config, task, dataset.spec)
    params, _ = evaluate.restore(directory, config, program, step)
    records, count = [], min(limit or dataset.examples, dataset.examples)
    with Progress(count, label="answer", examples_per_step=1, enabled=progress) as bar:
        for indices, batch in _batches(dataset, count):
            sizes = dict(max_length=task.targets_length, deletion=mode)
            found = generate_t5(
                task.model, {"params": params}, batch["input_ids"], rngs={"deletion": jax.random.key(0)}, **sizes
            )
            generation, aux = jax.device_get(found)
            for row, index in enumerate(indices):
                text = byte_vocab.decode(generation.tokens[row, : generation.lengths[row]])
                left = aux["tokens"][-1, row] / np.sum(batch["input_ids"][row] != byte_vocab.PAD)
                language = pairs.TYDI_LANGUAGES[batch["language"][row]]
                records.append(_scored(dataset.source.answers(index), text, language=language, kept=float(left)))
            bar.update(len(records))
    return records


def _batches(dataset: data.Dataset, count: int) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """The first `count` examples in their order; the last batch is filled up with copies, so that one program serves all."""
    for start in range(0, count, dataset.batch_size):
        indices = range(start, min(start + dataset.batch_size, count))
        filled = np.resize(np.array(indices), dataset.batch_size)
        yield indices, dataset.source.batch(filled, np.zeros((len(filled), 3), np.int64), augment=False)


def _scored(accepted: list[str], text: bytes, **facts: Any) -> dict[str, Any]:
    prediction = text.decode("utf-8", errors="replace")
    scores = {"exact_match": qa.exact_match(prediction, accepted), "f1": qa.f1(prediction, accepted)}
    return {"answer": prediction, "accepted": accepted, **facts, **scores}


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each language and one for all questions: exact match and F1 in percent, share of bytes left in percent."""
    languages = sorted({record["language"] for record in records})
    groups = [(name, [record for record in records if record["language"] == name]) for name in languages]
    return [
        {
            "language": name,
            "questions": len(own),
            **{f"{key} %": 100 * float(np.mean([r[key] for r in own])) for key in ("exact_match", "f1", "kept")},
        }
        for name, own in [*groups, ("all", records)]
    ]


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, answers, prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of experiments.train, task seq2seq")
    parser.add_argument("--split", default="", help="data split; the run's evaluation split when not given")
    parser.add_argument("--step", default="", help="a step, or best; the newest when not given")
    parser.add_argument("--deletion", choices=DELETIONS, default=None, help="default: as the run evaluates")
    parser.add_argument("--batch-size", type=int, default=None, help="questions at once (default: as in training)")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many questions")
    parser.add_argument("--answers", default="", help="also write every answer to this JSON lines file")
    options = parser.parse_args(argv)
    try:
        records = answer(
            options.workdir,
            split=options.split,
            deletion=options.deletion,
            step=int(options.step) if options.step.isdigit() else options.step or None,
            batch_size=options.batch_size,
            limit=options.limit,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.answers:
        path = epath.Path(options.answers)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(tabulate(summary(records), headers="keys", floatfmt=".1f"))
    return 0


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
