"""The time of the VP schedule: Karras et al. 2022 (arXiv:2206.00364), table 1 and appendix C."""

import math
from typing import Any

import numpy as np


def vp_time(sigma: Any, beta_d: float = 19.9, beta_min: float = 0.1) -> Any:
    """The time of a noise level in the VP schedule: the inverse of `vp_sigma`."""
    return (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(sigma**2)) - beta_min) / beta_d


def vp_sigma(t: Any, beta_d: float = 19.9, beta_min: float = 0.1) -> Any:
    """The noise level at a time from 0 to 1, as `get_sigmas_vp` has it."""
    return np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t))


def _between(lo: float, hi: float, eps_s: float) -> tuple[float, float]:
    """beta_d and beta_min of the VP schedule with lo at time eps_s and hi at 1."""
    log_lo, log_hi = math.log1p(lo**2), math.log1p(hi**2)
    beta_d = 2 * (log_lo / eps_s - log_hi) / (eps_s - 1)
    return beta_d, log_hi - beta_d / 2


# Of the noise levels 0.002 to 80, EDM's: what DEIS in applications takes for any model.
EDM_BETA_D, EDM_BETA_MIN = _between(0.002, 80.0, 1e-3)
