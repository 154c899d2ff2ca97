"""Guidance as wrappers from denoiser to denoiser, so that it composes with every sampler.

All are called as the models they wrap, `model(x, sigma, **cond)` with x: (n, ...) and sigma: (n,),
and return the guided estimate of the clean sample, like x. They wrap each other, too:

    model = CFGDenoiser(model, 4, combine=Rescaled(0.7), class_cond=null)
    model = ThresholdedDenoiser(IntervalDenoiser(model, 0.3, 5.0), percentile=0.995)

A scale is a number, or a function of sigma: (n,) that gives one for each sample, (n,).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .schedules import Sigmas, read_sigmas
from .solvers.context import at_level, start_run
from .utils import append_dims, widen

Scale: TypeAlias = float | Callable[[Tensor], Tensor]
# (given, without, scale, sigma) -> guided: two estimates and how far to go from one to the other.
Combine: TypeAlias = Callable[[Tensor, Tensor, Any, Tensor], Tensor]


def _at(scale: Scale, sigma: Tensor, like: Tensor) -> Any:
    """A scale at a noise level, to be multiplied with a tensor (n, ...)."""
    return append_dims(scale(sigma).to(like.dtype), like.ndim) if callable(scale) else scale


def _dims(x: Tensor) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


class Guidance(nn.Module):
    """What the wrappers share: they hand on what a sampler says of its run.

    parts: the attributes that may be guidance themselves. Where the host knows the noise level, a
    wrapper gets it as `host_sigma` beside the tensor sigma.
    """

    parts: tuple[str, ...] = ("model",)

    def start_run(self) -> None:
        """Samplers call it before their first step: memories of an earlier run are dropped."""
        for name in self.parts:
            start_run(getattr(self, name))

    def at_level(self, sigma: float) -> Any:
        """The denoiser to call at a noise level that the host knows."""
        return partial(self, host_sigma=sigma)


# ------------------------------------------------------------------ how two estimates are combined


def linear(given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
    """without + scale * (given - without)."""
    return torch.lerp(without, given, scale)


class Rescaled:
    """Linear guidance that keeps the contrast of the estimate `given` (arXiv:2305.08891, eq. 15).

    Each guided sample is scaled to the standard deviation of `given`, and the result mixed with the
    plain one: phi of 0 is plain, 1 all rescaled; the paper takes 0.7. Here both are denoised
    samples. Raises ValueError for phi outside [0, 1].
    """

    def __init__(self, phi: float = 0.7):
        if not 0 <= phi <= 1:
            raise ValueError(f"phi must lie between 0 and 1, got {phi}")
        self.phi = phi

    def __call__(self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
        guided = linear(given, without, scale, sigma)
        std, std_guided = (y.std(_dims(y), correction=0, keepdim=True) for y in (given, guided))
        ratio = std / std_guided.clamp(min=_tiny(std))
        # A guided estimate without contrast has none to restore.
        ratio = torch.where(std_guided > 0, ratio, 1)
        return torch.lerp(guided, guided * ratio, self.phi)


class APG:
    """Adaptive projected guidance (arXiv:2410.02416): strong guidance without oversaturation.

    The difference of the two estimates is averaged with those of earlier steps, shortened to
    max_norm, and its part parallel to `given`, which saturates, is multiplied by eta; eta 1 is
    linear guidance. The paper takes a max_norm of 2.5 to 15, and a momentum of -0.5 to -0.75, which
    pushes away from the steps before.

    With momentum it has a memory, so one object guides one run at a time. The samplers of this
    package clear it as they start; else `start_run()` does, or a call at more than twice the noise
    level of the one before it. Raises ValueError for a max_norm that isn't positive or a momentum
    outside (-1, 1).
    """

    def __init__(self, eta: float = 0.0, max_norm: float = math.inf, momentum: float = 0.0):
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum must lie between -1 and 1, got {momentum}")
        self.eta, self.max_norm, self.momentum = eta, max_norm, momentum
        self.start_run()

    def start_run(self) -> None:
        """Forget the steps before."""
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, given: Tensor, without: Tensor, scale: Any, sigma: Tensor) -> Tensor:
        diff = given - without
        if self.momentum:
            diff = self._averaged(diff, sigma)
        diff = diff * (self.max_norm / self._norm(diff)).clamp(max=1)
        unit = given / self._norm(given)
        parallel = (diff * unit).sum(_dims(diff), keepdim=True) * unit
        return given + (scale - 1) * (diff + (self.eta - 1) * parallel)

    @staticmethod
    def _norm(x: Tensor) -> Tensor:
        return torch.linalg.vector_norm(x, dim=_dims(x), keepdim=True).clamp(min=_tiny(x))

    def _averaged(self, diff: Tensor, sigma: Tensor) -> Tensor:
        if self._last is not None and self._last[0].shape == diff.shape:
            average, last_sigma = self._last
            goes_on = append_dims(sigma <= 2 * last_sigma, diff.ndim)
            diff = diff + self.momentum * torch.where(goes_on, average, 0)
        self._last = diff.detach(), sigma
        return diff


class CFGPlusPlus:
    """The scale of CFG++ (arXiv:2406.08070): `CFGDenoiser(model, CFGPlusPlus(0.6, sigmas), ...)`.

    CFG++ goes to the guided estimate, strength between 0 and 1 of the way from the unconditional to
    the conditional one, but adds the unconditional noise again. In an Euler (DDIM) step from sigma
    to sigma' that is

        x' = D_u + strength (D_c - D_u) + sigma' (x - D_u) / sigma,

    and so is a plain step with classifier-free guidance of scale strength / (1 - sigma' / sigma):
    all that it asks of the sampler is the schedule. The identity is exact for samplers with Euler's
    step (euler, ddim); for others this is the same scale, stronger where steps are shorter.

    sigmas: the run's schedule. The scale at a noise level is that of the nearest one in it. Raises
    ValueError for an ascending schedule.
    """

    def __init__(self, strength: float, sigmas: Sigmas):
        _, host = read_sigmas(sigmas, torch.device("cpu"), False)
        levels = sorted({0.0, *host})
        if len(levels) < 2 or host[0] < host[-1]:
            raise ValueError("CFG++ needs a descending schedule of at least one noise level")
        scales = [strength * b / (b - a) for a, b in pairwise(levels)]
        bounds = [math.sqrt(a * b) for a, b in pairwise(levels[1:])]
        self._scales, self._bounds = torch.tensor(scales), torch.tensor(bounds)

    def __call__(self, sigma: Tensor) -> Tensor:
        if self._scales.device != sigma.device:
            self._scales = self._scales.to(sigma.device, non_blocking=True)
            self._bounds = self._bounds.to(sigma.device, non_blocking=True)
        return self._scales[torch.searchsorted(self._bounds, sigma.to(self._bounds.dtype))]


# ---------------------------------------------------------------------- guidance by another model


def _both(name: str, without: Any, value: Any, n: int) -> Any:
    """A condition for both halves of a batch, first as `without` has it: (2 n, ...)."""
    where = f"the condition {name}"
    if isinstance(value, Mapping):
        if not isinstance(without, Mapping) or without.keys() != value.keys():
            raise ValueError(f"{where} has keys {sorted(value)}, and so must its absence")
        return {k: _both(f"{name}[{k!r}]", without[k], v, n) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        if not isinstance(without, list | tuple) or len(without) != len(value):
            raise ValueError(f"{where} has {len(value)} parts, and so must its absence")
        pairs = enumerate(zip(without, value))
        parts = [_both(f"{name}[{i}]", w, v, n) for i, (w, v) in pairs]
        return tuple(parts) if isinstance(value, tuple) else parts
    if without is value and not (isinstance(value, Tensor) and value.ndim and len(value) == n):
        return value  # not of single samples
    shapes = [tuple(y.shape) if isinstance(y, Tensor) else () for y in (without, value)]
    if not all(s and s[0] in {1, n} and s[1:] == shapes[0][1:] for s in shapes):
        raise ValueError(
            f"{where} has shape {shapes[1]}, and its absence {shapes[0]}; both must be ({n}, ...) "
            "or (1, ...), and alike otherwise"
        )
    return torch.cat([y.expand(n, *y.shape[1:]) for y in (without, value)])


class CFGDenoiser(Guidance):
    """Classifier-free guidance (arXiv 2207.12598): D_uncond + scale * (D_cond - D_uncond).

    model: (x, sigma, **cond) -> denoised, called once with both halves as one batch of 2 n. scale:
    1 is the model itself. combine: how the halves are combined: `linear`, `Rescaled`, `APG`.
    uncond: for each condition that guidance strengthens, the (n, ...) or (1, ...) tensor that
    stands for its absence, e.g. `class_cond=torch.full((n,), num_classes)`; a condition may be a
    dict or a list of tensors, as its absence then is. Both halves get the other conditions: tensors
    (n, ...) twice, whatever else as it is. Raises ValueError where a strengthened condition is
    missing or unlike its absence.
    """

    parts = ("model", "combine")

    def __init__(self, model: nn.Module, scale: Scale, *, combine: Combine = linear, **uncond: Any):
        super().__init__()
        self.model = model
        self.scale = scale
        self.combine = combine
        self.uncond = uncond

    def forward(
        self, x: Tensor, sigma: Tensor, *, host_sigma: float | None = None, **cond: Any
    ) -> Tensor:
        missing = [name for name in self.uncond if cond.get(name) is None]
        if missing:
            raise ValueError(
                f"guidance strengthens {', '.join(missing)}, but the sampler's extra_args lack it"
            )
        both = {
            name: _both(name, self.uncond.get(name, value), value, len(x))
            for name, value in cond.items()
        }
        model = at_level(self.model, host_sigma)
        out = model(torch.cat([x, x]), torch.cat([sigma, sigma]), **both)
        without, given = widen(out).chunk(2)
        guided = self.combine(given, without, _at(self.scale, sigma, given), sigma)
        return guided.to(out.dtype)


class AutoguidedDenoiser(Guidance):
    """Autoguidance (arXiv:2406.02507): a model guided by a weaker version of itself.

    D_weak + scale * (D - D_weak). weak: a smaller or less trained model, called with the same
    arguments. scale: 1 is the model itself. combine: as in `CFGDenoiser`.
    """

    parts = ("model", "weak", "combine")

    def __init__(
        self, model: nn.Module, weak: nn.Module, scale: Scale, *, combine: Combine = linear
    ):
        super().__init__()
        self.model = model
        self.weak = weak
        self.scale = scale
        self.combine = combine

    def forward(
        self, x: Tensor, sigma: Tensor, *, host_sigma: float | None = None, **cond: Any
    ) -> Tensor:
        out, weak = (at_level(m, host_sigma)(x, sigma, **cond) for m in (self.model, self.weak))
        given, without = widen(out), widen(weak)
        guided = self.combine(given, without, _at(self.scale, sigma, given), sigma)
        return guided.to(out.dtype)


# ------------------------------------------------------------------------------ where it is applied


class IntervalDenoiser(Guidance):
    """Guidance in an interval of noise levels alone (arXiv:2404.07724), the model elsewhere.

    guided: a guided denoiser of this module, whose `model` is the one without its guidance. It
    counts where sigma_min < sigma <= sigma_max. The one that isn't needed isn't called, where the
    noise level can be known: in the samplers of this package, within other guidance too, and on the
    CPU. Reading it from a GPU would make the host wait, so there both are called. Raises ValueError
    for sigma_min >= sigma_max.
    """

    parts = ("guided",)

    def __init__(self, guided: Any, sigma_min: float = 0.0, sigma_max: float = math.inf):
        super().__init__()
        if not sigma_min < sigma_max:
            raise ValueError(
                f"an interval needs sigma_min < sigma_max, got {sigma_min} and {sigma_max}"
            )
        self.guided = guided
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    @property
    def model(self) -> Any:
        return self.guided.model

    def at_level(self, sigma: float) -> Any:
        inside = self.sigma_min < sigma <= self.sigma_max
        return at_level(self.guided if inside else self.model, sigma)

    def forward(self, x: Tensor, sigma: Tensor, **cond: Any) -> Tensor:
        inside = (sigma > self.sigma_min) & (sigma <= self.sigma_max)
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
            if inside.all():
                return self.guided(x, sigma, **cond)
            if not inside.any():
                return self.model(x, sigma, **cond)
        guided, plain = self.guided(x, sigma, **cond), self.model(x, sigma, **cond)
        return torch.where(append_dims(inside, x.ndim), guided, plain)


class ThresholdedDenoiser(Guidance):
    """Estimates kept within [-limit, limit] (Imagen, arXiv:2205.11487, section 2.3).

    percentile: None clamps them: static thresholding. A fraction, 0.995 in the paper, is dynamic:
    s, that quantile of a sample's absolute values, but at least the limit, becomes the limit:
    values are clamped to [-s, s], and multiplied by limit / s. Raises ValueError for a limit that
    isn't positive or a percentile outside (0, 1].
    """

    def __init__(self, model: nn.Module, limit: float = 1.0, percentile: float | None = None):
        super().__init__()
        if not limit > 0:
            raise ValueError(f"limit must be positive, got {limit}")
        if percentile is not None and not 0 < percentile <= 1:
            raise ValueError(f"percentile must be a fraction above 0 and up to 1, got {percentile}")
        self.model = model
        self.limit = limit
        self.percentile = percentile

    def forward(
        self, x: Tensor, sigma: Tensor, *, host_sigma: float | None = None, **cond: Any
    ) -> Tensor:
        denoised = at_level(self.model, host_sigma)(x, sigma, **cond)
        if self.percentile is None:
            return denoised.clamp(-self.limit, self.limit)
        sizes = denoised.abs().flatten(1)
        k = max(1, math.ceil(self.percentile * sizes.shape[1]))
        s = append_dims(sizes.kthvalue(k)[0].clamp(min=self.limit), denoised.ndim)
        return denoised.clamp(-s, s) * (self.limit / s)


# ------------------------------------------------------------------------------ guidance by a loss


def recordable(x: Any) -> Any:
    """A tensor made under inference_mode can't take part in a gradient; its copy can."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


class GradientGuidedDenoiser(Guidance):
    """Guidance by the gradient of a loss: D - scale * sigma^2 * grad_x loss(D(x, sigma)).

    With loss = -log p(y | x) this is Tweedie's formula for the score of p(x | y) (classifier
    guidance, arXiv:2105.05233, of an estimate of the clean sample, as in arXiv:2209.14687).

    loss: denoised (n, ...) -> (n,), a loss per sample, differentiable. The gradient is taken
    through the model, under no_grad and inference_mode too; the result has none. Raises ValueError
    for a loss of another shape, or one that doesn't depend on x.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor], scale: Scale = 1.0):
        super().__init__()
        self.model = model
        self.loss = loss
        self.scale = scale

    def forward(
        self, x: Tensor, sigma: Tensor, *, host_sigma: float | None = None, **cond: Any
    ) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            sigma = recordable(sigma)
            cond = {name: recordable(value) for name, value in cond.items()}
            denoised = at_level(self.model, host_sigma)(x, sigma, **cond)
            loss = self.loss(denoised)
            if loss.shape != x.shape[:1]:
                raise ValueError(
                    f"the loss must return a value per sample, ({len(x)},), got shape "
                    f"{tuple(loss.shape)}"
                )
            if not loss.requires_grad:
                raise ValueError("the loss has no gradient with respect to the denoised sample")
            # scaled before the gradient is taken, which might underflow in half precision
            scale = self.scale(sigma) if callable(self.scale) else self.scale
            (grad,) = torch.autograd.grad((loss * scale).sum(), x)
        step = append_dims(widen(sigma), x.ndim) ** 2 * widen(grad)
        return (denoised.detach() - step).to(denoised.dtype)
