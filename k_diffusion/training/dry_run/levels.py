"""The attention backends that the levels of a model would take in training."""

import dataclasses
from typing import Any

import torch

from ...models import attention
from ...models.attention import Request
from ...models.levels import Level


def make_levels(
    inner: Any, h: int, w: int, device: torch.device, dtype: torch.dtype
) -> list[Level]:
    """The levels of a model as it trains on a device, on images of h x w.

    inner: the model, on any device. dtype: of q, k and v. Raises ValueError if a backend is forced
    that can't run.
    """
    levels = []
    for level in inner.describe_levels(h, w):
        if not level.backend:
            request = Request(level.geometries[0], level.h, level.w, device.type, dtype)
            level = dataclasses.replace(level, backend=attention.choose_backend(request))
        levels.append(level)
    return levels
