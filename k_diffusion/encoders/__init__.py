"""Frozen networks of others that turn images or texts into vectors.

Their packages are optional, and imported by the function that loads the weights.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..common.files import PathLike
from ..common.text import unknown_name
from .base import Encoder, as_rgb, check_range
from .clip import make_clip
from .digits import make_digits
from .dinov2 import MODELS as _DINOV2, make_dinov2
from .efficientnet import make_efficientnet
from .inception import make_inception
from .random import make_random

__all__ = ["ENCODERS", "Encoder", "as_rgb", "check_range", "make_encoder"]

ENCODERS: dict[str, Callable[..., Encoder]] = {
    "inception": make_inception,
    "dinov2": make_dinov2,
    **{f"dinov2-{name}": partial(make_dinov2, name) for name in _DINOV2 if name != "vitl14"},
    "clip": make_clip,
    "efficientnet-lite0": make_efficientnet,
    "digits": make_digits,
    "random": make_random,
}


def make_encoder(
    name: str,
    weights: PathLike | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Encoder:
    """A frozen encoder by its name in ENCODERS.

    weights: a file; else the cache folder's, or a download. options: `model` of clip and dinov2;
    `images` and `classes` that digits is fitted to; `width` and `seed` of random. Raises ValueError
    for an unknown name or a file that isn't the encoder's, ImportError where a package is missing,
    OSError where weights can't be downloaded.
    """
    if name not in ENCODERS:
        raise unknown_name("encoder", name, ENCODERS)
    return ENCODERS[name](weights=weights, device=device, **options)
