"""Affine warps of many images by cubic B-splines, mirrored beyond the edges.

The law is that of `scipy.ndimage.affine_transform(order=3, mode="mirror")`, in float32 but for the
coordinates. A spline's coefficients are those whose blend by (1, 4, 1) / 6 along each axis is the
image (Unser et al., B-spline signal processing, IEEE TSP 41(2), 1993); each new pixel is a weighted
sum of 4 x 4 of them.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional as F

# Of the cubic B-spline on [0, 1): a row for each power of the fraction, a column for each weight.
_WEIGHTS = torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) / 6
_BLOCKS = torch.block_diag(*[_WEIGHTS] * 4)  # of some places at once, which is faster
_TAPS = torch.arange(-1, 3)
_NOTHING = 1e-7  # a coefficient depends on pixels k away by about (sqrt(3) - 2)^k
_BLOCK, _DENSE = 64, 128  # rows at a time of matrices whose zeros are worth skipping
_PIXELS = 2**13  # at a time, which stay in a core's cache


def warp(images: Sequence[torch.Tensor], matrices: torch.Tensor) -> list[torch.Tensor]:
    """Move what is at p to matrix p: pixel coordinates (x, y, 1) with their origin in the centre.

    images: n of (c, h, w). matrices: (n, 3, 3), invertible. Returns n of (c, h, w) in float32.
    """
    h, w = images[0].shape[1:]
    inverse = torch.linalg.inv(matrices.double())
    centre = torch.tensor([w - 1, h - 1], dtype=torch.float64) / 2
    linear, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    shift = shift + centre - linear @ centre  # from the first pixel's centre on
    # scaled and shifted alone, so that the axes can follow each other; and those that are turned
    straight = (linear[:, 0, 1] == 0) & (linear[:, 1, 0] == 0)
    some = max(1, _PIXELS // (h * w))
    parts = [(i, _stretched) for i in straight.nonzero().flatten().split(some) if len(i)]
    parts += [(i, _turned) for i in (~straight).nonzero().flatten().split(some) if len(i)]
    out = list(images)
    for part, resample in parts:
        pixels = torch.stack([images[i] for i in part.tolist()]).float()
        for i, image in zip(part.tolist(), resample(pixels, linear[part], shift[part])):
            out[i] = image
    return out


def spline_coefficients(images: torch.Tensor, beyond: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """The coefficients of cubic B-splines through pixels: (n, c, h, w). images: (n, c, h, w).

    beyond: how many are added before the first and after the last, along both axes.
    """
    return _along_both(images, *(_inverse(n, *beyond)[None] for n in images.shape[2:]))


def _along_both(images: torch.Tensor, along_y: torch.Tensor, along_x: torch.Tensor) -> torch.Tensor:
    """Each column times a matrix, each row times another: (n, c, i, j).

    images: (n, c, h, w). along_y: (n or 1, i, h). along_x: (n or 1, j, w).
    """
    return _along(_along(images.mT, along_x).mT, along_y)


def _along(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Products with matrices whose zeros are skipped. x: (n, c, h, w). matrices: (n or 1, i, h)."""
    if x.shape[2] <= _DENSE:
        return matrices[:, None] @ x
    made = []
    for rows in matrices[:, None].split(_BLOCK, 2):
        used = rows.any(2).flatten(0, 1).any(0).nonzero()
        near = slice(int(used[0]), int(used[-1]) + 1)
        made.append(rows[..., near] @ x[:, :, near])
    return torch.cat(made, 2)


@cache
def _inverse(n: int, before: int = 0, after: int = 0) -> torch.Tensor:
    """The matrix that makes coefficients out of a line of n pixels: (before + n + after, n)."""
    blend = torch.zeros(n, n, dtype=torch.float64)
    for step, weight in (-1, 1), (0, 4), (1, 1):
        at = _mirrored(torch.arange(n) + step, n)
        blend.index_put_((torch.arange(n), at), torch.tensor(weight / 6).double(), accumulate=True)
    inverse = torch.linalg.inv(blend).float()[_mirrored(torch.arange(-before, n + after), n)]
    return inverse.masked_fill_(inverse.abs() < _NOTHING, 0)


