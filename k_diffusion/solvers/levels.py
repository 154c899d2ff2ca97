"""How far down a step goes before fresh noise brings the sample back up to the next noise level.

Every split keeps the variance exact: sigma_down^2 + sigma_up^2 = sigma_next^2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

# (sigma, sigma_next) -> (sigma_down, sigma_up)
Levels: TypeAlias = Callable[[float, float], tuple[float, float]]


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """The noise level to step down to, and the noise to add, in ancestral sampling.

    At eta = 1 the added noise has the variance of the forward process's posterior (DDPM,
    arXiv:2006.11239, equation 7, in variance-exploding form); at eta = 0 there is none, and the
    result is (sigma_to, 0.0). sigma_from, sigma_to: floats or tensors. Returns the same kind.
    """
    if not eta:
        return sigma_to, 0.0
    if isinstance(sigma_from, torch.Tensor) or isinstance(sigma_to, torch.Tensor):
        sigma_to = torch.as_tensor(sigma_to)
        ratio = torch.where(sigma_to == 0, 0.0, sigma_to / sigma_from)
        sigma_up = torch.minimum(sigma_to, eta * sigma_to * (1 - ratio**2).clamp(min=0).sqrt())
        return (sigma_to**2 - sigma_up**2).clamp(min=0).sqrt(), sigma_up
    if sigma_to == 0:
        return 0.0, 0.0
    sigma_up = min(sigma_to, eta * sigma_to * math.sqrt(max(0.0, 1 - (sigma_to / sigma_from) ** 2)))
    return math.sqrt(sigma_to**2 - sigma_up**2), sigma_up


def get_sde_step(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """The split of the SDE solvers, DPM-Solver++ (arXiv:2211.01095, section 5) with a noise scale.

    With h = log(sigma / sigma_next), the ODE runs for (1 + eta) h and noise fills up the rest:
    sigma_down = sigma exp(-(1 + eta) h). At eta = 1 that is the reverse-time SDE, at 0 the ODE.
    """
    if not eta or sigma_next == 0:
        return sigma_next, 0.0
    eta_h = eta * math.log(sigma / sigma_next)
    return sigma_next * math.exp(-eta_h), sigma_next * math.sqrt(max(0.0, -math.expm1(-2 * eta_h)))


def ode(sigma: float, sigma_next: float) -> tuple[float, float]:
    """No noise: the probability-flow ODE."""
    return sigma_next, 0.0


def ancestral(eta: float) -> Levels:
    """get_ancestral_step at a fixed eta."""
    return lambda sigma, sigma_next: get_ancestral_step(sigma, sigma_next, eta)


def sde(eta: float) -> Levels:
    """get_sde_step at a fixed eta."""
    return lambda sigma, sigma_next: get_sde_step(sigma, sigma_next, eta)


@dataclass(frozen=True)
class Churn:
    """Noise added before a step: Karras et al. 2022, algorithm 2."""

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf

    def sigma_hat(self, sigma: float, steps: int) -> float:
        """The noise level to raise sigma to."""
        # Float32 rounding of a schedule must not decide whether its end is inside the interval.
        if not self.s_tmin * (1 - 1e-6) <= sigma <= self.s_tmax * (1 + 1e-6):
            return sigma
        return sigma * (1 + min(max(self.s_churn, 0.0) / steps, math.sqrt(2) - 1))
