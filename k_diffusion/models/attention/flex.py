"""Neighborhood attention by torch's FlexAttention, compiled.

Tokens are put in the order of tiles of 128, one a block of FlexAttention, of the shape with which a
block of queries sees the fewest blocks of keys.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil, prod
from operator import index
from typing import Any

import torch

from .choice import Request, not_transformed, why_not_imported
from .constants import cached_plan
from .geometry import NeighborhoodAttentionSpec
from .tiles import is_range, take_tokens

# Rows and columns of the shapes of tiles, powers of 2. FlexAttention's backward kernels take no
# smaller blocks.
_BLOCK = 128
_TILES = [(rows, _BLOCK // rows) for rows in (8, 4, 2, 1, 16)]
# Below so many tokens a single dense tile is less work than a few blocks.
_MIN_TOKENS = 512
# No model has so many levels and is trained and sampled from at so many sizes.
_GRAPHS = 1000


@lru_cache
def _why_no_cpp() -> str | None:
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    name = os.environ.get("CXX") or default
    if shutil.which(name) is None:
        return f"torch.compile needs a C++ compiler, and there is no {name}"
    return None


_COMPILERS: dict[str, Callable[[], str | None]] = {
    "cpu": _why_no_cpp,
    "cuda": partial(why_not_imported, "triton", "pip install triton"),
}


def why_not_flex(request: Request) -> str | None:
    d = request.geometry.d_head
    if request.device not in _COMPILERS:
        return f"needs a CPU or CUDA device, got {request.device}"
    if request.device == "cpu" and request.needs_grad:
        return "has no backward on the CPU"
    if request.transformed:
        return not_transformed(request)
    if request.dtype == torch.float64:
        return "needs float32, float16 or bfloat16, got float64"
    if d < 16 or d & (d - 1):
        return f"needs d_head to be a power of 2 of at least 16, got {d}"
    return _COMPILERS[request.device]()


def better_without(request: Request) -> str | None:
    """On the CPU the tiled form is faster at every size; small grids are one dense tile."""
    if request.device != "cuda":
        return f"not chosen by itself on {request.device}"
    if request.h * request.w < _MIN_TOKENS:
        return f"not chosen by itself below {_MIN_TOKENS} tokens"
    return None


@lru_cache
def _compiled() -> Callable[..., torch.Tensor]:
    """FlexAttention, compiled once a geometry and grid, for batches of one item and of more.

    Past torch's usual 8 such graphs a call would quietly be run uncompiled, on N x N scores.
    """
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for x in (q, k, v):
            _dynamo.maybe_mark_dynamic(x, 0)
        with _dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=_GRAPHS):
            return compiled(q, k, v, **kwargs)

    return run


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: NeighborhoodAttentionSpec
) -> torch.Tensor:
    """FlexAttention (arXiv 2412.05496) over blocks that are tiles of the grid."""
    from torch.nn.attention.flex_attention import flex_attention

    h, w = index(q.shape[1]), index(q.shape[2])
    plan = _plan(geometry, h, w, q.device)

    def in_tiles(x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        return (x if plan.order is None else take_tokens(x, plan.order[0])).transpose(1, 2)

    q_, k_, v_ = in_tiles(q), in_tiles(k), in_tiles(v)
    if torch.compiler.is_compiling():  # a graph can't hold a BlockMask, but make one
        out = flex_attention(
            q_, k_, v_, block_mask=_describe(plan, h, w, geometry.kernel_size), scale=1.0
        )
    else:
        blocks = _block_mask(geometry, h, w, q.device)
        out = _compiled()(q_, k_, v_, block_mask=blocks, scale=1.0)
    out = out.transpose(1, 2)
    return (out if plan.order is None else take_tokens(out, plan.order[1])).reshape(q.shape)


@dataclass(frozen=True)
class FlexPlan:
    """Where the tokens go and what they see.

    tile: rows and columns of a tile. order: None if the tiles' order is the grid's, or the grid's
    token at each place of the tiles' order, (padded tokens,), and the place of each token of the
    grid, (h * w,). Tiles beyond the border repeat the last row and column; nobody sees what lies
    there. sees: how many tiles each tile sees, (1, 1, tiles), and which ones, those first,
    (1, 1, tiles, tiles). seen_by: the same the other way round.
    """

    tile: tuple[int, int]
    order: tuple[torch.Tensor, torch.Tensor] | None
    sees: tuple[torch.Tensor, torch.Tensor]
    seen_by: tuple[torch.Tensor, torch.Tensor]


def _describe(plan: FlexPlan, h: int, w: int, k: int) -> Any:
    """The BlockMask of a plan."""
    from torch.nn.attention.flex_attention import BlockMask

    rows, cols = plan.tile
    down, across = ceil(h / rows), ceil(w / cols)
    to_row, to_tile, middle = cols.bit_length() - 1, _BLOCK.bit_length() - 1, (k - 1) / 2

    def place(token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tile = token >> to_tile
        tile_y = tile // across
        y = tile_y * rows + ((token >> to_row) & (rows - 1))
        return y, (tile - tile_y * across) * cols + (token & (cols - 1))

    def center(at: torch.Tensor, length: int) -> torch.Tensor:
        return (at - k // 2).clamp(min=0).clamp(max=length - k) + middle

    def sees(b: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        # per pair of tokens two differences and two comparisons; the rest is per token
        (query_y, query_x), (key_y, key_x) = place(query), place(key)
        near_y = (key_y - center(query_y, h)).abs() <= middle
        near_x = (key_x - center(query_x, w)).abs() <= middle
        return near_y & near_x

    # not by from_kv_blocks: it can't be traced with constants
    tokens = down * across * _BLOCK
    return BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=plan.sees[0],
        kv_indices=plan.sees[1],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=plan.seen_by[0],
        q_indices=plan.seen_by[1],
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=sees,
    )


@lru_cache(maxsize=64)
def _block_mask(geometry: NeighborhoodAttentionSpec, h: int, w: int, device: torch.device) -> Any:
    with torch.inference_mode(False), torch.no_grad():
        return _describe(_plan(geometry, h, w, device), h, w, geometry.kernel_size)


def _tiles_seen(
    geometry: NeighborhoodAttentionSpec, h: int, w: int, tile: tuple[int, int]
) -> torch.Tensor:
    """Whether any query of a tile sees a key of another, (tiles, tiles)."""
    near_y, near_x = (_near(length, side, geometry) for length, side in zip((h, w), tile))
    return (near_y[:, None, :, None] & near_x[None, :, None, :]).flatten(2, 3).flatten(0, 1)


@cached_plan
def _plan(geometry: NeighborhoodAttentionSpec, h: int, w: int, device: torch.device) -> FlexPlan:
    def cost(tile: tuple[int, int]) -> tuple[int, bool]:
        near = (_near(length, side, geometry).sum() for length, side in zip((h, w), tile))
        return int(prod(near)), tile[1] != w  # a tile as wide as the grid leaves its order

    tile = min(_TILES, key=cost)
    near = _tiles_seen(geometry, h, w, tile)
    counts = ceil(h / tile[0]), ceil(w / tile[1])
    spots = torch.arange(prod(counts) * _BLOCK).view(*counts, *tile)
    spots = spots.permute(0, 2, 1, 3).reshape(counts[0] * tile[0], counts[1] * tile[1])
    in_order = spots.flatten().argsort()
    y, x = in_order // spots.shape[1], in_order % spots.shape[1]
    tokens = y.clamp(max=h - 1) * w + x.clamp(max=w - 1)
    place = spots[:h, :w].flatten()

    def listed(near: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # FlexAttention's backward kernels read both as contiguous, whatever their strides
        near = near.contiguous()
        order = near.int().argsort(dim=-1, descending=True, stable=True)
        number = near.sum(dim=-1, dtype=torch.int32)
        return number[None, None].to(device), order.int()[None, None].to(device)

    return FlexPlan(
        tile=tile,
        order=None
        if is_range(tokens) and h * w == len(tokens)
        else (tokens.to(device), place.to(device)),
        sees=listed(near),
        seen_by=listed(near.mT),
    )


def _near(length: int, side: int, geometry: NeighborhoodAttentionSpec) -> torch.Tensor:
    """Along an axis: whether any query of a tile sees a key of another, (tiles, tiles)."""
    tile = torch.arange(ceil(length / side))
    start, first = geometry.axis_start(length), tile * side
    low = start[first] // side
    last = start[(first + side - 1).clamp(max=length - 1)] + geometry.kernel_size - 1
    return (tile >= low[:, None]) & (tile <= last[:, None] // side)
