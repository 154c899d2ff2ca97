"""Weights of interpolatory formulas: integrals of Lagrange polynomials, on the host."""

from collections.abc import Callable, Sequence

import numpy as np

Function = Callable[[np.ndarray], np.ndarray]

# Gauss-Legendre: exact for polynomials to degree 47, and to rounding for what solvers integrate.
_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(24)


def integral(f: Function, a: float, b: float) -> float:
    """The integral of a smooth f from a to b; f takes and returns arrays."""
    half = (b - a) / 2
    return half * float(_WEIGHTS @ f(a + half + half * _POINTS))


def lagrange_integrals(
    nodes: Sequence[float], a: float, b: float, weight: Function, time: Function | None = None
) -> list[float]:
    """For each node j the integral from a to b of weight(u) l_j(time(u)) du.

    l_j is the Lagrange polynomial of the nodes that is 1 at node j. time: u itself unless given.
    """
    half = (b - a) / 2
    u = a + half + half * _POINTS
    w = half * _WEIGHTS * weight(u)
    t = u if time is None else time(u)
    weights = []
    for j, node in enumerate(nodes):
        basis = w
        for k, other in enumerate(nodes):
            if k != j:
                basis = basis * ((t - other) / (node - other))
        weights.append(float(basis.sum()))
    return weights
