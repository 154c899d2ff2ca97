"""The levels of a config's model, and the attention backends that its training would take."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ... import augmentation
from ...config import model_schema as schema
from ...config.load import parse
from ...models import attention, unet
from ...models.attention import Geometry, Request


@dataclass(frozen=True)
class Level:
    """One level of a model.

    h, w: its grid of tokens. depth: its blocks, on the way down + up. heads: 0 without attention.
    geometries: of its blocks' attention, each once. attention: what it is called. backend: what
    computes it.
    """

    h: int
    w: int
    width: int
    depth: str
    heads: int
    geometries: Sequence[Geometry]
    attention: str
    backend: str = ""


GEOMETRIES: dict[str, Callable[[Any], str]] = {
    "global": lambda g: "global",
    "neighborhood": lambda g: f"neighborhood {g.kernel_size} x {g.kernel_size}",
    "shifted-window": lambda g: f"windows {g.window_size} x {g.window_size}",
}


def _transformer_level(h: int, w: int, width: int, depth: str, blocks: Iterable[Any]) -> Level:
    attns = [block.self_attn for block in blocks if block.self_attn is not None]
    if not attns:
        return Level(h, w, width, depth, 0, (), "none")
    geometries = tuple(dict.fromkeys(attn.geometry for attn in attns))
    name = GEOMETRIES[geometries[0].name](geometries[0])
    return Level(h, w, width, depth, attns[0].n_heads, geometries, name)


def _levels_v2(model: schema.ImageTransformerV2, inner: Any) -> Iterator[Level]:
    for i, blocks in enumerate([*inner.down_levels, inner.mid_level]):
        h, w = model.tokens(i)
        n = len(blocks)
        depth = f"{n}" if blocks is inner.mid_level else f"{n} + {n}"
        yield _transformer_level(h, w, model.widths[i], depth, blocks)


def _levels_v1(model: schema.ImageTransformerV1, inner: Any) -> Iterator[Level]:
    h, w = (size // patch for size, patch in zip(model.input_size, model.patch_size))
    yield _transformer_level(h, w, model.width, f"{model.depth}", inner.blocks)


_UNET_ATTENTION = {unet.SelfAttention2d: "global", unet.CrossAttention2d: "cross"}


def _levels_unet(model: schema.ImageV1, inner: Any) -> Iterator[Level]:
    if isinstance(inner, augmentation.KarrasAugmentWrapper):
        inner = inner.inner_model
    for i in range(model.skip_stages, len(model.depths)):
        # the first level that isn't left out begins by halving, unless it is the very first
        scale = model.patch_size * 2 ** (i - max(0, model.skip_stages - 1))
        h, w = (size // scale for size in model.input_size)
        width, depth = model.channels[i], f"{model.depths[i]} + {model.depths[i]}"
        found = {type(m): m for m in inner.u_net.d_blocks[i] if type(m) in _UNET_ATTENTION}
        heads = next((m.n_head for m in found.values()), 0)
        geometries = (attention.GlobalAttentionSpec(width // heads),) if heads else ()
        name = " and ".join(_UNET_ATTENTION[kind] for kind in found) or "none"
        # the U-Net calls torch's attention, whatever there is
        yield Level(h, w, width, depth, heads, geometries, name, "sdpa" if found else "-")


LEVELS: dict[type, Callable[[Any, Any], Iterator[Level]]] = {
    schema.ImageV1: _levels_unet,
    schema.ImageTransformerV1: _levels_v1,
    schema.ImageTransformerV2: _levels_v2,
}


def make_levels(
    config: Mapping[str, Any], inner: nn.Module, device: torch.device, dtype: torch.dtype
) -> list[Level]:
    """The levels of a config's model, as it trains on a device, with q, k and v of a dtype.

    inner: the model, on any device. Raises ValueError if a backend is forced that can't run.
    """
    model = parse(config, lenient=True).model
    levels = []
    for level in LEVELS[type(model)](model, inner):
        if not level.backend:
            name = "-"
            if level.geometries:
                request = Request(level.geometries[0], level.h, level.w, device.type, dtype)
                name = attention.choose_backend(request)
            level = dataclasses.replace(level, backend=name)
        levels.append(level)
    return levels
