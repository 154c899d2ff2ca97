"""Neighborhood attention: NATTEN's kernels, and tiles in plain PyTorch."""

import importlib.util
import math
from functools import lru_cache
from typing import Any

import torch

from .geometry import NeighborhoodAttentionSpec
from .tiles import TilePlan, tiled_attention

# Above so many tokens the mask of all tiles at once would weigh more than it saves.
_MAX_TOKENS_IN_ONE_PLAN = 256 * 256


@lru_cache
def _natten_version() -> tuple[int, ...] | None:
    if importlib.util.find_spec("natten") is None:
        return None
    from importlib.metadata import version

    return tuple(int(part) for part in version("natten").split("+")[0].split(".")[:2])


def why_not_natten(geometry: Any, device: str, dtype: torch.dtype, needs_grad: bool) -> str | None:
    version = _natten_version()
    if version is None:
        return 'natten is not installed (pip install "k-diffusion[natten]")'
    if version < (0, 20):
        return f"needs natten >= 0.20 (natten.na2d), got {'.'.join(map(str, version))}"
    if geometry.kernel_size < 2:
        return "needs kernel_size >= 2"
    if geometry.d_head % 8:
        return f"needs d_head to be a multiple of 8, got {geometry.d_head}"
    if device == "cpu" and needs_grad:
        return "has no backward on the CPU"
    return None


def natten(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """NATTEN >= 0.20's `na2d`, heads last."""
    from natten import na2d

    return na2d(q, k, v, kernel_size=geometry.kernel_size, scale=1.0)


def tiled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """Exact, in plain PyTorch, with memory linear in the number of tokens."""
    _, h, w, _, _ = q.shape
    q_, k_, v_ = (x.flatten(1, 2) for x in (q, k, v))
    if h * w <= _MAX_TOKENS_IN_ONE_PLAN:
        plan = _plan(h, w, geometry, q.device, q.dtype)
        return tiled_attention(q_, k_, v_, plan).view(q.shape)

    # Row of tiles by row of tiles: all but those near the border share one plan.
    queries, keys, first = _tile_axis(h, geometry)
    bands, done = [], 0
    for query_rows, key_rows, first_keys in zip(queries, keys, first.tolist()):
        a, b, n_keys = int(query_rows[0]), int(key_rows[0]), len(key_rows)
        plan = _band_plan(tuple(first_keys), n_keys, w, geometry, q.device, q.dtype)
        band = tiled_attention(
            q_[:, a * w : (a + len(query_rows)) * w],
            k_[:, b * w : (b + n_keys) * w],
            v_[:, b * w : (b + n_keys) * w],
            plan,
        )
        bands.append(band[:, (done - a) * w :])  # the last tile may overlap the one before
        done = a + len(query_rows)
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


# Plans depend on shapes alone, so each is made once: on the CPU, and outside of inference mode,
# whose tensors could not be used in training later.


@lru_cache(maxsize=64)
def _plan(
    h: int, w: int, geometry: NeighborhoodAttentionSpec, device: torch.device, dtype: torch.dtype
) -> TilePlan:
    """The tiles of a whole grid; a small one is a single dense tile."""
    kernel = geometry.kernel_size
    whole = h * w <= max(256, 2 * (_tile_side(kernel) + kernel - 1) ** 2)
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        rows, cols = (_tile_axis(length, geometry, whole) for length in (h, w))
        return _cross(rows, cols, w, geometry, device, dtype)


@lru_cache(maxsize=64)
def _band_plan(
    first: tuple[int, ...],
    n_keys: int,
    w: int,
    geometry: NeighborhoodAttentionSpec,
    device: torch.device,
    dtype: torch.dtype,
) -> TilePlan:
    """One row of tiles, whose queries and keys count from the first that it is given."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        rows = (
            torch.arange(len(first))[None],
            torch.arange(n_keys)[None],
            torch.tensor(first)[None],
        )
        return _cross(rows, _tile_axis(w, geometry), w, geometry, device, dtype)
