"""Adams methods in lambda = -log sigma: a multistep predictor and, if wanted, its corrector.

The exact solution over a step of h is x' = e^-h x + (integral of e^(u - h) D du from 0 to h). A
method puts the polynomial through known values of D in place of D. Where noise is added the steps
are longer than the way between the noise levels, by 1 + eta for a reverse-time SDE: u is stretched
alike.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from .context import Context, Step, check_order
from .exponential import phi_1
from .noise_plan import get_sde_step
from .quadrature import lagrange_integrals

# (nodes, h) -> a weight for the value of D at each node u. The first node is 0 unless it is new.
Weights: TypeAlias = Callable[[Sequence[float], float], list[float]]


def adams_weights(nodes: Sequence[float], h: float) -> list[float]:
    """The integrals of e^(u - h) and the Lagrange polynomials of the nodes."""
    return lagrange_integrals(nodes, 0.0, h, lambda u: np.exp(u - h))


def uni_pc_weights(nodes: Sequence[float], h: float, variant: str) -> list[float]:
    """UniPC's: a_1 = 1/2 of B(h) for a single difference, whose exact weight isn't needed.

    With several differences the order conditions (arXiv:2302.04867) on a cancel B(h).
    """
    if len(nodes) != 2:
        return adams_weights(nodes, h)
    at = nodes.index(0.0)
    difference = UNI_PC_B[variant](h) * h / (2 * nodes[1 - at])
    whole = phi_1(h)
    return [whole - difference if i == at else difference for i in range(2)]


# B(h), between the first two terms of which the order conditions leave a choice.
UNI_PC_B: dict[str, Callable[[float], float]] = {
    "bh1": lambda h: h,
    "bh2": phi_1,
}


@dataclass(frozen=True)
class Past:
    """What a step leaves to the next.

    values: (noise level, D) pairs, newest first. h: its length. stretch: of u against lambda.
    integral: of the polynomial it took for D. order: the number of values in that.
    """

    values: tuple[tuple[float, Tensor], ...]
    h: float
    stretch: float
    integral: Tensor
    order: int


def _integral(
    values: Sequence[tuple[float, Tensor]], start: float, h: float, stretch: float, weights: Weights
) -> Tensor:
    """The integral over a step of h from the noise level `start`, of the polynomial in values."""
    nodes = [stretch * math.log(start / sigma) for sigma, _ in values]
    terms = [d * w for w, (_, d) in zip(weights(nodes, h), values)]
    return sum(terms[1:], start=terms[0])


def exponential_adams(
    ctx: Context,
    x: Tensor,
    sigma: float,
    sigma_next: float,
    denoised: Tensor,
    state: Past | None,
    order: int,
    correct: Callable[[int], int] = lambda order: 0,
    weights: Weights = adams_weights,
    lower_order_final: bool = True,
) -> tuple[Tensor, Past | None]:
    """A step of an exponential Adams-Bashforth(-Moulton) method in PEC mode.

    Before the step it corrects the last one, by D at where that led; the noise added there stays.
    order: of the predictor, lower at first. correct: the number of values that the corrector takes
    after a predictor of an order, the new one among them; 0 for none.
    """
    values = ((sigma, denoised), *(state.values if state else ()))
    keep = max(order, correct(order)) - 1
    if state and (n := correct(state.order)):
        start = state.values[0][0]
        better = _integral(values[:n], start, state.h, state.stretch, weights)
        x = x + (better - state.integral)
    if sigma_next == 0:
        return denoised, None
    order = min(ctx.order(sigma, order, lower_order_final), len(values))
    h = math.log(sigma / sigma_next)
    stretch = h / math.log(sigma / ctx.ahead(sigma)[0])
    integral = _integral(values[:order], sigma, h, stretch, weights)
    past = Past(values[: max(keep, 1)], h, stretch, integral, order)
    return x * (sigma_next / sigma) + integral, past


def uni_pc(variant: str, order: int, corrector: bool, lower_order_final: bool) -> Callable:
    """UniPC (arXiv:2302.04867): UniP-p, and UniC-p, which takes the new value as well."""
    return partial(
        exponential_adams,
        order=order,
        correct=(lambda p: p + 1) if corrector else (lambda p: 0),
        weights=partial(uni_pc_weights, variant=variant),
        lower_order_final=lower_order_final,
    )


def _sa_orders(predictor_order: int, corrector_order: int) -> None:
    check_order(predictor_order, 4, "predictor_order")
    if corrector_order:
        check_order(corrector_order, 4, "corrector_order")


def sa_solver(predictor_order: int, corrector_order: int, lower_order_final: bool) -> Step:
    """SA-Solver (arXiv:2309.05019) in PEC mode. Raises ValueError for orders other than 1 to 4."""
    _sa_orders(predictor_order, corrector_order)
    return partial(
        exponential_adams,
        order=predictor_order,
        correct=lambda order: min(corrector_order, order + 1),
        lower_order_final=lower_order_final,
    )


def sa_solver_pece(
    predictor_order: int,
    corrector_order: int,
    lower_order_final: bool,
    eta: Callable[[float], float],
) -> Step:
    """SA-Solver that corrects within its step, whose noise both samples share: PECE mode.

    eta: tau^2 by the noise level. Raises ValueError for orders other than 1 to 4.
    """
    _sa_orders(predictor_order, corrector_order)

    def step(
        ctx: Context, x: Tensor, sigma: float, sigma_next: float, denoised: Tensor, state: Any
    ) -> tuple[Tensor, Any]:
        if sigma_next == 0:
            return denoised, None
        values = ((sigma, denoised), *(state or ()))[: max(predictor_order, corrector_order, 1)]
        order = min(ctx.order(sigma, predictor_order, lower_order_final), len(values))
        down, up = get_sde_step(sigma, sigma_next, eta(sigma))
        h = math.log(sigma / down)
        stretch = h / math.log(sigma / sigma_next)
        integral = _integral(values[:order], sigma, h, stretch, adams_weights)
        rest = x * (down / sigma)
        rest = rest + ctx.noise(sigma, sigma_next) * up if up else rest
        if n := min(corrector_order, order + 1):
            new = ctx.denoise(rest + integral, sigma_next)
            nodes = ((sigma_next, new), *values)[:n]
            integral = _integral(nodes, sigma, h, stretch, adams_weights)
        return rest + integral, values

    return step