def _mirrored(i: torch.Tensor, n: int) -> torch.Tensor:
    """The pixel of a line of n that is seen at i, beyond the edges too. i: (...), integers."""
    period = max(1, 2 * n - 2)
    return torch.minimum(i % period, -i % period)


def _weights(fraction: torch.Tensor) -> torch.Tensor:
    """Of the four coefficients around a place: (n, 4). fraction: (n,), of the way to the third."""
    n, m = len(fraction), len(_BLOCKS) // 4
    powers = fraction.new_ones(-(-n // m) * m, 4)
    for i in 1, 2, 3:
        torch.mul(powers[:n, i - 1], fraction, out=powers[:n, i])
    return (powers.view(-1, 4 * m) @ _BLOCKS).view(-1, 4)[:n]


def _stretched(images: torch.Tensor, linear: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As `_turned`, of diagonal maps: a matrix along each axis, coefficients included.

    images: (n, c, h, w). linear: (n, 2, 2). shift: (n, 2).
    """
    matrices = []
    for axis, size in (1, images.shape[2]), (0, images.shape[3]):
        at = linear[:, axis, axis, None] * torch.arange(size) + shift[:, axis, None]
        whole = at.floor()
        taps = _mirrored(whole.long()[..., None] + _TAPS, size)
        matrix = F.embedding_bag(
            taps.view(-1, 4),
            _inverse(size),
            per_sample_weights=_weights((at - whole).float().flatten()),
            mode="sum",
        )
        matrices.append(matrix.view(*at.shape, size))
    return _along_both(images, *matrices)


def _turned(images: torch.Tensor, linear: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The pixels, (n, c, h, w), that come from linear (x, y) + shift.

    images: (n, c, h, w). linear: (n, 2, 2). shift: (n, 2).
    """
    n, c, h, w = images.shape
    found = spline_coefficients(images, (1, 2)).permute(0, 2, 3, 1).contiguous()
    # for each place four neighbours in x, which are summed last
    rows, one = found.stride()[:2], found.stride(2)
    table = found.as_strided((n, h + 3, w, 4 * c), (*rows, one, 1)).reshape(-1, 4 * c)
    first = torch.arange(n)[:, None] * ((h + 3) * w) + torch.arange(0, 4 * w, w)
    first = first[:, None, None].int()
    along_x, along_y = (
        linear[:, :, axis].T[:, :, None, None] * torch.arange(size).unsqueeze(axis)
        for axis, size in ((0, w), (1, h))
    )
    along_y += shift.T[:, :, None, None]
    period = 2 * torch.tensor([w - 1, h - 1], dtype=torch.float64).clamp(min=1e-9)
    period = period[:, None, None, None]
    out = torch.empty_like(images)
    many = max(1, _PIXELS // (n * w))
    neighbours = torch.arange(4 * n * min(many, h) * w, dtype=torch.int32).view(-1, 4)
    for part, made in zip(along_y.split(many, 2), out.split(many, 2)):
        at = part + along_x
        at.addcmul_((at / period).round_(), period, value=-1).abs_()  # mirrored into the image
        whole = at.floor()
        across, down = _weights(at.sub_(whole).float().flatten()).view(2, -1, 4)
        corner = torch.add(whole[0], whole[1], alpha=w).int()
        four = F.embedding_bag(
            (corner[..., None] + first).view(-1, 4), table, per_sample_weights=down, mode="sum"
        )
        pixels = F.embedding_bag(
            neighbours[: len(four)], four.view(-1, c), per_sample_weights=across, mode="sum"
        )
        made.copy_(pixels.view(n, -1, w, c).permute(0, 3, 1, 2))
    return out
