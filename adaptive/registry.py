# SPDX-License-Identifier: Apache-2.0
"""The registry of methods: name, what adapts, paper, citation, and the signals that a backbone must hand over."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any

from adaptive import budgets
from adaptive.tokens import Reduction, Signals, TokenSet

KINDS = {
    "reduction": "which tokens survive, merged or pruned",
    "deletion": "bytes deleted by a gate in an encoder",
    "chunking": "bytes grouped into chunks of varying length",
    "depth": "how many layers run for a token",
    "skipping": "which layers run for a token",
}


@dataclasses.dataclass(frozen=True)
class Record:
    """What the registry knows of a method.

    Attributes:
      name: published name in lower case.
      kind: a key of `KINDS`.
      paper, citation: title, and authors, venue, arXiv number; empty for baselines that nobody published.
      signals: names of the `Signals` fields that it needs.
      trained: "no" (training-free), "optional" or "yes".
      differs: the `Differs:` lines of the docstring.
      hyper: keyword arguments with their defaults.
      removes_half: at most half of the tokens can go in one call (bipartite matching).
      function: the plain function.
    """

    name: str
    kind: str
    paper: str
    citation: str
    signals: tuple[str, ...]
    trained: str
    differs: str
    hyper: dict[str, Any]
    removes_half: bool
    function: Callable[..., Any]


_RECORDS: dict[str, Record] = {}


def register(
    name: str,
    *,
    kind: str,
    paper: str = "",
    citation: str = "",
    signals: tuple[str, ...] = (),
    trained: str = "no",
    removes_half: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that enters a method under `name`; returns the function unchanged.

    Raises:
      ValueError: the name is taken, the kind or a signal is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r} for {name!r}; one of {sorted(KINDS)}")
    if trained not in ("no", "optional", "yes"):
        raise ValueError(f"trained={trained!r} for {name!r}; one of 'no', 'optional', 'yes'")
    fields = {field.name for field in dataclasses.fields(Signals)}
    if unknown := set(signals) - fields:
        raise ValueError(f"{name!r} asks for unknown signals {sorted(unknown)}; Signals has {sorted(fields)}")

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        if name in _RECORDS:
            raise ValueError(f"a method named {name!r} is registered already ({_RECORDS[name].function.__module__})")
        hyper = {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        }
        differs = _section(inspect.getdoc(function) or "", "Differs:")
        _RECORDS[name] = Record(
            name, kind, paper, citation, tuple(signals), trained, differs, hyper, removes_half, function
        )
        return function

    return enter


def _section(doc: str, head: str) -> str:
    """The paragraph of a docstring that starts with `head`, without it, on one line."""
    for paragraph in doc.split("\n\n"):
        if head in paragraph:
            return " ".join(paragraph.split(head, 1)[1].split())
    return ""


def names(kind: str | None = None) -> tuple[str, ...]:
    """Registered names, sorted; of one kind when given.

    Raises:
      ValueError: the kind is unknown.
    """
    _load()
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; one of {sorted(KINDS)}")
    return tuple(sorted(name for name, record in _RECORDS.items() if kind in (None, record.kind)))


def describe(name: str) -> Record:
    """The record of a method.

    Raises:
      KeyError: no such method; the message names the nearest ones.
    """
    _load()
    if name not in _RECORDS:
        near = difflib.get_close_matches(name, _RECORDS, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
        raise KeyError(f"no method is registered as {name!r}{hint} Registered: {', '.join(names())}")
    return _RECORDS[name]


def get(name: str) -> Callable[..., Any]:
    """The method, with its inputs checked at trace time.

    A token reduction is called `(tokens, signals, budget, **hyper)` and returns a `Reduction`; `budget` is the number of
    surviving tokens, or a `budgets.Threshold`. A deletion gate is called `(tokens, signals, **hyper)` and returns gate values
    `[B, N]`; a chunking method is called the same way and returns `Chunks`; a depth method how much each layer's state counts
    for each token, `[B, N, L]`; a skipping method which layers run for each token, `[B, N, L]` bool.

    Raises:
      KeyError: no such method.
      ValueError (when called): a signal is missing, the budget does not fit the tokens.
      TypeError (when called): an unknown hyper-parameter.
    """
    record = describe(name)

    @functools.wraps(record.function)
    def checked(tokens: TokenSet, signals: Signals, *args: Any, **hyper: Any) -> Any:
        _check_signals(record, signals)
        if unknown := set(hyper) - set(record.hyper):
            raise TypeError(f"{name} has no hyper-parameter {sorted(unknown)}; it has {sorted(record.hyper) or 'none'}")
        if record.kind != "reduction":
            return record.function(tokens, signals, *args, **hyper)
        return _reduce(record, tokens, signals, *args, **hyper)

    return checked


def _reduce(record: Record, tokens: TokenSet, signals: Signals, budget: budgets.Budget, **hyper: Any) -> Any:
    batch, length, _ = tokens.features.shape
    budget = budgets.check(budget, length, record.name)
    # Keeping every token is the dense model exactly, whatever the method would do to its order or its weights.
    if isinstance(budget, int) and budget == length:
        return Reduction.identity(batch, length)
    protected = int(signals.cls_token)
    if record.removes_half and length - budgets.capacity(budget) > max((length - protected) // 2, 0):
        raise ValueError(
            f"{record.name} pairs tokens, so of {length} tokens ({protected} protected) at most "
            f"{max((length - protected) // 2, 0)} can go at once; a budget of {budgets.capacity(budget)} removes "
            f"{length - budgets.capacity(budget)}. Raise the budget to {length - max((length - protected) // 2, 0)} or "
            f"reduce at more layers."
        )
    return record.function(tokens, signals, budget, **hyper)


def _check_signals(record: Record, signals: Signals) -> None:
    for name in record.signals:
        value = getattr(signals, name)
        if value is None or (name == "cls_token" and not value):
            raise ValueError(
                f"{record.name} needs the signal {name!r}, which is not there. Hand it over as Signals({name}=...); "
                f"the backbones in layers/ compute it when a hook lists it in its `signals`."
            )


def _load() -> None:
    """Imports the packages whose modules enter themselves."""
    import adaptive.chunking
    import adaptive.deletion
    import adaptive.depth
    import adaptive.reduction  # noqa: F401
