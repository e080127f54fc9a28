# SPDX-License-Identifier: Apache-2.0
"""What blocks are made of: the one place that decides which module a projection or a feed-forward layer is.

A backbone has an attribute `parts` and asks it for modules. Another way to compute these layers (learners, experts, channel
groups) is a subclass of `Parts`, and works in every backbone. What such modules decide, and what goes in and out of the dense
ones, is read with `captured`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn

from layers.linear import Linear
from layers.mlp import GatedMlp, Mlp

# Names, inside a block, of what `Parts` builds.
PROJECTIONS = ("query", "key", "value", "out")
MLP = "mlp"


@dataclasses.dataclass(frozen=True)
class Parts:
    """The dense parts."""

    def projection(self, axes: tuple[str, ...], **options: Any) -> nn.Module:
        """A linear map with the attributes of `layers.linear.Linear`; its sizes come with the calls."""
        return Linear(None, axes, **options)

    def mlp(self, hidden: int, **options: Any) -> nn.Module:
        """A feed-forward layer with the attributes and the call of `layers.mlp.Mlp`."""
        return Mlp(hidden, **options)

    def gated_mlp(self, hidden: int, **options: Any) -> nn.Module:
        """One with those of `layers.mlp.GatedMlp`."""
        return GatedMlp(hidden, **options)


def check_unrolled(parts: Parts, *, scan_layers: bool, remat: bool) -> None:
    """Raises ValueError for parts that are not dense in scanned or rematerialised layers, where `captured` cannot look."""
    if type(parts) is not Parts and (scan_layers or remat):
        raise ValueError(
            f"{type(parts).__name__} needs unrolled layers: set scan_layers=False and remat=False; use layers.stacking.unstack "
            f"on the parameters of a scanned model"
        )


class Call(NamedTuple):
    """One call of a module: its first argument, and its result."""

    given: Any
    result: Any


@contextlib.contextmanager
def captured(wanted: Callable[[nn.Module], bool]) -> Iterator[dict[str, Call]]:
    """Collects the calls of modules that are `wanted`, by path ("block_0/mlp"), while a model is applied inside.

    The values are those of the trace that runs: use them in the function that is being traced. Modules under `nn.scan`,
    `nn.remat` or `nn.switch` live in traces of their own and cannot be looked at.
    """
    found: dict[str, Call] = {}

    def note(function: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        result = function(*args, **kwargs)
        if context.method_name == "__call__" and wanted(context.module):
            found["/".join(context.module.path)] = Call(args[0], result)
        return result

    with nn.intercept_methods(note):
        yield found
