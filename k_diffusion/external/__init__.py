"""Models trained elsewhere as denoisers: v-diffusion, OpenAI (guided diffusion), CompVis, rectified
flows and diffusers.

Wrapped, they are called as `model(x, sigma)` with x = x0 + sigma noise, (n, ...), and sigma (n,),
and return their estimate of x0.
"""

from .codebases import CompVisDenoiser, CompVisVDenoiser, OpenAIDenoiser
from .diffusers import make_diffusers_denoiser
from .discrete import (
    DiscreteEpsDDPMDenoiser,
    DiscreteSampleDDPMDenoiser,
    DiscreteSchedule,
    DiscreteVDDPMDenoiser,
)
from .rectified_flow import RectifiedFlowDenoiser
from .v_diffusion import VDenoiser

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSampleDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "RectifiedFlowDenoiser",
    "VDenoiser",
    "make_diffusers_denoiser",
]
