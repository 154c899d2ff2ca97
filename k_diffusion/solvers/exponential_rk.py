"""Exponential Runge-Kutta methods in lambda = -log sigma from tables (Hochbruck & Ostermann 2010).

The ODE is dx/dlambda = D - x. A step of length h with stages at the fractions c_i evaluates
D_i at x_i = e^(-c_i h) x + h sum_j a_ij D_j, and ends at e^-h x + h sum_i b_i D_i.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..common.text import unknown_name
from .context import Context, Step
from .exponential import stage
from .quadrature import integral

# Terms (factor, k, c) of a weight: the sum of factor phi_k(-c h).
Weight: TypeAlias = Sequence[tuple[float, int, float]]


def phi(k: int, z: float) -> float:
    """phi_k(z), the integral over u from 0 to 1 of e^((1 - u) z) u^(k - 1) / (k - 1)!; k >= 1."""
    if abs(z) < 1:
        scale = 1 / math.factorial(k - 1)
        return scale * integral(lambda u: np.exp((1 - u) * z) * u ** (k - 1), 0.0, 1.0)
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / z
    return value


@dataclass(frozen=True)
class Tableau:
    """A method: (i, j) stands for a_ij, and (s, j) for b_j, of s stages counted from 0.

    order: of convergence. c: the fractions of the step, the first one 0. weights: those with j > 0;
    a missing one is 0. Those with j = 0 follow, as a constant D must be solved exactly. Raises
    ValueError for fractions outside [0, 1] or weights of stages that aren't known yet.
    """

    order: int
    c: tuple[float, ...]
    weights: Mapping[tuple[int, int], Weight] = field(default_factory=dict)
    paper: str = ""

    def __post_init__(self) -> None:
        if not self.c or self.c[0] != 0 or not all(0 <= c <= 1 for c in self.c):
            raise ValueError(f"the fractions c start at 0 and lie between 0 and 1, got {self.c}")
        if bad := [at for at in self.weights if not 0 < at[1] < at[0] <= len(self.c)]:
            raise ValueError(
                f"a weight (i, j) of {len(self.c)} stages has 0 < j < i <= {len(self.c)}, got "
                f"{bad[0]}"
            )

    def row(self, i: int, h: float) -> list[float]:
        """The weights of D_0, ..., D_(i - 1) for stage i, or for the step's end."""
        c = (*self.c, 1.0)[i]
        rest = [
            h * sum(f * phi(k, -at * h) for f, k, at in self.weights.get((i, j), ()))
            for j in range(1, i)
        ]
        return [-math.expm1(-c * h) - sum(rest), *rest]


def exponential_rk(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Any,
    tableau: Tableau,
) -> tuple[Tensor, Any]:
    """A step of a tableau. A step to 0, which is of infinite length, gives the denoised sample."""
    if sigma_next == 0:
        return denoised, None
    h = math.log(sigma / sigma_next)
    values: list[Tensor] = []
    for i, c in enumerate((*tableau.c, 1.0)):
        level = sigma_next if c == 1 else stage(sigma, sigma_next, c)
        y = x * (level / sigma)
        for d, w in zip(values, tableau.row(i, h) if i else []):
            y = y + d * w if w else y
        if i == len(tableau.c):
            return y, None
        values.append(ctx.denoise(y, level) if i else denoised)
    raise AssertionError("a tableau has an end")


def measured_order(tableau: Tableau) -> float:
    """The order of convergence on dx/dlambda = tanh(1.3 x) + cos(lambda) - x, in float64."""

    def model(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(1.3 * x) + math.cos(math.log(sigma))

    ctx = Context(model, lambda x, sigma, d: (x - d) / sigma, lambda a, b: torch.zeros(1))

    def end(n: int, tableau: Tableau) -> Tensor:
        x = torch.tensor([0.9, -0.4], dtype=torch.float64)
        levels = np.exp(np.linspace(1.5, -1.5, n + 1)).tolist()
        for a, b in pairwise(levels):
            x, _ = exponential_rk(ctx, x, a, b, model(x, a), None, tableau)
        return x

    want = end(640, TABLEAUS["krogstad"])
    coarse, fine = (float((end(n, tableau) - want).norm()) for n in (24, 48))
    return math.log2(coarse / fine) if fine else math.inf


def add_tableau(name: str, tableau: Tableau) -> None:
    """Makes a tableau a row of TABLEAUS, once its order is measured.

    Raises ValueError where its order of convergence falls short of the one it states.
    """
    got = measured_order(tableau)
    if not got > tableau.order - 0.3:
        raise ValueError(
            f"tableau {name!r} converges with order {got:.1f}, not the stated {tableau.order}; "
            "check its weights"
        )
    TABLEAUS[name] = tableau


def step(name: str) -> Step:
    """The step of a row of TABLEAUS. Raises ValueError for an unknown one."""
    if name not in TABLEAUS:
        raise unknown_name("tableau", name, TABLEAUS)
    return partial(exponential_rk, tableau=TABLEAUS[name])


_END = [(4.0, 2, 1.0), (-8.0, 3, 1.0)]
_LAST = [(-1.0, 2, 1.0), (4.0, 3, 1.0)]
_HALF = [(1.0, 2, 0.5)]
# Hochbruck & Ostermann's a_52, which is a_53 as well.
_A_52 = [(0.5, 2, 0.5), (-1.0, 3, 1.0), (0.25, 2, 1.0), (-0.5, 3, 0.5)]
_MINUS_A_52 = [(-f, k, c) for f, k, c in _A_52]

TABLEAUS: dict[str, Tableau] = {
    "res_2s": Tableau(
        2, (0.0, 0.5), {(2, 1): [(2.0, 2, 1.0)]}, "Hochbruck & Ostermann 2005, with c_2 = 1/2"
    ),
    "dpmpp_3s": Tableau(
        3,
        (0.0, 1 / 3, 2 / 3),
        {(2, 1): [(4 / 3, 2, 2 / 3)], (3, 2): [(1.5, 2, 1.0)]},
        "DPM-Solver-3 (arXiv:2206.00927) in the denoised sample",
    ),
    "etd3": Tableau(
        3,
        (0.0, 0.5, 1.0),
        {(2, 1): [(2.0, 1, 1.0)], (3, 1): _END, (3, 2): _LAST},
        "Cox & Matthews 2002, ETD3RK",
    ),
    "krogstad": Tableau(
        4,
        (0.0, 0.5, 0.5, 1.0),
        {
            (2, 1): _HALF,
            (3, 2): [(2.0, 2, 1.0)],
            (4, 1): [(2.0, 2, 1.0), (-4.0, 3, 1.0)],
            (4, 2): [(2.0, 2, 1.0), (-4.0, 3, 1.0)],
            (4, 3): _LAST,
        },
        "Krogstad 2005, ETDRK4-B",
    ),
    "hochbruck_ostermann": Tableau(
        4,
        (0.0, 0.5, 0.5, 1.0, 0.5),
        {
            (2, 1): _HALF,
            (3, 1): [(1.0, 2, 1.0)],
            (3, 2): [(1.0, 2, 1.0)],
            (4, 1): _A_52,
            (4, 2): _A_52,
            (4, 3): [(0.25, 2, 0.5), *_MINUS_A_52],
            (5, 3): _LAST,
            (5, 4): _END,
        },
        "Hochbruck & Ostermann 2005, five stages: order 4 for stiff problems too",
    ),
}
