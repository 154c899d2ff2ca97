"""Attention over tiles of a grid, in plain PyTorch: the form of every geometry.

Queries are cut into equal tiles, each tile gathers the keys that any of its queries sees, and one
scaled_dot_product_attention runs with the tiles as its batch. Memory grows linearly in the number
of tokens.
"""

from dataclasses import dataclass

import torch

from .plain import dense, fused

# So many numbers of q are worked on at once on the CPU: the gathered windows stay in the cache.
_NUMBERS_AT_ONCE = 2**16


@dataclass(frozen=True)
class TilePlan:
    """Where the tiles' tokens come from, as row indices into the flattened grid.

    index: None for one tile of all tokens in their order, or three tensors: the queries of each
    tile, tile by tile, (tiles * tile_tokens,), the keys of each tile, (tiles * key_tokens,), and
    the row of the tiled result that holds each token, (tokens,).
    mask: None, or (tiles, 1, tile_tokens, key_tokens), 0 where seen and -inf where not.
    tiles: their number.
    """

    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
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
        if len(queries) == 1 and all(is_range(x[0]) for x in (queries, keys)):
            return cls(None, mask, 1)
        rows = torch.arange(queries.numel())
        place = torch.full((int(queries.max()) + 1,), queries.numel())
        place.scatter_reduce_(0, queries.flatten(), rows, "amin")
        flat = [x.flatten().to(device) for x in (queries, keys, place)]
        return cls((flat[0], flat[1], flat[2]), mask, len(queries))


def is_range(x: torch.Tensor) -> bool:
    """Whether x, (n,), is 0, 1, 2, ..."""
    return torch.equal(x, torch.arange(len(x)))


def take_tokens(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens by their index. x: (n, tokens, heads, e). index: (m,). Returns (n, m, heads, e)."""
    if torch.compiler.is_compiling():
        return x.index_select(1, index)
    # rows of a matrix are taken, and their gradients added, twice as fast as slices of a tensor
    n, tokens, heads, e = x.shape
    if n == 1:
        rows = index
    else:
        rows = (torch.arange(n, device=x.device)[:, None] * tokens + index).flatten()
    taken = x.reshape(n * tokens, heads * e).index_select(0, rows)
    return taken.view(n, len(index), heads, e)


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TilePlan
) -> torch.Tensor:
    """q, k, v: (n, tokens, heads, e). Returns the shape of q."""
    if plan.index is None:
        return dense(q, k, v, plan.mask)
    n, tokens, heads, e = q.shape
    part = max(1, _NUMBERS_AT_ONCE // (tokens * heads * e))
    # the batch size is asked for last: compiled code would be for some sizes alone
    if not torch.compiler.is_compiling() and q.device.type == "cpu" and n > part:
        parts = zip(q.split(part), k.split(part), v.split(part))
        return torch.cat([tiled_attention(*part, plan) for part in parts])
    queries, keys, place = plan.index

    def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        rows = take_tokens(x, index).unflatten(1, (plan.tiles, -1))
        # tiles are the batch, samples x heads the heads: the mask then broadcasts over samples
        return rows.permute(1, 0, 3, 2, 4).flatten(1, 2)

    out = fused(gather(q, queries), gather(k, keys), gather(v, keys), plan.mask)
    rows = out.unflatten(1, (n, heads)).permute(1, 0, 3, 2, 4)
    return take_tokens(rows.flatten(1, 2), place)
