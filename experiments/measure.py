# SPDX-License-Identifier: Apache-2.0
"""Wall-clock time of compiled functions, as ratios that hold on a noisy machine.

Functions that are compared run in turn (A B A B ...) in one process after a warm-up; medians are reported with their
spread. Every call is waited for, or a few calls of one function together: an accelerator takes them in order, and starting one
call takes the host longer than many a kernel runs.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: `median`, `low` and `high` (quartiles), over `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int = 7, warmup: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Times each function, in turn.

    Args:
      functions: name to a function without arguments that returns arrays.
      repeats: timings of each; warmup: untimed calls of each before, at least one (it compiles).
      calls: of a function in one timing, waited for together; `kernel_calls()` for single kernels.

    Raises:
      ValueError: fewer than one repeat, warm-up call or call.
    """
    if repeats < 1 or warmup < 1 or calls < 1:
        raise ValueError(f"repeats, warmup and calls must be at least 1; got {repeats}, {warmup} and {calls}")
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls - 1):
                function()
            jax.block_until_ready(function())
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: _timing(values) for name, values in seconds.items()}


def kernel_calls() -> int:
    """Calls of a single kernel to wait for together: one on a CPU, which runs them as they come."""
    return 1 if jax.default_backend() == "cpu" else 16


def _timing(values: list[float]) -> Timing:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(statistics.median(values), low, high, len(values))


def compiled_call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """A call of the compiled `function` on `arguments`, for `interleaved`."""
    compiled = jax.jit(function)
    return lambda: compiled(*arguments)


def milliseconds(times: Mapping[str, Timing]) -> dict[str, list[float]]:
    """`[low, median, high]` of each timing in milliseconds, as rows print them."""
    return {name: [round(1e3 * value, 3) for value in (t.low, t.median, t.high)] for name, t in times.items()}


def random_like(abstract: Any, key: Any, deviation: float = 0.02) -> Any:
    """Arrays of the shapes and dtypes of a tree of `ShapeDtypeStruct`, drawn from Normal(0, deviation): no init is compiled."""
    leaves, tree = jax.tree.flatten(abstract)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        (deviation * jax.random.normal(k, leaf.shape, jnp.float32)).astype(leaf.dtype)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def threads() -> int:
    """CPUs that this process may use, which is how many threads a computation on the CPU has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name() -> str:
    """Kind of the device that runs the measurement, such as "cpu" or "NVIDIA H200"."""
    return jax.devices()[0].device_kind
