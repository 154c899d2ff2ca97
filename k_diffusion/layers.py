"""The published names of `k_diffusion.layers`, which live in `denoisers` and `models`.

For programs that use them; nothing in this package imports from here.
"""

from .denoisers import Denoiser, DenoiserWithVariance, SimpleLossDenoiser, dct
from .models.embeddings import FourierFeatures
from .models.unet import (
    AdaGN,
    ConditionedModule,
    ConditionedResidualBlock,
    ConditionedSequential,
    Conv2d,
    CrossAttention2d,
    Downsample2d,
    ResidualBlock,
    SelfAttention2d,
    UnconditionedModule,
    UNet,
    Upsample2d,
)

__all__ = [
    "AdaGN",
    "ConditionedModule",
    "ConditionedResidualBlock",
    "ConditionedSequential",
    "Conv2d",
    "CrossAttention2d",
    "Denoiser",
    "DenoiserWithVariance",
    "Downsample2d",
    "FourierFeatures",
    "ResidualBlock",
    "SelfAttention2d",
    "SimpleLossDenoiser",
    "UNet",
    "UnconditionedModule",
    "Upsample2d",
    "dct",
]
