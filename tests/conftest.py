"""What no test may depend on: the machine's cores, and the tests that ran before."""

import os
import random

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeds():
    """Global generators as at the start of a process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
