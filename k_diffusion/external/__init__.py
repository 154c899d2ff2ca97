"""Models trained elsewhere as denoisers: v-diffusion, OpenAI (guided diffusion), CompVis, rectified
flows, TrigFlow (sCM) and diffusers.

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
from .trigflow import TrigFlowDenoiser
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
    "TrigFlowDenoiser",
    "VDenoiser",
    "make_diffusers_denoiser",
]
