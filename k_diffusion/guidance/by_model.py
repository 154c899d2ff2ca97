"""Guidance by another estimate: that of another model, or of the same one told less.

Here too is where guidance applies, an interval of noise levels, and the limits of an estimate.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..common.tensors import append_dims, widen
from ..models.perturbation import Perturbation
from ..solvers.context import estimate
from .combine import Ask, Combine, Guidance, Scale, check_scale, combined, linear


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
    1 is the model itself. combine: how the halves are combined: `linear`, `APG`, ....
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
        self.scale = check_scale(scale)
        self.combine = combine
        self.uncond = uncond

    def estimates(
        self, ask: Ask, x: Tensor, sigma: Tensor, host_sigma: float | None = None, **cond: Any
    ) -> tuple[Tensor, ...]:
        """Always both, which are two halves of one batch. x: (n, ...), sigma: (n,)."""
        missing = [name for name in self.uncond if cond.get(name) is None]
        if missing:
            raise ValueError(
                f"guidance strengthens {', '.join(missing)}, but the sampler's extra_args lack it"
            )
        both = {
            name: _both(name, self.uncond.get(name, value), value, len(x))
            for name, value in cond.items()
        }
        pairs = torch.cat([x, x]), torch.cat([sigma, sigma])
        (out,) = estimate(self.model, *pairs, host_sigma, **both)
        without, given = widen(out).chunk(2)
        guided = combined(self.combine, given, without, self.scale, sigma, x)
        return guided.to(out.dtype), without.to(out.dtype)


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
        self.scale = check_scale(scale)
        self.combine = combine

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """Those of the model, moved as the first is by guidance. x: (n, ...), sigma: (n,)."""
        out, *rest = ask(self.model, x, sigma, **cond)
        (weak,) = estimate(self.weak, x, sigma, **cond)
        given, without = widen(out), widen(weak)
        guided = combined(self.combine, given, without, self.scale, sigma, x)
        return tuple(y.to(out.dtype) for y in (guided, *(y + (guided - given) for y in rest)))


class PerturbedDenoiser(Guidance):
    """A transformer's estimate with some of its blocks weakened, to be guided away from.

    As the weak model of `AutoguidedDenoiser(model, PerturbedDenoiser(model, ...), scale)` it makes
    perturbed-attention guidance (arXiv:2403.17377) and skip-layer guidance, whose scales in the
    literature are ours less 1. What is weakened is told in each call, so that the model itself, and
    other threads that use it, are as they were; compiled models have a graph of it.

    model: a denoiser around an `image_transformer_v1` or `image_transformer_v2`. skip: blocks to
    leave out. identity: blocks whose attention map is replaced by the identity. Both are names as
    in `state_dict`, "mid_level.3" or "blocks.3", or prefixes, "mid_level" for all of its blocks.
    With neither it is the model itself. Raises ValueError for a model without a transformer, and
    for names that it doesn't have, or without attention in `identity`.
    """

    def __init__(self, model: nn.Module, skip: Iterable[str] = (), identity: Iterable[str] = ()):
        super().__init__()
        self.model = model
        self.perturbation = Perturbation(tuple(skip), tuple(identity))
        self.perturbation.check(model)

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """Those of the model, weakened. x: (n, ...), sigma: (n,)."""
        return ask(self.model, x, sigma, perturbation=self.perturbation, **cond)


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

    def estimates(
        self, ask: Ask, x: Tensor, sigma: Tensor, host_sigma: float | None = None, **cond: Any
    ) -> tuple[Tensor, ...]:
        """Those of the one that counts. x: (n, ...), sigma: (n,)."""
        if host_sigma is not None:
            model = self.guided if self.sigma_min < host_sigma <= self.sigma_max else self.model
            return ask(model, x, sigma, host_sigma, **cond)
        inside = (sigma > self.sigma_min) & (sigma <= self.sigma_max)
        if sigma.device.type == "cpu" and not torch.compiler.is_compiling():
            if inside.all():
                return ask(self.guided, x, sigma, **cond)
            if not inside.any():
                return ask(self.model, x, sigma, **cond)
        inside = append_dims(inside, x.ndim)
        pairs = zip(*(ask(model, x, sigma, **cond) for model in (self.guided, self.model)))
        return tuple(torch.where(inside, guided, plain) for guided, plain in pairs)


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

    def estimates(self, ask: Ask, x: Tensor, sigma: Tensor, **cond: Any) -> tuple[Tensor, ...]:
        """Those of the model, each within its own limits. x: (n, ...), sigma: (n,)."""
        return tuple(map(self.kept, ask(self.model, x, sigma, **cond)))

    def kept(self, denoised: Tensor) -> Tensor:
        """An estimate within the limits. denoised: (n, ...)."""
        if self.percentile is None:
            return denoised.clamp(-self.limit, self.limit)
        sizes = denoised.abs().flatten(1)
        k = max(1, math.ceil(self.percentile * sizes.shape[1]))
        s = append_dims(sizes.kthvalue(k)[0].clamp(min=self.limit), denoised.ndim)
        return denoised.clamp(-s, s) * (self.limit / s)
