# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of kernels at their named shapes share: flags, the choice of shapes, and what stands in every row."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from experiments import measure


def add_arguments(parser: argparse.ArgumentParser, shapes: str) -> None:
    """Flags of the shapes, the implementation and the timing; `shapes` are timed where none are named."""
    parser.add_argument("--spec", default=shapes, help="named shapes, comma separated, or all (default %(default)s)")
    parser.add_argument("--implementation", default=None, help="of ours (default: the best there is)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each function (default %(default)s)")


def chosen(options: argparse.Namespace, named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and specs of the shapes that are asked for.

    Raises:
      ValueError: no shape of that name.
    """
    names = list(named) if options.spec == "all" else options.spec.split(",")
    unknown = sorted(set(names) - set(named))
    if unknown:
        raise ValueError(f"no shape {', '.join(unknown)}; --spec takes {', '.join(named)}, or all")
    for name in names:
        yield name, named[name]


def times_of(options: argparse.Namespace, functions: Mapping[str, Callable[[], Any]]) -> dict[str, measure.Timing]:
    """Interleaved times of compiled calls, several of which are waited for together on an accelerator."""
    return measure.interleaved(dict(functions), repeats=options.repeats, warmup=2, calls=measure.kernel_calls())


def forward_and_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` and the gradient of its first argument, in one."""

    def run(x: Any, *others: Any) -> Any:
        out, pull = jax.vjp(lambda x: function(x, *others), x)
        return out, pull(out)

    return run


def row(
    options: argparse.Namespace, name: str, spec: Any, shape: str, times: Mapping[str, measure.Timing], **facts: Any
) -> dict[str, Any]:
    """A row of a named shape; `facts` that are floats are rounded."""
    return {
        "spec": name,
        "shape": shape,
        "device": measure.device_name(),
        "dtype": spec.dtype,
        "implementation": options.implementation or "best",
        **{fact: round(value, 4) if isinstance(value, float) else value for fact, value in facts.items()},
        "milliseconds": measure.milliseconds(times),
        "repeats": options.repeats,
    }
