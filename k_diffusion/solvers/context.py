"""What samplers take, and what their steps may ask for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

Model: TypeAlias = Callable[..., Tensor]
Args: TypeAlias = Mapping[str, Any] | None
Callback: TypeAlias = Callable[[dict[str, Any]], Any] | None
NoiseSampler: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Context:
    """The model and the noise, as a step sees them. Noise levels are floats.

    denoise(x, sigma): the model's estimate of the clean sample.
    to_d(x, sigma, denoised): the ODE's slope dx/dsigma (Karras et al. 2022, equation 3).
    noise(sigma, sigma_next): unit Gaussian noise belonging to that interval, times s_noise.
    levels: the run's noise levels in order, each once.
    """

    denoise: Callable[[Tensor, float], Tensor]
    to_d: Callable[[Tensor, float, Tensor], Tensor]
    noise: Callable[[float, float], Tensor]
    levels: tuple[float, ...] = ()

    def ahead(self, sigma: float) -> tuple[float, ...]:
        """The noise levels that come after sigma, which is one of them."""
        return self.levels[self.levels.index(sigma) + 1 :]

    def order(self, sigma: float, order: int, lower_order_final: bool) -> int:
        """The order of the step from sigma: on the last steps to 0 at most as many as are left.

        Toward 0 a step in log sigma grows without bound, and extrapolation with it.
        """
        ahead = self.ahead(sigma) if lower_order_final else ()
        return min(order, len(ahead)) if ahead and ahead[-1] == 0 else order


def start_run(model: Any) -> None:
    """Tells guidance with a memory that a run begins: what an earlier one left is forgotten."""
    if hasattr(model, "start_run"):
        model.start_run()


def at_level(model: Any, sigma: float | None) -> Any:
    """What to call as the model at a noise level that the host knows; the model itself for None.

    So guidance in an interval is decided without a look at the device.
    """
    return model if sigma is None or not _takes_level(model) else partial(model, host_sigma=sigma)


def _takes_level(model: Any) -> bool:
    # asked of the class: a compiled module would answer for what it has compiled
    return getattr(type(model), "takes_level", False)


def estimate(
    model: Any, x: Tensor, sigma: Tensor, host_sigma: float | None = None, **cond: Any
) -> tuple[Tensor, ...]:
    """A model's estimate, alone in a tuple. x: (n, ...), sigma: (n,)."""
    return (at_level(model, host_sigma)(x, sigma, **cond),)


def estimate_both(
    model: Any, x: Tensor, sigma: Tensor, host_sigma: float | None = None, **cond: Any
) -> tuple[Tensor, ...]:
    """A guided model's estimate, and that without guidance; of any other model the same twice.

    x: (n, ...), sigma: (n,). Guidance that can tell has a method `both`, called as the model is.
    """
    both = getattr(model, "both", None)
    if both is None:
        return estimate(model, x, sigma, host_sigma, **cond) * 2
    told = {"host_sigma": host_sigma} if _takes_level(model) else {}
    return both(x, sigma, **told, **cond)


def evaluate(
    model: Callable[..., Tensor],
    x: Tensor,
    sigma: float,
    dtype: torch.dtype,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """model(x, sigma), with sigma as the tensor (n,) it expects; fills it without a transfer.

    x: (n, ...). Raises ValueError unless the model returns x's shape.
    """
    sigma_in = torch.full((x.shape[0],), sigma, dtype=dtype, device=x.device)
    return _like(x, at_level(model, sigma)(x, sigma_in, *args, **kwargs))


def _like(x: Tensor, denoised: Any) -> Tensor:
    """An estimate. x: (n, ...). Raises ValueError unless it is a tensor of x's shape."""
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise ValueError(
            f"the model must return a tensor shaped as its input, {tuple(x.shape)}, got {got}"
        )
    return denoised


def evaluate_both(
    model: Callable[..., Tensor], x: Tensor, sigma: float, dtype: torch.dtype, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """`estimate_both` with sigma as `evaluate` takes it. x: (n, ...)."""
    sigma_in = torch.full((x.shape[0],), sigma, dtype=dtype, device=x.device)
    guided, without = estimate_both(model, x, sigma_in, sigma, **kwargs)
    return _like(x, guided), _like(x, without)


# (ctx, x, sigma, sigma_next, denoised, state) -> (x at sigma_next, state). x, denoised: (n, ...);
# denoised is the estimate at sigma; state is what a step leaves for the next one, None at first.
Step: TypeAlias = Callable[[Context, Tensor, float, float, Tensor, Any], tuple[Tensor, Any]]


def check_order(order: int, most: int, name: str = "order") -> None:
    """Raises ValueError unless 1 <= order <= most."""
    if not 1 <= order <= most:
        raise ValueError(f"{name} must be 1 to {most}, got {order}")
