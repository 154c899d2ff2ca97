"""DPM-Solver in eps form (arXiv:2206.00927): fixed plans of mixed orders, and an adaptive solver.

Time is t = lambda = -log sigma, which the noise level in variance-exploding form makes of it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common import numbers
from ..noise import ask
from .context import evaluate, start_run
from .noise_plan import get_ancestral_step

Time = float | Tensor
EpsCache = dict[str, Tensor]


class PIDStepSizeController:
    """Step size control by the errors of the last three steps (Söderlind 2003).

    h: first step size. pcoeff, icoeff, dcoeff: coefficients of the PID controller. order: of the
    error estimate. accept_safety: the least growth factor at which a step is accepted.
    """

    def __init__(
        self,
        h: float,
        pcoeff: float,
        icoeff: float,
        dcoeff: float,
        order: float = 1,
        accept_safety: float = 0.81,
        eps: float = 1e-8,
    ):
        self.h = h
        self.exponents = (
            (pcoeff + icoeff + dcoeff) / order,
            -(pcoeff + 2 * dcoeff) / order,
            dcoeff / order,
        )
        self.accept_safety = accept_safety
        self.eps = eps
        self.inv_errors: list[float] = []

    def limiter(self, factor: float) -> float:
        """A smooth limit of the growth factor to (1 - pi / 4, 1 + pi / 2)."""
        return 1 + math.atan(factor - 1)

    def propose_step(self, error: float | Tensor) -> bool:
        """Takes a step's error relative to the tolerance, of shape (), and sets the next h.

        Returns whether the step is accepted.
        """
        inv_error = 1 / (float(error) + self.eps)
        if not self.inv_errors:
            self.inv_errors = [inv_error] * 3
        self.inv_errors[0] = inv_error
        factor = math.prod(e**b for e, b in zip(self.inv_errors, self.exponents))
        factor = self.limiter(factor)
        accept = factor >= self.accept_safety
        if accept:
            self.inv_errors = [inv_error, *self.inv_errors[:2]]
        self.h *= factor
        return accept


class DPMSolver(nn.Module):
    """DPM-Solver (arXiv:2206.00927) of orders 1 to 3.

    model: (x, sigma, **extra_args) -> denoised. eps_callback: called after each evaluation.
    info_callback: called with a dict at each step. Times are floats or 0-d tensors.
    x: (n, ...). Steps return the sample at t_next and the evaluations so far, which a step of
    another order can use again.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        extra_args: Mapping[str, Any] | None = None,
        eps_callback: Callable[[], Any] | None = None,
        info_callback: Callable[[dict[str, Any]], Any] | None = None,
    ):
        super().__init__()
        self.model = model
        self.extra_args = {} if extra_args is None else extra_args
        self.eps_callback = eps_callback
        self.info_callback = info_callback

    def t(self, sigma: Any) -> Any:
        """The time of a noise level, a float or a tensor."""
        return -sigma.log() if isinstance(sigma, Tensor) else -math.log(sigma)

    def sigma(self, t: Any) -> Any:
        """The noise level at a time, a float or a tensor."""
        return t.neg().exp() if isinstance(t, Tensor) else math.exp(-t)

    def eps(
        self, eps_cache: EpsCache, key: str, x: Tensor, t: Time, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, EpsCache]:
        """The noise that the model sees in x at time t, from the cache if `key` is there."""
        if key in eps_cache:
            return eps_cache[key], eps_cache
        sigma = self.sigma(float(t))
        denoised = evaluate(self.model, x, sigma, x.dtype, *args, **self.extra_args, **kwargs)
        eps = (x - denoised) / sigma
        if self.eps_callback is not None:
            self.eps_callback()
        return eps, {key: eps, **eps_cache}

    def dpm_solver_1_step(
        self, x: Tensor, t: Time, t_next: Time, eps_cache: EpsCache | None = None
    ) -> tuple[Tensor, EpsCache]:
        """DPM-Solver-1, which is DDIM: equation 3.7."""
        t, t_next = float(t), float(t_next)
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        return x - eps * (self.sigma(t_next) * math.expm1(t_next - t)), cache

    def dpm_solver_2_step(
        self,
        x: Tensor,
        t: Time,
        t_next: Time,
        r1: float = 1 / 2,
        eps_cache: EpsCache | None = None,
    ) -> tuple[Tensor, EpsCache]:
        """DPM-Solver-2, with its inner evaluation at the fraction r1 of the step: algorithm 4."""
        t, t_next = float(t), float(t_next)
        h = t_next - t
        s1 = t + r1 * h
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        u1 = x - eps * (self.sigma(s1) * math.expm1(r1 * h))
        eps_r1, cache = self.eps(cache, "eps_r1", u1, s1)
        scale = self.sigma(t_next) * math.expm1(h)
        return x - eps * scale - (eps_r1 - eps) * (scale / (2 * r1)), cache

    def dpm_solver_3_step(
        self,
        x: Tensor,
        t: Time,
        t_next: Time,
        r1: float = 1 / 3,
        r2: float = 2 / 3,
        eps_cache: EpsCache | None = None,
    ) -> tuple[Tensor, EpsCache]:
        """DPM-Solver-3, with inner evaluations at r1 and r2 of the step: algorithm 5."""
        t, t_next = float(t), float(t_next)
        h = t_next - t
        s1, s2 = t + r1 * h, t + r2 * h
        eps, cache = self.eps(eps_cache or {}, "eps", x, t)
        u1 = x - eps * (self.sigma(s1) * math.expm1(r1 * h))
        eps_r1, cache = self.eps(cache, "eps_r1", u1, s1)
        curve = math.expm1(r2 * h) / (r2 * h) - 1
        u2 = (
            x
            - eps * (self.sigma(s2) * math.expm1(r2 * h))
            - (eps_r1 - eps) * (self.sigma(s2) * (r2 / r1) * curve)
        )
        eps_r2, cache = self.eps(cache, "eps_r2", u2, s2)
        sigma_next, curve = self.sigma(t_next), math.expm1(h) / h - 1
        x = x - eps * (sigma_next * math.expm1(h)) - (eps_r2 - eps) * (sigma_next / r2 * curve)
        return x, cache

    def _split(self, t: float, t_next: float, t_end: float, eta: float) -> tuple[float, float]:
        """The time to step to, and the noise that then leads back to t_next."""
        if not eta:
            return t_next, 0.0
        sigma_next = self.sigma(t_next)
        sigma_down, _ = get_ancestral_step(self.sigma(t), sigma_next, eta)
        t_down = min(t_end, self.t(sigma_down)) if sigma_down > 0 else t_end
        return t_down, math.sqrt(max(0.0, sigma_next**2 - self.sigma(t_down) ** 2))

    def _noise(
        self, noise_sampler: Any, x: Tensor, t: float, t_next: float, scale: float
    ) -> Tensor:
        # Asked even where its scale is 0: seeds depend on it.
        like = torch.empty((), dtype=torch.float32)
        noise = ask(noise_sampler, self.sigma(t), self.sigma(t_next), like)
        return x + noise * scale if scale else x

    def _default_noise(self, x: Tensor, noise_sampler: Any) -> Any:
        if noise_sampler is not None:
            return noise_sampler
        raise ValueError(
            "a noise_sampler is needed; pass one, or use k_diffusion.sampling.DPMSolver, which "
            "makes its own"
        )

    def _info(self, x: Tensor, t: float, **info: Any) -> None:
        if self.info_callback is not None:
            at = torch.tensor(t, dtype=torch.float32)
            self.info_callback({"x": x, "t": at, "t_up": at, **info})

    def dpm_solver_fast(
        self,
        x: Tensor,
        t_start: Time,
        t_end: Time,
        nfe: int,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """DPM-Solver-fast: steps of order 3, finished by lower ones, `nfe` evaluations in all.

        Raises ValueError if nfe < 1, and for eta > 0 against the direction of sampling.
        """
        t_start, t_end = float(t_start), float(t_end)
        if nfe < 1:
            raise ValueError(f"DPM-Solver-fast needs at least one evaluation, got {nfe}")
        self._check_direction(t_start, t_end, eta)
        noise_sampler = self._default_noise(x, noise_sampler)
        start_run(self.model)
        n = nfe // 3 + 1
        orders = [3] * (n - 2) + [2, 1] if nfe % 3 == 0 else [3] * (n - 1) + [nfe % 3]
        ts = [t_start + (t_end - t_start) * i / n for i in range(n)] + [t_end]
        steps: dict[int, Any] = {
            1: self.dpm_solver_1_step,
            2: self.dpm_solver_2_step,
            3: self.dpm_solver_3_step,
        }
        for i, order in enumerate(orders):
            t, t_next = ts[i], ts[i + 1]
            t_down, sigma_up = self._split(t, t_next, t_end, eta)
            eps, cache = self.eps({}, "eps", x, t)
            self._info(x, t, i=i, denoised=x - eps * self.sigma(t))
            x, _ = steps[order](x, t, t_down, eps_cache=cache)
            x = self._noise(noise_sampler, x, t, t_next, sigma_up * s_noise)
        return x

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        t_start: Time,
        t_end: Time,
        order: int = 3,
        rtol: float = 0.05,
        atol: float = 0.0078,
        h_init: float = 0.05,
        pcoeff: float = 0.0,
        icoeff: float = 1.0,
        dcoeff: float = 0.0,
        accept_safety: float = 0.81,
        eta: float = 0.0,
        s_noise: float = 1.0,
        noise_sampler: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, int]]:
        """DPM-Solver-12 or -23 with adaptive steps (section 3.4), controlled for the whole batch.

        order: 2 or 3, of the step that is taken; one order less estimates its error. rtol, atol:
        tolerances. h_init: first step in t. Returns the sample and the counts steps, nfe, n_accept
        and n_reject. Raises ValueError for another order, for eta > 0 against the direction of
        sampling, and where the error is no longer finite.
        """
        t_start, t_end = float(t_start), float(t_end)
        if order not in (2, 3):
            raise ValueError(f"the adaptive DPM-Solver has order 2 or 3, got {order}")
        numbers.non_negative(rtol=rtol, atol=atol)
        if not rtol and not atol:
            raise ValueError("rtol and atol can't both be 0; no step would be accepted")
        numbers.positive(h_init=abs(h_init))
        numbers.finite(pcoeff=pcoeff, icoeff=icoeff, dcoeff=dcoeff)
        # the limit of `PIDStepSizeController.limiter`
        if not accept_safety < 1 + math.pi / 2:
            raise ValueError(
                f"accept_safety must be below 1 + pi / 2, the most that a step can grow by, got "
                f"{accept_safety}"
            )
        self._check_direction(t_start, t_end, eta)
        noise_sampler = self._default_noise(x, noise_sampler)
        start_run(self.model)
        direction = 1 if t_end > t_start else -1
        pid = PIDStepSizeController(
            direction * abs(h_init), pcoeff, icoeff, dcoeff, 1.5 if eta else order, accept_safety
        )
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        s, x_prev = t_start, x
        while direction * (t_end - s) > 1e-5:
            t = min(t_end, s + pid.h) if direction > 0 else max(t_end, s + pid.h)
            t_down, sigma_up = self._split(s, t, t_end, eta)
            eps, cache = self.eps({}, "eps", x, s)
            denoised = x - eps * self.sigma(s)
            if order == 2:
                x_low, cache = self.dpm_solver_1_step(x, s, t_down, eps_cache=cache)
                x_high, cache = self.dpm_solver_2_step(x, s, t_down, eps_cache=cache)
            else:
                x_low, cache = self.dpm_solver_2_step(x, s, t_down, r1=1 / 3, eps_cache=cache)
                x_high, cache = self.dpm_solver_3_step(x, s, t_down, eps_cache=cache)
            delta = torch.maximum(x_low.abs(), x_prev.abs()).mul(rtol).clamp(min=atol)
            error = torch.linalg.vector_norm((x_low - x_high) / delta) / x.numel() ** 0.5
            if not math.isfinite(float(error)):
                raise ValueError(
                    f"the error estimate at sigma = {self.sigma(s):.4g} is {float(error)}; check "
                    "the model for NaN or inf there"
                )
            if pid.propose_step(error):
                x_prev = x_low
                x = self._noise(noise_sampler, x_high, s, t, sigma_up * s_noise)
                s = t
                info["n_accept"] += 1
            else:
                info["n_reject"] += 1
            info["nfe"] += order
            info["steps"] += 1
            i = info["steps"] - 1
            self._info(x, s, i=i, denoised=denoised, error=error, h=pid.h, **info)
        return x, info

    def _check_direction(self, t_start: float, t_end: float, eta: float) -> None:
        if eta and not t_end > t_start:
            raise ValueError(f"noise can be added only where sigma falls; eta must be 0, got {eta}")
