# SPDX-License-Identifier: Apache-2.0
"""Continues a text with the checkpoint of a run, greedily or by sampling.

    python -m experiments.generate --workdir=runs/mrt5 --text="It was "
    python -m experiments.generate --workdir=runs/mrt5 --text="def f(" --text="class A" --temperature=0.8 --top-p=0.9 --seed=1
    python -m experiments.generate --workdir=runs/mrt5 --file=notes.txt --max-length=64 --show-deleted
    cat notes.txt | python -m experiments.generate --workdir=runs/mrt5 --file=- --deletion=none --json

Texts are bytes: whatever a file holds is read, and what a model emits is shown with escapes where it is no UTF-8. The input is
ended as in training. A model of span corruption emits the missing spans, each behind its sentinel (a top byte).
`--json` prints one object a text, with the exact bytes in hexadecimal.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import data, evaluate, tasks, train
from experiments.data import byte_vocab
from experiments.memory import keep_freed_pages
from layers.generation import generate_lm, generate_t5

DELETIONS = ("hard", "soft", "none")
_STRUCK, _PLAIN = "\x1b[9;31m", "\x1b[0m"


def generate(
    workdir: str,
    texts: list[bytes],
    *,
    max_length: int | None = None,
    deletion: str | None = None,
    step: int | str | None = None,
    seed: int = 0,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """One record for each text, from a run's checkpoint.

    Args:
      workdir: directory of a run of the task seq2seq, language_modelling or duo.
      texts: what the encoder reads, or what a decoder-only model continues.
      max_length: bytes to generate at most; as many as in training when None.
      deletion: "hard", "soft" or "none"; as the run evaluates when None.
      step: of the checkpoint; see `experiments.evaluate`.
      seed: of sampling, and of gates that draw.
      **sampling: see `layers.generation.generate`.

    Returns:
      Records with "input" and "continuation" (bytes, the latter as far as ids are bytes), "ended" (whether the model ended
      it), "log_prob" (in nats, of all that was generated), "kept" (for each byte whether hard deletion keeps it; None without
      deletion), "tokens" (what is left after each encoder layer, the end of sequence included; of a decoder-only model the
      generated tokens that ran through each layer, or took its big module), "deletion" and "step".

    Raises:
      FileNotFoundError, ValueError: no such run or step, another task, no gate to delete with, an empty text.
    """
    directory = epath.Path(workdir)
    config = evaluate.load_config(directory)
    task = tasks.build(config)
    if not isinstance(task, tasks.Seq2Seq | tasks.LanguageModelling | tasks.Duo):
        raise ValueError(
            f"only the tasks seq2seq, language_modelling and duo generate text; {workdir} is a run of {config.task!r}"
        )
    vocabulary = data.vocabulary(config.data)
    run = _decoded if isinstance(task, tasks.Seq2Seq) else functools.partial(_continued, vocabulary)
    output, found, mode = run(
        directory, config, task, texts, max_length, deletion, step, jax.random.key(seed), sampling
    )
    generation, aux = jax.device_get(output)
    return [
        {
            "input": text,
            "continuation": vocabulary.decode(generation.tokens[row, : generation.lengths[row]]),
            "ended": bool(vocabulary.eos_id in generation.tokens[row]),
            "log_prob": float(generation.log_probs[row].sum()),
            "kept": None if mode is None else aux["kept"][row, : len(text)].tolist(),
            "tokens": aux["tokens"][:, row].tolist(),
            "deletion": mode or "none",
            "step": int(found),
        }
        for row, text in enumerate(texts)
    ]


def _decoded(
    directory: epath.Path,
    config: Any,
    task: tasks.Seq2Seq,
    texts: list[bytes],
    max_length: int | None,
    deletion: str | None,
    step: Any,
    key: Any,
    sampling: dict[str, Any],
) -> tuple[Any, int, str | None]:
    """What an encoder-decoder model generates, the step of its checkpoint, and how it deleted."""
    mode = deletion_mode(task, deletion)
    ids = _padded([byte_vocab.encode(text, eos=True) for text in _given(texts)], task.inputs_length)
    lengths = {"input_ids": task.inputs_length, "decoder_input_ids": task.targets_length}
    params, found = _restored(directory, config, task, lengths, step)
    output = generate_t5(
        _with_room(task.model, ids.shape[1]),
        {"params": params},
        jnp.asarray(ids),
        deletion=mode,
        max_length=task.targets_length if max_length is None else max_length,
        key=jax.random.fold_in(key, 0),
        rngs={"deletion": jax.random.fold_in(key, 1)},
        **sampling,
    )
    return output, found, mode


def _continued(
    vocabulary: Any,
    directory: epath.Path,
    config: Any,
    task: tasks.LanguageModelling | tasks.Duo,
    texts: list[bytes],
    max_length: int | None,
    deletion: str | None,
    step: Any,
    key: Any,
    sampling: dict[str, Any],
) -> tuple[Any, int, None]:
    """What a decoder-only model generates, the step of its checkpoint, and None: it deletes nothing."""
    if deletion not in (None, "none"):
        raise ValueError(f"--deletion={deletion} needs a model with a gate; this run is of a decoder alone")
    rows = [np.concatenate([task.start, vocabulary.encode(text)]) for text in _given(texts)]
    ids, mask = _padded(rows, 0), _padded([np.ones_like(row) for row in rows], 0) > 0
    params, found = _restored(directory, config, task, {task.reads: task.length}, step)
    length = task.length if max_length is None else max_length
    sampling = {**sampling, "max_length": length, "eos_id": vocabulary.eos_id, "vocab_size": vocabulary.size}
    output = generate_lm(
        task.decoder,
        {"params": params},
        jnp.asarray(ids),
        jnp.asarray(mask),
        key=jax.random.fold_in(key, 0),
        **sampling,
    )
    return output, found, None


def _restored(directory: epath.Path, config: Any, task: Any, lengths: dict[str, int], step: Any) -> tuple[Any, int]:
    """Parameters and step of a run's checkpoint; `lengths` of a batch."""
    shapes = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name, length in lengths.items()}
    return evaluate.restore(directory, config, train.build_program(config, task, shapes), step)


