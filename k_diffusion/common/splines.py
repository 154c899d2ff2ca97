"""Affine warps of many images by cubic B-splines, mirrored beyond the edges.

The law is that of `scipy.ndimage.affine_transform(order=3, mode="mirror")`, in float32. A spline's
coefficients are those whose blend by (1, 4, 1) / 6 along each axis is the image (Unser et al.,
B-spline signal processing, IEEE TSP 41(2), 1993); each new pixel is a weighted sum of 4 x 4 of
them. Two neighbours of weights a and b are a + b times what lies b / (a + b) of the way from one to
the other, so that four bilinear samples make a pixel (Sigg and Hadwiger, Fast third-order texture
filtering, GPU Gems 2, chapter 20, 2005).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional as F

# Of the cubic B-spline on [0, 1): a row for each power of the fraction, a column for each weight.
_WEIGHTS = torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) / 6
_REACH = 13  # a coefficient depends on pixels k away by about (sqrt(3) - 2)^k
_BLOCK, _DENSE = 32, 64  # rows at a time of matrices whose zeros are worth skipping
_PIXELS = 2**16  # at a time, which stay in a core's cache

# Rows of a matrix after others, (n or 1, i, near), and which columns they take.
_Bands = list[tuple[slice, torch.Tensor]]


def warp(images: Sequence[torch.Tensor], matrices: torch.Tensor) -> list[torch.Tensor]:
    """Move what is at p to matrix p: pixel coordinates (x, y, 1) with their origin in the centre.

    images: n of (c, h, w). matrices: (n, 3, 3), invertible. Returns n of (c, h, w) in float32.
    Where an image is turned, the places that its pixels come from are off by about 1e-7 of a side.
    """
    h, w = images[0].shape[1:]
    inverse = torch.linalg.inv(matrices.double())
    centre = torch.tensor([w - 1, h - 1], dtype=torch.float64) / 2
    linear, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    # what the centre shows, as close to it as mirrors repeat it; then what the first pixel shows
    shift = shift - 4 * centre * (shift / (4 * centre).clamp(min=1)).round()
    shift = shift + centre - linear @ centre
    # scaled and shifted alone, so that the axes can follow each other; and those that are turned
    straight = (linear[:, 0, 1] == 0) & (linear[:, 1, 0] == 0)
    some = max(1, _PIXELS // (h * w))
    out = list(images)
    for chosen, plan, resample in (straight, _taps, _stretched), (~straight, _places, _turned):
        planned = plan(linear[chosen], shift[chosen], h, w)
        places = chosen.nonzero().flatten().tolist()
        for k in range(0, len(places), some):
            these = places[k : k + some]
            pixels = torch.stack([images[i].transpose(0, 1) for i in these]).float()
            made = resample(pixels.transpose(1, 2), *(x[k : k + some] for x in planned))
            for i, image in zip(these, made):
                out[i] = image
    return out


def spline_coefficients(images: torch.Tensor) -> torch.Tensor:
    """The coefficients of cubic B-splines through pixels: (n, c, h, w). images: (n, c, h, w)."""
    return _along_both(images, *(_prefilter(n) for n in images.shape[2:]))


def _along_both(images: torch.Tensor, along_y: _Bands, along_x: _Bands) -> torch.Tensor:
    """Each column times a matrix, each row times another. images: (n, c, h, w), as what returns."""
    n, c, h, w = images.shape
    columns = images.transpose(1, 2).reshape(n, h, c * w)
    rows = images.new_empty(n, h, c * w)
    _along(columns, along_y, rows)
    out = images.new_empty(n, h * c, w)
    _along(rows.view(n, h * c, w).mT, along_x, out.mT)
    return out.view(n, h, c, w).transpose(1, 2)


def _along(x: torch.Tensor, bands: _Bands, out: torch.Tensor) -> None:
    """out, (n, i, k), becomes a matrix times x. x: (n, h, k)."""
    at = 0
    for near, rows in bands:
        made = out[:, at : at + rows.shape[1]]
        torch.bmm(rows.expand(len(x), -1, -1), x[:, near], out=made)
        at += rows.shape[1]


def _bands(matrices: torch.Tensor, taps: torch.Tensor) -> _Bands:
    """Square matrices, (n or 1, i, i), without what is zero: in each row all before the first of
    its taps and after the last, (n or 1, i, k)."""
    size = matrices.shape[1]
    if size <= _DENSE:
        return [(slice(None), matrices)]
    first, last = taps.amin((0, 2)).tolist(), taps.amax((0, 2)).tolist()
    bands = []
    for i in range(0, size, _BLOCK):
        rows = slice(i, i + _BLOCK)
        near = slice(min(first[rows]), max(last[rows]) + 1)
        bands.append((near, matrices[:, rows, near]))
    return bands


@cache
def _prefilter(n: int) -> _Bands:
    """The matrix that makes coefficients out of a line of n pixels: (1, n, n)."""
    blend = torch.zeros(n, n, dtype=torch.float64)
    places = torch.arange(n)[:, None]
    for step, weight in (-1, 1), (0, 4), (1, 1):
        blend.scatter_add_(1, _mirrored(places + step, n), torch.full_like(blend, weight / 6))
    near = (places + torch.tensor([-_REACH, _REACH])).clamp(0, n - 1)
    return _bands(torch.linalg.inv(blend).float()[None], near[None])


def _mirrored(i: torch.Tensor, n: int) -> torch.Tensor:
    """The pixel of a line of n that is seen at i, beyond the edges too. i: (...), integers."""
    period = max(1, 2 * n - 2)
    return torch.minimum(i % period, -i % period)


def _taps(linear: torch.Tensor, shift: torch.Tensor, h: int, w: int) -> list[torch.Tensor]:
    """The coefficients around the places of lines along y, (n, h, 4), and their weights; then x.

    linear: (n, 2, 2), diagonal. shift: (n, 2). The pixels come from linear (x, y) + shift.
    """
    out = []
    for axis, size in (1, h), (0, w):
        at = linear[:, axis, axis, None] * torch.arange(size) + shift[:, axis, None]
        whole = at.floor()
        out.append(_mirrored(whole.long()[..., None] + torch.arange(-1, 3), size))
        out.append((at - whole).float()[..., None] ** torch.arange(4) @ _WEIGHTS)
    return out


def _stretched(images: torch.Tensor, *taps: torch.Tensor) -> torch.Tensor:
    """The pixels, (n, c, h, w), by taps of `_taps`. images: (n, c, h, w)."""
    y, of_y, x, of_x = taps
    bands = (
        _bands(torch.zeros(*at.shape[:2], at.shape[1]).scatter_add_(2, at, weights), at)
        for at, weights in ((y, of_y), (x, of_x))
    )
    return _along_both(spline_coefficients(images), *bands)


def _places(linear: torch.Tensor, shift: torch.Tensor, h: int, w: int) -> list[torch.Tensor]:
    """Where pixels come from, linear (x, y) + shift: what their rows, (n, 2, h, 1), and columns,
    (n, 2, 1, w), add, for `grid_sample`, and how far between pixels that is.

    linear: (n, 2, 2). shift: (n, 2).
    """
    unit = _unit(h, w)
    y = (linear[:, :, 1:] * torch.arange(h) + shift[..., None])[..., None]
    x = (linear[:, :, :1] * torch.arange(w))[:, :, None]
    return [places.float() for places in (y * unit - 1, x * unit, y.remainder(1), x.remainder(1))]


def _unit(h: int, w: int) -> torch.Tensor:
    """A pixel along x and y in `grid_sample`'s coordinates, from -1 to 1: (2, 1, 1), in float64."""
    return 2 / torch.tensor([w - 1, h - 1]).clamp(min=1).double().view(2, 1, 1)


