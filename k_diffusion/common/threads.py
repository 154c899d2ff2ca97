"""Importing this, before torch, keeps OpenMP's threads from holding the cores while they wait.

GNU OpenMP reads GOMP_SPINCOUNT when torch loads it: how often a thread that waits for the others
looks again before it sleeps. The default, 300,000, is tens of milliseconds, in which another
process could have used the core; SPIN_COUNT is less than a tenth of a millisecond, about what
waking a sleeping thread costs. Processes that this one starts inherit it. What the user has set
stays, also by OMP_WAIT_POLICY.
"""

import os

SPIN_COUNT = 1000

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
