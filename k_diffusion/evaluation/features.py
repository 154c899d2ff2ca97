"""Features of images for the metrics, with the published names of their extractors.

The published inputs and scales are kept: protocols of other tools need other features.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import trange

from ..encoders import make_encoder
from .protocols import NORMALIZATIONS

_INCEPTION_SIZE = (299, 299)


class InceptionV3FeatureExtractor(nn.Module):
    """The FID's Inception-v3 as the published training metric feeds it: resized by torch's
    antialiased bicubic filter, clamped, not rounded; 2,048 features."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__()
        self.encoder = make_encoder("inception", device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The features (n, 2048) of images x (n, c, h, w) in [-1, 1], c of 3 or 1."""
        if x.shape[2:] != _INCEPTION_SIZE:
            x = F.interpolate(x, _INCEPTION_SIZE, mode="bicubic", antialias=True)
        return self.encoder(x.clamp(-1, 1))


class _OnSphere(nn.Module):
    """An encoder's features, scaled to the norm sqrt(width)."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """The features (n, width) of images x (n, c, h, w) in [-1, 1], c of 3 or 1."""
        return NORMALIZATIONS["unit times sqrt(width)"](self.encoder(x))


class DINOv2FeatureExtractor(_OnSphere):
    """DINOv2's features (arXiv:2304.07193) of norm sqrt(width), as published; not FD_DINOv2's.

    name: vits14, vitb14, vitl14 or vitg14.
    """

    def __init__(self, name: str = "vitl14", device: torch.device | str = "cpu"):
        super().__init__(make_encoder("dinov2", device=device, model=name))


class CLIPFeatureExtractor(_OnSphere):
    """CLIP's features of images (arXiv:2103.00020) of norm sqrt(width), as published; not CMMD's.

    name: one of OpenAI's models.
    """

    def __init__(self, name: str = "ViT-B/16", device: torch.device | str = "cpu"):
        super().__init__(make_encoder("clip", device=device, model=name))


@torch.no_grad()
def compute_features(
    accelerator: Any,
    sample_fn: Callable[[int], Tensor],
    extractor_fn: Callable[[Tensor], Tensor],
    n: int,
    batch_size: int,
) -> Tensor:
    """Features (n, width) of n samples, shared out over the processes, on each of them.

    sample_fn: a number -> at least as many images. extractor_fn: images -> features. batch_size: of
    one process. All processes call it together. Raises ValueError where sample_fn gives too few.
    """
    share = math.ceil(n / accelerator.num_processes)
    features = []
    hidden = None if accelerator.is_main_process else True
    for start in trange(0, share, batch_size, desc="features", leave=None, disable=hidden):
        count = min(batch_size, share - start)
        images = sample_fn(count)
        if len(images) < count:
            raise ValueError(
                f"sample_fn must give at least the {count} images asked for, got {len(images)}"
            )
        features.append(extractor_fn(images[:count]))
    return accelerator.gather(torch.cat(features))[:n]
