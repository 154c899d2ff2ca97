"""Attention over tiles of a grid, in plain PyTorch: the form of every local geometry.

Queries are cut into equal tiles, each tile gathers the keys that any of its queries sees, and one
scaled_dot_product_attention runs with the tiles as its batch. Memory grows linearly in the number
of tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles' tokens come from, as row indices into the flattened grid.

    queries: (tiles * tile_tokens,) the queries of each tile, tile by tile.
    keys: (tiles * key_tokens,) the keys of each tile.
    place: (tokens,) the row of the tiled result that holds each token.
    mask: None, or (tiles, 1, tile_tokens, key_tokens), 0 where seen and -inf where not.
    tiles: their number.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    place: torch.Tensor
    mask: torch.Tensor | None
    tiles: int

    @classmethod
    def make(
        cls,
        queries: torch.Tensor,
        keys: torch.Tensor,
        seen: torch.Tensor,
        device: torch.device,
        dtype: torch.dtype,
    ) -> "TilePlan":
        """queries: (tiles, tile_tokens), every token at least once; keys: (tiles, key_tokens);
        seen: boolean, (tiles, tile_tokens, key_tokens)."""
        mask = None
        if not seen.all():
            mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
            mask = mask[:, None].to(device)
        rows = torch.arange(queries.numel())
        place = torch.full((int(queries.max()) + 1,), queries.numel())
        place.scatter_reduce_(0, queries.flatten(), rows, "amin")
        flat = [x.flatten().to(device) for x in (queries, keys, place)]
        return cls(flat[0], flat[1], flat[2], mask, len(queries))


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TilePlan
) -> torch.Tensor:
    """q, k, v: (n, tokens, heads, e). Returns the shape of q."""
    if q.device.type == "cpu" and len(q) > 1:
        # one sample at a time keeps the gathered windows in the cache
        parts = zip(q.split(1), k.split(1), v.split(1))
        return torch.cat([tiled_attention(*part, plan) for part in parts])
    n, _, heads, e = q.shape

    def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        rows = x.index_select(1, index).view(n, plan.tiles, -1, heads, e)
        # tiles are the batch, samples x heads the heads: the mask then broadcasts over samples
        return rows.permute(1, 0, 3, 2, 4).flatten(1, 2)

    out = F.scaled_dot_product_attention(
        gather(q, plan.queries),
        gather(k, plan.keys),
        gather(v, plan.keys),
        attn_mask=plan.mask,
        scale=1.0,
    )
    rows = out.unflatten(1, (n, heads)).permute(1, 0, 3, 2, 4)
    return rows.reshape(n, -1, heads, e).index_select(1, plan.place)
