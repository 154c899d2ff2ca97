"""Likelihoods by the probability-flow ODE: log densities and bits per dimension."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .common import numbers
from .common.tensors import append_dims, recordable, widen
from .common.text import unknown_name
from .schedules import check_range
from .solvers.context import evaluate

# The distributions of Hutchinson's probe vector: mean 0, covariance 1.
PROBES: dict[str, Callable[[Tensor], Tensor]] = {
    "rademacher": lambda x: torch.randint_like(x, 2) * 2 - 1,
    "gaussian": lambda x: torch.randn_like(x),
}


@torch.inference_mode(False)
@torch.no_grad()
def log_likelihood(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    *,
    probes: int = 1,
    probe: str = "rademacher",
    prior_std: float | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The log density, in nats, of x under the model's distribution at noise level sigma_min.

    The ODE carries x to sigma_max, where the prior is N(0, prior_std^2), and the trace of its
    Jacobian is integrated on the way (Song et al. 2021, arXiv:2011.13456, appendix D.2), estimated
    with Hutchinson's probes, which stay fixed over the solve. A Rademacher probe is exact for a
    diagonal Jacobian.

    x: (n, ...), clean samples. atol, rtol: tolerances of the adaptive Dormand-Prince solver.
    probes: how many vectors to average over. probe: "rademacher" or "gaussian". prior_std:
    sigma_max unless given. The model gets x's dtype; all else is float32, or float64 as x is.
    Returns (n,) and a dict with `fevals` and `nfe`, the number of model evaluations, and, for
    several probes, `probe_standard_error` (n,). Raises ValueError for sigma_min >= sigma_max, an
    unknown probe, probes < 1, and a model whose estimate has another shape, isn't finite, or has no
    gradient with respect to x.
    """
    from torchdiffeq import odeint

    sigma_min, sigma_max = check_range(sigma_min, sigma_max)
    if probe not in PROBES:
        raise unknown_name("probe", probe, PROBES)
    if probes < 1:
        raise ValueError(f"the trace needs at least one probe, got {probes}")
    numbers.non_negative(atol=atol, rtol=rtol)
    if prior_std is not None:
        numbers.positive(prior_std=prior_std)
    extra_args = {name: recordable(value) for name, value in (extra_args or {}).items()}
    dtype, x = x.dtype, widen(x)
    vs = [PROBES[probe](x) for _ in range(probes)]
    nfe = 0

    def slope(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal nfe
        nfe += 1
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            denoised = evaluate(model, x.to(dtype), float(sigma), dtype, **extra_args)
            if not denoised.requires_grad:
                raise ValueError(
                    "the model's estimate has no gradient, so its divergence is unknown; let the "
                    "model run without no_grad, and without guidance by a loss"
                )
            if not denoised.isfinite().all():
                raise ValueError(f"the model's estimate at sigma = {float(sigma):g} isn't finite")
            d = (x - denoised) / append_dims(sigma, x.ndim)
        traces = []
        for i, v in enumerate(vs):
            (vjp,) = torch.autograd.grad(d, x, v, retain_graph=i + 1 < len(vs))
            traces.append((v * vjp).flatten(1).sum(1))
        return d.detach(), torch.stack(traces)

    t = x.new_tensor([sigma_min, sigma_max])
    time_dtype = torch.float32 if x.device.type == "mps" else torch.float64
    latents, deltas = odeint(
        slope,
        (x, x.new_zeros([probes, len(x)])),
        t,
        rtol=rtol,
        atol=atol,
        method="dopri5",
        options={"dtype": time_dtype},
    )
    prior = torch.distributions.Normal(0.0, sigma_max if prior_std is None else prior_std)
    log_prior = prior.log_prob(latents[-1]).flatten(1).sum(1)
    info: dict[str, Any] = {"fevals": nfe, "nfe": nfe}
    if probes > 1:
        info["probe_standard_error"] = deltas[-1].std(0) / math.sqrt(probes)
    return log_prior + deltas[-1].mean(0), info


def bits_per_dim(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    *,
    bins: int = 256,
    sigma_data: float = 0.0,
    probes: int = 1,
    probe: str = "rademacher",
) -> tuple[Tensor, dict[str, Any]]:
    """Bits per dimension of quantised images, an upper bound in expectation over its noise.

    Uniform dequantisation (Theis et al. 2016, arXiv:1511.01844): level k of `bins` spreads over its
    bin of [-1, 1], of width 2 / bins, and bits = -ll / (D ln 2) + log2(bins / 2).

    x: (n, ...) in [-1, 1], level k at 2 k / (bins - 1) - 1. sigma_data: the data's standard
    deviation; the prior then has that of the data with noise, sqrt(sigma_max^2 + sigma_data^2).
    Other arguments: as in log_likelihood. Returns (n,) and log_likelihood's info with `mean` and
    `standard_error` over the n images (NaN for a single one). Raises ValueError where x leaves
    [-1, 1], and for fewer than 2 bins.
    """
    if bins < 2:
        raise ValueError(f"quantised images have at least 2 bins, got {bins}")
    low, high = torch.aminmax(x)
    if not (low >= -1 and high <= 1):
        raise ValueError(f"images must lie in [-1, 1], got [{float(low):g}, {float(high):g}]")
    level = ((x + 1) * ((bins - 1) / 2)).round()
    dequantised = (level + torch.rand_like(x)) * (2 / bins) - 1
    ll, info = log_likelihood(
        model,
        dequantised,
        sigma_min,
        sigma_max,
        extra_args,
        atol,
        rtol,
        probes=probes,
        probe=probe,
        prior_std=math.hypot(float(sigma_max), sigma_data),
    )
    bits = -ll / (x[0].numel() * math.log(2)) + math.log2(bins / 2)
    n = len(bits)
    info["mean"] = float(bits.mean())
    info["standard_error"] = float(bits.std()) / math.sqrt(n) if n > 1 else math.nan
    return bits, info
