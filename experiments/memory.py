# SPDX-License-Identifier: Apache-2.0
"""Memory of the host, for programs that run the same compiled function again and again on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Parameters of mallopt by their numbers in malloc.h, and the values that keep what was freed.
_TRIM_THRESHOLD = (-1, 2**31 - 1)
_MMAP_MAX = (-4, 0)
_ARENA_MAX = (-8, 1)


def keep_freed_pages() -> bool:
    """Makes the C library keep the pages of freed buffers for the next call; True if it does, False where it is not glibc.

    XLA's CPU client takes results and temporaries from malloc in every call. glibc maps large ones afresh, and gives back what
    a thread other than the first frees, so that each call meets thousands of new pages, which the kernel has to clear: up to
    a quarter of a training step. All threads share one pool of memory instead, which grows to what the program needs at most
    and stays so. What it costs: threads that compile wait for each other's allocations, half as long again on four of them.
    It is for the start of a process, before the first computation: other code in the same process is concerned as well.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return all(libc.mallopt(*setting) for setting in (_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX))
