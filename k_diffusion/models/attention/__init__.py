"""Self-attention on a grid of tokens: one operation per geometry, many backends.

`attend(geometry, q, k, v)` takes q, k, v of (n, h, w, heads, d_head) and returns the same shape;
scores are plain dot products (scale 1: the caller has scaled q and k). Each backend is a pair: a
predicate that says why it can't run here, and the operation. The first backend of a geometry's
list that can run is used. A geometry's `backend`, which configs set, forces another, and
`K_DIFFUSION_ATTENTION` overrides that: a comma-separated list of `geometry=backend`, e.g.
`neighborhood=tiled,global=auto`. `python -m k_diffusion.models.attention` lists them all.
"""

from operator import index

import torch

from ..autograd import needs_plain_ops
from . import flash, flex, natten, neighborhood, plain, shifted_window
from .choice import (
    AUTO,
    BACKENDS,
    ENV_VAR,
    Backend,
    Request,
    choose_backend,
    plain_only,
    reasons,
    row_to_run,
)
from .geometry import (
    Geometry,
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)

__all__ = [
    "AUTO",
    "BACKENDS",
    "ENV_VAR",
    "Backend",
    "Geometry",
    "GlobalAttentionSpec",
    "NeighborhoodAttentionSpec",
    "NoAttentionSpec",
    "Request",
    "ShiftedWindowAttentionSpec",
    "attend",
    "choose_backend",
    "plain_only",
    "reasons",
]

BACKENDS["global"] = {
    "flash4": Backend(flash.flash4, flash.why_not_flash4),
    "flash3": Backend(flash.flash3, flash.why_not_flash3),
    "flash2": Backend(flash.flash2, flash.why_not_flash2),
    "sdpa": Backend(plain.sdpa, plain=True),
    "reference": Backend(plain.reference, plain=True),
}
BACKENDS["neighborhood"] = {
    "natten": Backend(natten.natten, natten.why_not_natten, natten.not_for_small_grids),
    "natten-0.17": Backend(natten.natten_0_17, natten.why_not_natten_0_17),
    "flex": Backend(flex.flex, flex.why_not_flex, flex.better_without),
    "natten-unfused": Backend(natten.unfused, natten.why_not_unfused, natten.not_without_kernels),
    "tiled": Backend(neighborhood.tiled, plain=True),
    "reference": Backend(plain.reference, plain=True),
}
BACKENDS["shifted-window"] = {
    "sdpa": Backend(shifted_window.sdpa, plain=True),
    "reference": Backend(plain.reference, plain=True),
}

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attend(geometry: Geometry, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Self-attention of a geometry. q, k, v: (n, h, w, heads, d_head); returns the same shape.

    Raises ValueError if the geometry doesn't fit h and w, for a dtype that is no floating point
    number of 16 to 64 bits, and if a forced backend can't run here.
    """
    h, w = index(q.shape[1]), index(q.shape[2])
    geometry.check(h, w)
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"attention needs float16, bfloat16, float32 or float64, got {q.dtype}; "
            "cast the model's input with .float()"
        )
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    transformed = not torch.compiler.is_compiling() and needs_plain_ops()
    kind, name = row_to_run(geometry, h, w, q.device.type, q.dtype, needs_grad, transformed)
    return BACKENDS[kind][name].run(q, k, v, geometry)
