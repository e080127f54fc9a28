# SPDX-License-Identifier: Apache-2.0
"""Hooks: where a backbone lets a method reduce its tokens.

A backbone calls each of its hooks at every layer where the hook acts, with the current tokens and the signals that the hook
lists, and applies the reduction that it returns. A hook is a value (`Reduce`) or a Linen module with parameters of its own.

Shapes: B batch, N tokens, M slots.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from adaptive import registry
from adaptive.tokens import DenseReduction, Reduction, Signals, TokenSet

PLACES = ("between", "after")


@runtime_checkable
class Hook(Protocol):
    """What a backbone asks of a hook.

    Attributes:
      place: "between" attention and MLP, or "after" the block.
      signals: names of the `Signals` fields that it reads; "rng" comes from the rng collection "reduction".
    """

    place: str
    signals: tuple[str, ...]

    def acts(self, layer: int, length: int) -> bool:
        """Whether it reduces anything at `layer` (from 0), which holds `length` tokens; static."""
        ...

    def __call__(self, tokens: TokenSet, signals: Signals) -> Reduction | DenseReduction:
        """The reduction of `tokens`; `signals.layer` says where."""
        ...


@runtime_checkable
class LearnedHook(Hook, Protocol):
    """A hook that is trained by losses of its own."""

    def losses(self, tokens: TokenSet, signals: Signals, labels: Any) -> dict[str, tuple[Any, Any]]:
        """Name to `(sum over rows, rows)`, from what the call gets and the class `labels [B]` of each row."""
        ...


@dataclasses.dataclass(frozen=True)
class Reduce:
    """A registered reduction under a static schedule.

    Attributes:
      method: name in the registry.
      counts: surviving tokens after each layer, the class token included; the incoming number means that nothing happens.
        `budgets.token_counts` makes them from tokens to remove.
      hyper: `((name, value), ...)`, keyword arguments of the method.
      place: "between" attention and MLP (ToMe), or "after" the block.
      layered: `((name, (value, ...)), ...)`, keyword arguments with one value a layer.

    Raises:
      KeyError: the method is not registered.
      ValueError: it is not a token reduction, an unknown place, or not one value a layer.
      TypeError: the method has no such hyper-parameter.
    """

    method: str
    counts: tuple[int, ...]
    hyper: tuple[tuple[str, Any], ...] = ()
    place: str = "between"
    layered: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def __post_init__(self) -> None:
        record = registry.describe(self.method)
        if record.kind != "reduction":
            raise ValueError(
                f"{self.method!r} is of kind {record.kind!r}; one of {registry.names('reduction')} reduces tokens"
            )
        if unknown := sorted({name for name, _ in (*self.hyper, *self.layered)} - set(record.hyper)):
            raise TypeError(f"{self.method} has no hyper-parameter {unknown}; it has {sorted(record.hyper) or 'none'}")
        if self.place not in PLACES:
            raise ValueError(f"place={self.place!r} is not one of {PLACES}")
        object.__setattr__(self, "counts", tuple(int(count) for count in self.counts))
        object.__setattr__(self, "layered", tuple((name, tuple(values)) for name, values in self.layered))
        for name, values in self.layered:
            if len(values) != len(self.counts):
                raise ValueError(f"{name} of {self.method!r} has {len(values)} values for {len(self.counts)} layers")

    @property
    def signals(self) -> tuple[str, ...]:
        """Signals that the method needs."""
        return registry.describe(self.method).signals

    def acts(self, layer: int, length: int) -> bool:
        """Whether `layer` changes the number of tokens.

        Raises:
          ValueError: there is no count for that layer.
        """
        if layer >= len(self.counts):
            raise ValueError(
                f"counts {self.counts} of {self.method!r} end before layer {layer}; one count a layer is needed"
            )
        return self.counts[layer] != length

    def __call__(self, tokens: TokenSet, signals: Signals) -> Reduction | DenseReduction:
        """The method's reduction of `tokens` to `counts[signals.layer]`; errors are the registry's."""
        own = {name: values[signals.layer] for name, values in self.layered}
        return registry.get(self.method)(tokens, signals, self.counts[signals.layer], **dict(self.hyper), **own)


def follow(signals: Signals, reduction: Reduction | DenseReduction) -> Signals:
    """`signals` for the slots of a reduction, for a hook that comes after another one in the same layer.

    Keys, queries and values are combined like features; attention received adds up. The whole map and token ids do not carry
    over and become None.
    """
    combined = {name: getattr(signals, name) for name in ("keys", "queries", "values")}
    added = {name: getattr(signals, name) for name in ("cls_attention", "column_sums")}
    return signals.replace(
        attention=None,
        token_ids=None,
        **{name: None if value is None else reduction.reduce(value) for name, value in combined.items()},
        **{name: None if value is None else reduction.reduce_mass(value) for name, value in added.items()},
    )