def deletion_mode(task: tasks.Seq2Seq, deletion: str | None) -> str | None:
    """What `deletion` means for the model of a run."""
    if deletion not in (None, *DELETIONS):
        raise ValueError(f"deletion={deletion!r}; one of {', '.join(DELETIONS)}")
    if task.model.gate is None:
        if deletion in ("hard", "soft"):
            raise ValueError(
                f"--deletion={deletion} needs a model with a gate; this run has none (model.gate is empty)"
            )
        return None
    chosen = task.deletion.evaluate if deletion is None else deletion
    return chosen if chosen in ("hard", "soft") else None


def _given(texts: list[bytes]) -> list[bytes]:
    if not texts or not all(texts):
        raise ValueError("there is nothing to read: give at least one --text or --file, none of them empty")
    return texts


def _padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """`[B, N]` int32, zeros behind each row, as long as the longest or as `length`."""
    padded = np.zeros((len(rows), max(length, *map(len, rows))), np.int32)
    for to, row in zip(padded, rows, strict=True):
        to[: len(row)] = row
    return padded


def _with_room(model: Any, length: int) -> Any:
    """The model with a rung more where `length` bytes are more than its ladder holds."""
    if model.rungs is None or length <= model.rungs[-1]:
        return model
    return model.clone(rungs=(*model.rungs, length))


def marked(text: bytes, kept: list[bool], *, colour: bool) -> str:
    """The text with runs of deleted bytes struck out in red, or in brackets; bytes that are no UTF-8 are escaped."""
    opening, closing = (_STRUCK, _PLAIN) if colour else ("[", "]")
    edges = [0, *(i for i in range(1, len(text)) if kept[i] != kept[i - 1]), len(text)]
    runs = [(_shown(text[low:high]), kept[low]) for low, high in itertools.pairwise(edges) if low < high]
    return "".join(shown if stays else f"{opening}{shown}{closing}" for shown, stays in runs)


def _shown(text: bytes) -> str:
    return text.decode("utf-8", errors="backslashreplace")


def report(record: dict[str, Any], *, show_deleted: bool, colour: bool) -> str:
    """A record for people to read."""
    lines = [_shown(record["continuation"])]
    if show_deleted:
        kept = record["kept"]
        lines.append(f"input ({record['deletion']} deletion): {marked(record['input'], kept, colour=colour)}")
        stay = (
            "stay"
            if record["deletion"] == "hard"
            else "would stay under hard deletion (soft deletion fades the others)"
        )
        lines.append(f"{sum(kept)} of {len(kept)} bytes {stay}; tokens after each encoder layer: {record['tokens']}")
    return "\n".join(lines)


def as_json(record: dict[str, Any]) -> str:
    """A record as one JSON object; bytes as text with escapes, and exactly in hexadecimal."""
    texts = {name: record[name] for name in ("input", "continuation")}
    shown = {name: _shown(text) for name, text in texts.items()}
    return json.dumps({**record, **shown, **{f"{name}_hex": text.hex() for name, text in texts.items()}})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="directory of a run of experiments.train")
    parser.add_argument("--text", action="append", default=[], help="a text to continue; may be given several times")
    parser.add_argument("--file", action="append", default=[], help="a file to continue, - for standard input")
    parser.add_argument("--step", default="", help="a step, or best; the newest when not given")
    parser.add_argument("--max-length", type=int, default=None, help="bytes to generate (default: as in training)")
    parser.add_argument(
        "--min-length", type=int, default=0, help="bytes before the model may end (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default %(default)s)")
    parser.add_argument(
        "--top-k", type=int, default=0, help="sample among so many bytes; 0 is all (default %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this nucleus (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default %(default)s)")
    parser.add_argument("--deletion", choices=DELETIONS, default=None, help="default: as the run evaluates")
    parser.add_argument("--show-deleted", action="store_true", help="also show which bytes of the input were deleted")
    parser.add_argument("--json", action="store_true", help="print one JSON object a text")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Reads the arguments, generates, prints; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        texts = [text.encode("utf-8", errors="surrogateescape") for text in options.text]
        texts += [sys.stdin.buffer.read() if name == "-" else epath.Path(name).read_bytes() for name in options.file]
        records = generate(
            options.workdir,
            texts,
            max_length=options.max_length,
            deletion=options.deletion,
            step=int(options.step) if options.step.isdigit() else options.step or None,
            seed=options.seed,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_length=options.min_length,
        )
        if options.show_deleted and records[0]["kept"] is None:
            raise ValueError("--show-deleted needs deletion: a model with a gate, and --deletion=hard or soft")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for record in records:
        colour = sys.stdout.isatty()
        print(as_json(record) if options.json else report(record, show_deleted=options.show_deleted, colour=colour))
    return 0


if __name__ == "__main__":
    keep_freed_pages()
    sys.exit(main())
