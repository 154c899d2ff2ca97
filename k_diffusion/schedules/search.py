"""Schedules found by dynamic programming over a fine grid of noise levels."""

from typing import Any

import numpy as np


def search_levels(costs: Any, n: int) -> list[int]:
    """The path of n steps over a grid of noise levels that costs least.

    That is the search of GITS (arXiv:2405.11326), whose costs[i, j] is the error of one step from
    level i to level j against the teacher's trajectory, and of OptimalSteps (arXiv:2503.21774).

    costs: (m, m), of a step from level i down to level j > i; others aren't read. Returns the n + 1
    indices of the path, from 0 to m - 1, whose levels are a table for `get_sigmas_gits`. Raises
    ValueError for what isn't square, and unless 1 <= n < m.
    """
    table = np.asarray(costs, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1]:
        raise ValueError(f"costs must be (m, m), one per pair of levels, got shape {table.shape}")
    m = len(table)
    if not 1 <= n < m:
        raise ValueError(f"n steps over {m} levels need 1 <= n <= {m - 1}, got {n}")
    step = np.where(np.tri(m, dtype=bool), np.inf, table)
    least = np.full(m, np.inf)
    least[0] = 0.0
    before = []
    for _ in range(n):
        ways = least[:, None] + step
        before.append(ways.argmin(0))
        least = ways.min(0)
    if not np.isfinite(least[-1]):
        raise ValueError("no path of finite cost leads from the first level to the last one")
    path = [m - 1]
    for last in reversed(before):
        path.append(int(last[path[-1]]))
    return path[::-1]
