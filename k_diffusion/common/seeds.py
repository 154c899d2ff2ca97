"""Seeds that follow from others."""

import numpy as np


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that belongs to a tuple of integers >= 0, but for zeros at its end."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
