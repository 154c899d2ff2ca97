"""What a model says of its levels, for reports on what it would cost."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .attention import Geometry


@dataclass(frozen=True)
class Level:
    """One level of a model, from the finest.

    h, w: its grid of tokens. depth: its blocks, on the way down + up. heads: 0 without attention.
    geometries: of its blocks' attention, each once. attention: what it is called. backend: what
    computes it, "" where that is yet to be chosen, "-" for nothing.
    """

    h: int
    w: int
    width: int
    depth: str
    heads: int
    geometries: Sequence[Geometry]
    attention: str
    backend: str = ""


def transformer_level(h: int, w: int, width: int, depth: str, blocks: Iterable[Any]) -> Level:
    """The level of transformer blocks, which have their attention, or None, as `self_attn` and
    `cross_attn`."""
    blocks = list(blocks)
    attns = [block.self_attn for block in blocks if block.self_attn is not None]
    cross = [block.cross_attn for block in blocks if getattr(block, "cross_attn", None) is not None]
    if not attns and not cross:
        return Level(h, w, width, depth, 0, (), "none", "-")
    if not attns:
        heads = cross[0].n_heads
        return Level(h, w, width, depth, heads, (cross[0].heads,), "cross", "sdpa")
    geometries = tuple(dict.fromkeys(attn.geometry for attn in attns))
    name = geometries[0].describe() + (" and cross" if cross else "")
    return Level(h, w, width, depth, attns[0].n_heads, geometries, name)
