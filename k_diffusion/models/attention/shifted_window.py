"""Shifted-window attention: each window is a tile that sees itself."""

from operator import index

import torch

from .constants import cached_plan
from .geometry import ShiftedWindowAttentionSpec
from .tiles import TilePlan, tiled_attention


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: ShiftedWindowAttentionSpec
) -> torch.Tensor:
    """One scaled_dot_product_attention with the windows as its batch."""
    plan = _plan(geometry, index(q.shape[1]), index(q.shape[2]), q.device, q.dtype)
    q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))
    return tiled_attention(q_, k_, v_, plan).reshape(q.shape)


@cached_plan
def _plan(
    geometry: ShiftedWindowAttentionSpec, h: int, w: int, device: torch.device, dtype: torch.dtype
) -> TilePlan:
    """Windows of the grid rolled by the shift. Those that the image's border cuts hold tokens of
    both sides, which a mask keeps apart, so that all windows are of one size."""
    size, shift = geometry.window_size, geometry.shift

    def windows(grid: torch.Tensor) -> torch.Tensor:
        rolled = grid.roll((shift, shift), (0, 1))
        cut = rolled.unfold(0, size, size).unfold(1, size, size)
        return cut.flatten(2).flatten(0, 1)

    tokens = windows(torch.arange(h * w).view(h, w))
    rows, cols = geometry.axis_window(h), geometry.axis_window(w)
    region = windows(rows[:, None] * (int(cols.max()) + 1) + cols)
    seen = region[:, :, None] == region[:, None, :]
    return TilePlan.make(tokens, tokens, seen, device, dtype)
