"""Neighborhood attention over tiles, in plain PyTorch."""

import math
from operator import index

import torch

from .constants import cached_plan
from .geometry import NeighborhoodAttentionSpec
from .tiles import TilePlan, tiled_attention

# Above so many tokens the mask of all tiles at once would weigh more than it saves.
_MAX_TOKENS_IN_ONE_PLAN = 256 * 256


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """Exact, in plain PyTorch, with memory linear in the number of tokens."""
    h, w = index(q.shape[1]), index(q.shape[2])
    q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))
    if h * w <= _MAX_TOKENS_IN_ONE_PLAN:
        plan = _plan(geometry, h, w, q.device, q.dtype)
        return tiled_attention(q_, k_, v_, plan).reshape(q.shape)
    bands = [
        tiled_attention(q_[:, queries], k_[:, keys], v_[:, keys], plan)[:, done:]
        for queries, keys, done, plan in _bands(geometry, h, w, q.device, q.dtype)
    ]
    return torch.cat(bands, dim=1).view(q.shape)


def _tile_side(kernel: int) -> int:
    return 4 if kernel <= 4 else 8


def _tile_axis(
    length: int, geometry: NeighborhoodAttentionSpec, whole: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Balanced tiles of an axis: their queries, (tiles, side), their keys, (tiles, n_keys), and
    the first key that each query sees, counted from its tile's first key, (tiles, side).

    The last tile is moved inward to end at the border, so that none is ragged.
    """
    kernel = geometry.kernel_size
    tiles = 1 if whole else math.ceil(length / _tile_side(kernel))
    side = math.ceil(length / tiles)
    tiles = math.ceil(length / side)
    n_keys = min(side + kernel - 1, length)
    start = (torch.arange(tiles) * side).clamp(max=length - side)[:, None]
    queries = start + torch.arange(side)
    keys = (start - kernel // 2).clamp(0, length - n_keys) + torch.arange(n_keys)
    return queries, keys, geometry.axis_start(length)[queries] - keys[:, :1]


Axis = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _cross(
    rows: Axis,
    cols: Axis,
    w: int,
    geometry: NeighborhoodAttentionSpec,
    device: torch.device,
    dtype: torch.dtype,
) -> TilePlan:
    """The tiles of a grid of width w from those of its two axes."""

    def tokens(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        grid = y[:, None, :, None] * w + x[None, :, None, :]
        return grid.flatten(2).flatten(0, 1)

    def seen(axis: Axis) -> torch.Tensor:
        offset = torch.arange(axis[1].shape[1]) - axis[2][:, :, None]
        return (offset >= 0) & (offset < geometry.kernel_size)

    both = seen(rows)[:, None, :, None, :, None] & seen(cols)[None, :, None, :, None, :]
    both = both.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return TilePlan.make(tokens(rows[0], cols[0]), tokens(rows[1], cols[1]), both, device, dtype)


@cached_plan
def _plan(
    geometry: NeighborhoodAttentionSpec, h: int, w: int, device: torch.device, dtype: torch.dtype
) -> TilePlan:
    """The tiles of a whole grid; a small one is a single dense tile."""
    kernel = geometry.kernel_size
    whole = h * w <= max(256, 2 * (_tile_side(kernel) + kernel - 1) ** 2)
    rows, cols = (_tile_axis(length, geometry, whole) for length in (h, w))
    return _cross(rows, cols, w, geometry, device, dtype)


@cached_plan
def _bands(
    geometry: NeighborhoodAttentionSpec, h: int, w: int, device: torch.device, dtype: torch.dtype
) -> list[tuple[slice, slice, int, TilePlan]]:
    """The rows of tiles of a large grid: their tokens, the tokens of their keys, how many of the
    first tokens the row before has done, and the plan, which all rows inside share."""
    bands, done = [], 0
    for rows, key_rows, first in zip(*_tile_axis(h, geometry)):
        start, end = int(rows[0]), int(rows[-1]) + 1
        keys = slice(int(key_rows[0]) * w, (int(key_rows[-1]) + 1) * w)
        plan = _band_plan(geometry, tuple(first.tolist()), len(key_rows), w, device, dtype)
        bands.append((slice(start * w, end * w), keys, (done - start) * w, plan))
        done = end
    return bands


@cached_plan
def _band_plan(
    geometry: NeighborhoodAttentionSpec,
    first: tuple[int, ...],
    n_keys: int,
    w: int,
    device: torch.device,
    dtype: torch.dtype,
) -> TilePlan:
    """One row of tiles, whose queries and keys count from the first that it is given."""
    rows = torch.arange(len(first))[None], torch.arange(n_keys)[None], torch.tensor(first)[None]
    return _cross(rows, _tile_axis(w, geometry), w, geometry, device, dtype)
