# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: the platform's best one that can, or exactly the one that was named."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

# Names that `implementation=` may carry. "interpret" runs the TPU kernel and "gpu_interpret" the GPU kernel in Pallas'
# interpreters; they are never chosen unasked.
NAMES = ("tpu", "gpu", "xla", "interpret", "gpu_interpret")

_PREFERENCE = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}
_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def preference(platform: str | None = None) -> tuple[str, ...]:
    """Names to try on a platform, best first; that of `compiled_for`, or the default backend's, when None."""
    return _PREFERENCE.get(platform or _TARGET.get() or jax.default_backend(), ("xla",))


@contextlib.contextmanager
def compiled_for(platform: str) -> Iterator[None]:
    """What is traced here is compiled for a platform that is not the default backend: implementations are chosen for it."""
    before = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(before)


def left_to_xla(reason: str) -> Callable[..., Any]:
    """What stands for "gpu" where plain JAX is as good there: named, it refuses with the `reason` and says what to name."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{reason}; implementation='xla' is the one for GPUs")

    return refuse


def call(
    operation: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Runs `operation` in one of its implementations.

    Args:
      operation: name for error messages.
      implementations: function of each name that there is; one raises `NotImplementedError` for what it cannot do.
      implementation: a name insists on that one; None tries the platform's preference in order and goes on only past
        `NotImplementedError`.
      *args, **kwargs: handed to the implementation.

    Raises:
      ValueError: `implementation` is not one of `NAMES`.
      NotImplementedError: the named one does not exist or cannot do it; or none can, with every reason.
    """
    if implementation is not None:
        if implementation not in NAMES:
            raise ValueError(
                f"{operation}: implementation={implementation!r} is not one of {NAMES}, or None for the best"
            )
        if implementation not in implementations:
            there = ", ".join(map(repr, implementations))
            raise NotImplementedError(f"{operation} has no {implementation!r} implementation; there is {there}")
        return implementations[implementation](*args, **kwargs)
    reasons = []
    for name in preference():
        if name not in implementations:
            reasons.append(f"{name}: not there")
            continue
        try:
            return implementations[name](*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(f"no implementation of {operation} can do this. " + "; ".join(reasons))
