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


class _Measured(Exception):
    """A network was run up to the group norm whose statistics were asked for."""


def tiled(
    function: Callable[[Tensor], Tensor],
    network: nn.Module,
    x: Tensor,
    *,
    tile: int,
    scale: float,
    multiple: int = 1,
    exact: bool = True,
) -> Tensor:
    """function(x), tile by tile, in the memory of a tile, or of all of them for a gradient.

    Neighbouring tiles share a quarter of their side and are blended there. Away from seams the
    result is function(x), but for what convolutions see from further than a tile's edge, and for
    attention, which sees a tile alone. Group norms would, too: `exact` runs the network once more
    for each of them, up to it, to collect the statistics of the whole picture; without, it is
    faster by half their number, and contrast and colour may differ from tile to tile. The gradient
    takes the statistics for constants.

    network: holds the group norms that the function applies. x: (n, c, h, w). tile: its side, a
    multiple of `multiple`, as h and w are. scale: from the size of x to that of the result
    (n, c', h scale, w scale).
    """
    rows, columns = (_spans(size, tile, tile // 4, multiple) for size in x.shape[2:])
    shares = _shares(rows, scale), _shares(columns, scale)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)] if exact else []
    known: dict[nn.Module, Tensor] = {}
    while True:
        sums: dict[nn.Module, Tensor] = {}
        out = None
        for (row, down), (column, across) in product(zip(rows, shares[0]), zip(columns, shares[1])):
            try:
                with _shared_norms(norms, known, sums, row, column):
                    part = function(x[..., row.start : row.stop, column.start : column.stop])
            except _Measured:
                continue
            if out is None:
                sides = (round(size * scale) for size in x.shape[2:])
                out = part.new_zeros(*part.shape[:2], *sides)
            weight = down[:, None] * across
            out[..., _place(row, scale), _place(column, scale)] += part * weight.to(part)
        if out is not None:
            return out
        known |= sums


@contextmanager
def _shared_norms(
    norms: Sequence[nn.Module],
    known: dict[nn.Module, Tensor],
    sums: dict[nn.Module, Tensor],
    row: _Span,
    column: _Span,
) -> Iterator[None]:
    """Group norms use the statistics that are known; the first of another adds its up, and stops.

    Statistics are (3, n, groups): how many numbers, their sum and that of their squares.
    """

    def hook(module: Any, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = args[0]
        if module not in known:
            core = widen(_core(x.detach(), row, column))
            core = core.unflatten(1, (module.num_groups, -1)).flatten(2)
            count = torch.full_like(core[..., 0], core.shape[2])
            found = torch.stack([count, core.sum(2), core.square().sum(2)])
            sums[module] = sums[module] + found if module in sums else found
            raise _Measured
        count, total, squares = known[module]
        mean = total / count
        rate = ((squares / count - mean**2).clamp(min=0) + module.eps).rsqrt()
        width = x.shape[1] // module.num_groups
        mean, rate = (v.repeat_interleave(width, 1) for v in (mean, rate))
        shape = (*mean.shape, *[1] * (x.ndim - 2))
        scale = rate.view(shape) * module.weight.view(1, *shape[1:])
        shift = module.bias.view(1, *shape[1:]) - mean.view(shape) * scale
        return (widen(x) * scale + shift).to(out.dtype)

    handles = [module.register_forward_hook(hook) for module in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _core(x: Tensor, row: _Span, column: _Span) -> Tensor:
    """The part of a tile's features that no other tile has, (n, c, h', w'); all of other shapes."""
    if x.ndim != 4:
        return x
    for dim, span in (2, row), (3, column):
        ratio = x.shape[dim] / (span.stop - span.start)
        start, stop = round(span.core.start * ratio), round(span.core.stop * ratio)
        x = x.narrow(dim, start, stop - start)
    return x
