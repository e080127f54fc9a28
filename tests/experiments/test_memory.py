# SPDX-License-Identifier: Apache-2.0
"""Pages of freed buffers stay with the process, in all of its threads."""

import pathlib
import platform
import subprocess
import sys

import pytest

from experiments import memory

# Page faults of writing a buffer of 40 MB that was allocated and freed before, in a thread other than the first.
PROGRAM = """
import ctypes, resource, threading
from experiments.memory import keep_freed_pages

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def write():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffer = libc.malloc(40 << 20)
    ctypes.memset(buffer, 1, 40 << 20)
    libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend([write(), write()]))
    thread.start()
    thread.join()
    return found[1]

before = in_a_thread()
print(keep_freed_pages(), before, in_a_thread())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a C library of another make")
def test_a_freed_buffer_is_written_again_without_page_faults():
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, check=True)
    kept, before, after = done.stdout.split()
    assert kept == "True" and int(after) < int(before) / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("it was touched"))
    assert memory.keep_freed_pages() is False
