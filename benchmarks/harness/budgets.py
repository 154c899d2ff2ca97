"""Samples by a budget of model evaluations: what the sampler benchmarks measure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import k_diffusion as K

ROOT = Path(__file__).parents[2]
BUDGETS = [4, 8, 16, 32, 64]
# The adaptive one's step size follows a tolerance, so it can't be given a budget. CFG++ needs
# guidance, without which it is the plain sampler.
SAMPLERS = {
    n: i for n, i in K.sampling.SAMPLERS.items() if n != "dpm_adaptive" and "cfg_pp" not in n
}


class Counted:
    """A denoiser that counts its evaluations."""

    def __init__(self, model: Any):
        self.model, self.calls = model, 0

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        self.calls += 1
        return self.model(x, sigma, **extra)


def sample(
    model: Any,
    name: str,
    budget: int,
    x: torch.Tensor,
    sigma_min: float,
    sigma_max: float,
    schedule: str = "karras",
    extra_args: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
    **options: Any,
) -> torch.Tensor:
    """Samples by at most `budget` evaluations, the last one of the step from sigma_min to 0.

    x: noise of standard deviation sigma_max. seeds: one per image. options: of the sampler.
    """
    info, model, extra = SAMPLERS[name], Counted(model), dict(extra_args or {})
    options |= {"extra_args": extra, "disable": True}
    if name == "dpm_fast":
        x = K.sampling.sample(
            model, x, [sigma_max, sigma_min], name, seeds, n=budget - 1, **options
        )
        x = model(x, torch.full((len(x),), sigma_min).to(x), **extra)
    else:
        left = budget - 1
        if name == "restart":
            again = budget // 8 if budget >= 16 else 0
            options["restarts"] = [(0.1, 2.0, again, 1)] if again else []
            left -= again * info.evaluations
        steps = left // info.evaluations + 1
        if name == "pndm":  # four evaluations in each of its first three steps
            steps = 1 + (left // 4 if left < 12 else left - 9)
        sigmas = K.sampling.make_sigmas(schedule, steps, sigma_min, sigma_max)
        x = K.sampling.sample(model, x, sigmas.to(x.dtype), name, seeds, **options)
    assert model.calls <= budget, (name, budget, model.calls)
    return x
