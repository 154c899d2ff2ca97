"""Models of the diffusers library as denoisers, by the config of their scheduler."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..common.text import unknown_name
from .discrete import (
    DiscreteEpsDDPMDenoiser,
    DiscreteSampleDDPMDenoiser,
    DiscreteVDDPMDenoiser,
)
from .rectified_flow import RectifiedFlowDenoiser

Config = Mapping[str, Any]


def _ramp(start: float, end: float, n: int) -> torch.Tensor:
    return torch.linspace(start, end, n, dtype=torch.float64)


def _cosine(n: int) -> torch.Tensor:
    """Improved DDPM (arXiv:2102.09672), equation 17, with beta at most 0.999."""
    abar = torch.cos((_ramp(0, 1, n + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


# The variances added each step, by `beta_schedule`.
BETAS: dict[str, Callable[[float, float, int], torch.Tensor]] = {
    "linear": _ramp,  # DDPM
    "scaled_linear": lambda start, end, n: _ramp(start**0.5, end**0.5, n) ** 2,  # Stable Diffusion
    "squaredcos_cap_v2": lambda start, end, n: _cosine(n),
    "sigmoid": lambda start, end, n: start + (end - start) * _ramp(-6, 6, n).sigmoid(),  # GeoDiff
}

# What a model estimates, by `prediction_type`.
PREDICTIONS: dict[str, Any] = {
    "epsilon": DiscreteEpsDDPMDenoiser,
    "v_prediction": DiscreteVDDPMDenoiser,
    "sample": DiscreteSampleDDPMDenoiser,
    "flow_prediction": RectifiedFlowDenoiser,
}


def _row(table: Mapping[str, Any], key: str, name: str) -> Any:
    if name not in table:
        raise unknown_name(key, name, table)
    return table[name]


def alphas_cumprod(config: Config) -> torch.Tensor:
    """The table of a diffusers scheduler's config: (num_train_timesteps,) in float32.

    Raises ValueError where the config has no variances (an EDM scheduler, say), or they're of an
    unknown `beta_schedule`.
    """
    if config.get("trained_betas") is not None:
        betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        keys = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
        if missing := [key for key in keys if key not in config]:
            raise ValueError(
                f"the scheduler's config has no {', '.join(missing)}; it must be one of a DDPM or "
                "of a flow"
            )
        schedule, *ends = (config[key] for key in keys)
        betas = _row(BETAS, "beta_schedule", schedule)(*ends)
    abar = torch.cumprod(1 - betas, 0)
    if config.get("rescale_betas_zero_snr"):
        # arXiv:2305.08891, algorithm 1: the last entry becomes 0, the first one stays
        root = abar.sqrt()
        abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return abar.float()


def flow_shift(config: Config, tokens: int | None = None) -> float:
    """The shift of a flow's schedule, a constant or, in Flux's way, for a number of image tokens.

    Raises ValueError for a config whose shift depends on tokens where they aren't given.
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))
    if tokens is None:
        raise ValueError(
            "this scheduler's shift depends on the size of the image: pass tokens, the length of "
            "the transformer's image sequence, or shift"
        )
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base + (most - base) * (tokens - low) / (high - low)
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


class DiffusersModel(nn.Module):
    """A diffusers model, called as (x, t, **kwargs), (n, c, ...) and (n,), without its envelope.

    It is run in its own dtype and answers in x's. Learned variances, which double the channels, are
    dropped.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self._dtypes: tuple[torch.dtype, torch.dtype] | None = None

    def _dtype(self, default: torch.dtype) -> torch.dtype:
        """The model's, which diffusers finds by going through all of it: a millisecond a call. So
        it is asked again when that of the first weight has changed."""
        first = next((p.dtype for p in self.model.parameters()), default)
        if self._dtypes is None or self._dtypes[0] != first:
            self._dtypes = first, getattr(self.model, "dtype", default)
        return self._dtypes[1]

    def forward(self, x: torch.Tensor, t: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        dtype = self._dtype(x.dtype)
        output = self.model(x.to(dtype), timestep=t, return_dict=False, **kwargs)[0].to(x.dtype)
        return output.chunk(2, 1)[0] if output.shape[1] == 2 * x.shape[1] else output


def make_diffusers_denoiser(
    model: Any,
    scheduler: Any,
    *,
    quantize: bool = False,
    shift: float | None = None,
    tokens: int | None = None,
    time_scale: float | None = None,
) -> Any:
    """A UNet or transformer of diffusers as a denoiser, (x, sigma, **kwargs) -> denoised.

    model: called as model(x, timestep=t, **kwargs), so that a sampler's extra_args are its other
    arguments (`class_labels`, `encoder_hidden_states`, ...). scheduler: the scheduler it was
    trained with, or its config: `prediction_type` epsilon, v_prediction, sample or flow_prediction;
    a FlowMatch scheduler needs none. Sampling takes nothing else from it; of `clip_sample` and
    `thresholding`, see `guidance.ThresholdedDenoiser`.

    For a DDPM: quantize rounds times to whole steps. For a flow: shift replaces the scheduler's;
    tokens is the length of the image sequence where the shift depends on it; time_scale is what the
    model's time ends at, by default num_train_timesteps; Flux models take 1.

    Returns one of the denoisers of `external`, with its `get_sigmas(n)` for the schedule. Raises
    ValueError for a config that is neither a DDPM's nor a flow's.
    """
    config = getattr(scheduler, "config", scheduler)
    wrapped = DiffusersModel(model)
    # Flow schedulers say nothing of predictions, and have a shift.
    default = "flow_prediction" if "shift" in config else "epsilon"
    denoiser = _row(PREDICTIONS, "prediction_type", config.get("prediction_type", default))
    if denoiser is not RectifiedFlowDenoiser:
        device = next(iter(model.parameters()), torch.empty(0)).device
        return denoiser(wrapped, alphas_cumprod(config).to(device), quantize)
    if config.get("invert_sigmas"):
        raise ValueError("invert_sigmas isn't supported: this flow's time runs from noise to data")
    shift = flow_shift(config, tokens) if shift is None else shift
    time_scale = config.get("num_train_timesteps", 1000) if time_scale is None else time_scale
    return RectifiedFlowDenoiser(wrapped, shift, time_scale)