def _turned(images: torch.Tensor, *places: torch.Tensor) -> torch.Tensor:
    """The pixels, (n, c, h, w), from places of `_places`. images: (n, c, h, w)."""
    n, _, h, w = images.shape
    found = spline_coefficients(images)
    rows, columns, past_rows, past_columns = places
    unit = _unit(h, w).float()
    out = torch.empty_like(images)
    many = max(1, _PIXELS // (n * w))
    for row, past, made in zip(rows.split(many, 2), past_rows.split(many, 2), out.split(many, 2)):
        weights, *pairs = _pairs((past + past_columns).frac_())
        at = row + columns
        xs, ys = zip(*(torch.addcmul(at, step, unit).unbind(1) for step in pairs))

        def sampled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            grid = torch.stack([x, y]).permute(1, 2, 3, 0)  # whose planes stay contiguous
            return F.grid_sample(found, grid, padding_mode="reflection", align_corners=True)

        of_x, of_y = weights[:, :, None].unbind(1)
        one, other = (sampled(xs[0], y).lerp_(sampled(xs[1], y), of_x) for y in ys)
        torch.lerp(one, other, of_y, out=made)
    return out


def _pairs(fraction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four coefficients around a place, as two pairs, each (...).

    fraction: (...), of the way from the second to the third. Returns the sum of the weights of the
    second pair, and from the place, in pixels, the way to where each pair is interpolated.
    """
    six = (3 - 2 * fraction).mul_(fraction).add_(3).mul_(fraction).add_(1)
    rest = 1 - fraction
    second = fraction.pow(3).div_(six).add_(rest)
    first = rest.pow_(3).div_(six - 6).sub_(fraction)
    return six.div_(6), first, second
