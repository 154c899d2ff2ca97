"""A convolutional network applied to a large picture tile by tile."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.tensors import widen


class _Span(NamedTuple):
    """A tile along one side: where it begins and ends, and its part that no other tile has."""

    start: int
    stop: int
    core: slice


def _spans(length: int, tile: int, overlap: int, multiple: int) -> list[_Span]:
    """Tiles that cover `length`, whose neighbours share about `overlap`; all are multiples."""
    if length <= tile:
        return [_Span(0, length, slice(0, length))]
    count = math.ceil((length - overlap) / (tile - overlap))
    step = (length - tile) / (count - 1)
    starts = [round(i * step / multiple) * multiple for i in range(count - 1)] + [length - tile]
    middles = [round((b + a + tile) / 2 / multiple) * multiple for a, b in pairwise(starts)]
    edges = [0, *middles, length]
    return [_Span(a, a + tile, slice(edges[i] - a, edges[i + 1] - a)) for i, a in enumerate(starts)]


def _shares(spans: list[_Span], scale: float) -> list[Tensor]:
    """Each tile's share in the result along one side, (tile scale,): they add up to 1.

    It falls linearly over what a tile has in common with a neighbour.
    """
    total = torch.zeros(round(spans[-1].stop * scale))
    ramps = []
    for i, span in enumerate(spans):
        n = round((span.stop - span.start) * scale)
        place, ramp = torch.arange(n) + 0.5, torch.ones(n)
        if i:
            ramp = ramp.minimum(place / ((spans[i - 1].stop - span.start) * scale))
        if span is not spans[-1]:
            ramp = ramp.minimum((n - place) / ((span.stop - spans[i + 1].start) * scale))
        ramps.append(ramp)
        total[_place(span, scale)] += ramp
    return [ramp / total[_place(span, scale)] for span, ramp in zip(spans, ramps)]


def _place(span: _Span, scale: float) -> slice:
    """Where a tile's result belongs."""
    return slice(round(span.start * scale), round(span.stop * scale))


class _Reached(Exception):
    """A network was run up to a layer whose part in the whole picture isn't known yet.

    found: what the tile adds to it.
    """

    def __init__(self, layer: nn.Module, found: Any):
        super().__init__()
        self.layer, self.found = layer, found


def tiled(
    function: Callable[[Tensor], Tensor],
    network: nn.Module,
    x: Tensor,
    *,
    tile: int,
    scale: float,
    multiple: int = 1,
) -> Tensor:
    """function(x), tile by tile, in the memory of a tile, or of all of them for a gradient.

    Neighbouring tiles share a quarter of their side and are blended there. Away from seams the
    result is function(x), but for what convolutions see from further than a tile's edge. Group
    norms use the statistics of the whole picture, and attention runs on all of it, in the memory
    that it takes there; for each of these layers the network runs once more, up to it. The gradient
    takes the norms' statistics for constants.

    network: holds the layers that the function applies. x: (n, c, h, w). tile: its side, a multiple
    of `multiple`, as h and w are. scale: from the size of x to that of the result
    (n, c', h scale, w scale).
    """
    rows, columns = (_spans(size, tile, tile // 4, multiple) for size in x.shape[2:])
    shares = _shares(rows, scale), _shares(columns, scale)
    layers = _global_layers(network)
    known: dict[nn.Module, Tensor] = {}
    while True:
        found = []
        out = None
        for (row, down), (column, across) in product(zip(rows, shares[0]), zip(columns, shares[1])):
            try:
                with _whole_picture(layers, known, row, column):
                    part = function(x[..., row.start : row.stop, column.start : column.stop])
            except _Reached as reached:
                layer = reached.layer
                found.append(reached.found)
                continue
            if out is None:
                sides = (round(size * scale) for size in x.shape[2:])
                out = part.new_zeros(*part.shape[:2], *sides)
            weight = down[:, None] * across
            out[..., _place(row, scale), _place(column, scale)] += part * weight.to(part)
        if out is not None:
            return out
        if isinstance(layer, nn.GroupNorm):
            known[layer] = sum(found)
        else:
            args = [_joined(cores, len(columns)) for cores in zip(*(args for args, _ in found))]
            named = {k: _joined([kw[k] for _, kw in found], len(columns)) for k in found[0][1]}
            known[layer] = layer(*args, **named)


def _global_layers(module: nn.Module) -> list[nn.Module]:
    """The layers of a network that see all of a picture: group norms, and attention.

    Attention of any library is known by the name of its class; a norm within it is its part.
    """
    name = type(module).__name__
    if isinstance(module, nn.GroupNorm) or name.endswith(("Attention", "AttentionBlock")):
        return [module]
    return [layer for child in module.children() for layer in _global_layers(child)]


@contextmanager
def _whole_picture(
    layers: Sequence[nn.Module], known: dict[nn.Module, Tensor], row: _Span, column: _Span
) -> Iterator[None]:
    """Layers give what is known of the whole picture; the first of another raises _Reached.

    Known are attention's outputs, (n, c, h, w), and the statistics of group norms, (3, n, groups):
    how many numbers, their sum and that of their squares.
    """

    def core(x: Any) -> Any:
        return _core(x, row, column) if isinstance(x, Tensor) else x

    def attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if not (isinstance(out, Tensor) and out.ndim == 4):  # of tokens, whose places aren't known
            return out
        if module not in known:
            raise _Reached(module, ([*map(core, args)], {k: core(x) for k, x in kwargs.items()}))
        scale = out.shape[2] / (row.stop - row.start)
        return known[module][..., _place(row, scale), _place(column, scale)]

    def norm(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        if module not in known:
            y = widen(core(x.detach())).unflatten(1, (module.num_groups, -1)).flatten(2)
            count = torch.full_like(y[..., 0], y.shape[2])
            raise _Reached(module, torch.stack([count, y.sum(2), y.square().sum(2)]))
        count, total, squares = known[module]
        mean = total / count
        rate = ((squares / count - mean**2).clamp(min=0) + module.eps).rsqrt()
        width = x.shape[1] // module.num_groups
        mean, rate = (v.repeat_interleave(width, 1) for v in (mean, rate))
        shape = (*mean.shape, *[1] * (x.ndim - 2))
        scale = rate.view(shape) * module.weight.view(1, *shape[1:])
        shift = module.bias.view(1, *shape[1:]) - mean.view(shape) * scale
        return (widen(x) * scale + shift).to(out.dtype)

    handles = [
        layer.register_forward_hook(norm)
        if isinstance(layer, nn.GroupNorm)
        else layer.register_forward_hook(attention, with_kwargs=True)
        for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(cores: Sequence[Any], columns: int) -> Any:
    """The whole picture, of the cores (n, c, h, w) of all tiles row by row; of others the first."""
    if not isinstance(cores[0], Tensor) or cores[0].ndim != 4:
        return cores[0]
    rows = [torch.cat([*cores[i : i + columns]], 3) for i in range(0, len(cores), columns)]
    return torch.cat(rows, 2)


def _core(x: Tensor, row: _Span, column: _Span) -> Tensor:
    """The part of a tile's features that no other tile has, (n, c, h', w'); all of other shapes."""
    if x.ndim != 4:
        return x
    for dim, span in (2, row), (3, column):
        ratio = x.shape[dim] / (span.stop - span.start)
        start, stop = round(span.core.start * ratio), round(span.core.stop * ratio)
        x = x.narrow(dim, start, stop - start)
    return x
