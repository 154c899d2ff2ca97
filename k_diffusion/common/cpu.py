"""Importing this, before torch, suits the process to work on a CPU.

Waiting threads leave the cores: GNU OpenMP reads GOMP_SPINCOUNT when torch loads it, how often a
thread that waits for the others looks again before it sleeps. The default, 300,000, is tens of
milliseconds, in which another process could have used the core; SPIN_COUNT is less than a tenth of
a millisecond, about what waking a sleeping thread costs.

Freed memory stays with the process: glibc hands it back and asks for it again many times in a
training step, and the kernel clears every page anew. What a tensor frees the next one takes, so
the peak is the same. Tensors of more than MAX_KEPT bytes are handed back as before.

Processes that this one starts inherit the first. What the user has set stays: by OMP_WAIT_POLICY or
GOMP_SPINCOUNT, and by MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_THRESHOLD_.
"""

import ctypes
import os
import platform

SPIN_COUNT = 1000
MAX_KEPT = 32 << 20  # the most that glibc itself would raise its threshold to
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))

if platform.libc_ver()[0] == "glibc" and not (
    {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ)
):
    _libc = ctypes.CDLL(None)
    _libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    _libc.mallopt(M_MMAP_THRESHOLD, MAX_KEPT)
