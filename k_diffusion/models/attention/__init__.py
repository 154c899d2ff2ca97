"""Self-attention on a grid of tokens: one operation per geometry, many backends.

`attend(geometry, q, k, v)` takes q, k, v of (n, h, w, heads, d_head) and returns the same shape;
scores are plain dot products (scale 1: the caller has scaled q and k). Each backend is a pair: a
predicate that says why it can't run here, and the operation. The first backend of a geometry's
list that can run is used; `K_DIFFUSION_ATTENTION` forces others, as a comma-separated list of
`geometry=backend`, e.g. `neighborhood=tiled,global=sdpa`.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .. import flags
from . import global_, neighborhood, shifted_window
from .geometry import (
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "Geometry",
    "GlobalAttentionSpec",
    "NeighborhoodAttentionSpec",
    "NoAttentionSpec",
    "ShiftedWindowAttentionSpec",
    "attend",
    "choose_backend",
]

logger = logging.getLogger(__name__)

ENV_VAR = "K_DIFFUSION_ATTENTION"


@dataclass(frozen=True)
class Backend:
    """One way to run a geometry.

    why_not: (geometry, device type, dtype, needs_grad) -> a reason why it can't run, or None.
    run: (q, k, v, geometry) -> output.
    devices: the device types on which it is chosen without being asked for; None for all.
    """

    why_not: Callable[[Geometry, str, torch.dtype, bool], str | None]
    run: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    devices: tuple[str, ...] | None = None


BACKENDS: dict[str, dict[str, Backend]] = {
    "global": {
        "flash2": Backend(global_.why_not_flash2, global_.flash2, devices=("cuda",)),
        "sdpa": Backend(global_.can_always, global_.sdpa),
        "reference": Backend(global_.can_always, global_.reference),
    },
    "neighborhood": {
        "natten": Backend(neighborhood.why_not_natten, neighborhood.natten, devices=("cuda",)),
        "tiled": Backend(global_.can_always, neighborhood.tiled),
        "reference": Backend(global_.can_always, global_.reference),
    },
    "shifted-window": {
        "sdpa": Backend(global_.can_always, shifted_window.sdpa),
        "reference": Backend(global_.can_always, global_.reference),
    },
}


def forced_backends(setting: str) -> dict[str, str]:
    """Parse a `geometry=backend,...` setting. Raises ValueError, listing what there is."""
    forced = {}
    for item in filter(None, (part.strip() for part in setting.split(","))):
        geometry, _, name = item.partition("=")
        if name not in BACKENDS.get(geometry, {}):
            rows = "; ".join(f"{g}={'|'.join(rows)}" for g, rows in BACKENDS.items())
            raise ValueError(f"{ENV_VAR}: no backend {item!r}; there are {rows}")
        forced[geometry] = name
    return forced


@lru_cache(maxsize=256)
def _choose(
    geometry: Geometry, device: str, dtype: torch.dtype, needs_grad: bool, setting: str
) -> str:
    rows = BACKENDS[geometry.name]
    forced = forced_backends(setting).get(geometry.name)
    why_not = {
        name: row.why_not(geometry, device, dtype, needs_grad)
        or (
            f"not chosen by itself on {device}"
            if name != forced and row.devices is not None and device not in row.devices
            else None
        )
        for name, row in rows.items()
    }
    can = [name for name in rows if why_not[name] is None]
    if forced is not None and forced not in can:
        raise ValueError(
            f"{ENV_VAR} asks for {geometry.name}={forced}, which can't run here: "
            f"{why_not[forced]}; these can: {', '.join(can)}"
        )
    name = forced or can[0]
    passed_over = "".join(f"; {n}: {why_not[n]}" for n in rows if why_not[n] is not None)
    logger.debug(
        "%s on %s %s%s: backend %s%s%s",
        geometry,
        device,
        str(dtype).removeprefix("torch."),
        " with gradients" if needs_grad else "",
        name,
        " (forced)" if forced else "",
        passed_over,
    )
    return name


@flags.constant_when_compiled
def choose_backend(geometry: Geometry, device: str, dtype: torch.dtype, needs_grad: bool) -> str:
    """The name of the backend for a geometry on a device type; logs at DEBUG why.

    Raises ValueError if the environment forces one that can't run here.
    """
    return _choose(geometry, device, dtype, needs_grad, os.environ.get(ENV_VAR, ""))


def attend(geometry: Geometry, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Self-attention of a geometry. q, k, v: (n, h, w, heads, d_head); returns the same shape.

    Raises ValueError if the geometry doesn't fit h and w.
    """
    geometry.check(q.shape[1], q.shape[2])
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    name = choose_backend(geometry, q.device.type, q.dtype, needs_grad)
    return BACKENDS[geometry.name][name].run(q, k, v, geometry)
