"""Affine warps of a batch of images by cubic B-splines, mirrored beyond the edges.

The law is that of `scipy.ndimage.affine_transform(order=3, mode="mirror")`, in float32 but for the
coordinates. A spline's coefficients are those whose blend by (1, 4, 1) / 6 along each axis is the
image (Unser et al., B-spline signal processing, IEEE TSP 41(2), 1993); each new pixel is a weighted
sum of 4 x 4 of them, which an embedding bag takes in one pass over memory.
"""

from functools import cache

import torch
from torch.nn import functional as F

# Of the cubic B-spline on [0, 1): a row for each power of the fraction, a column for each weight.
_WEIGHTS = torch.tensor([[1, 4, 1, 0], [-3, 0, 3, 0], [3, -6, 3, 0], [-1, 3, -3, 1]]) / 6
_TAPS = torch.arange(-1, 3)
# A coefficient depends on pixels k away by (sqrt(3) - 2)^k: by 4e-8 at 13.
_BLOCK, _REACH = 32, 13
_PIXELS = 2**14  # at a time, which stay in a core's cache


def warp(images: torch.Tensor, matrices: torch.Tensor) -> list[torch.Tensor]:
    """Move what is at p to matrix p: pixel coordinates (x, y, 1) with their origin in the centre.

    images: (n, c, h, w). matrices: (n, 3, 3), invertible. Returns n of (c, h, w) in float32.
    """
    h, w = images.shape[2:]
    inverse = torch.linalg.inv(matrices.double())
    centre = torch.tensor([w - 1, h - 1], dtype=torch.float64) / 2
    linear, shift = inverse[:, :2, :2], inverse[:, :2, 2]
    shift = shift + centre - linear @ centre  # from the first pixel's centre on
    found = spline_coefficients(images.float())
    # scaled and shifted alone, so that the axes can follow each other; and those that are turned
    straight = (linear[:, 0, 1] == 0) & (linear[:, 1, 0] == 0)
    some = max(1, _PIXELS // (h * w))
    parts = [(i, _stretched) for i in straight.nonzero().flatten().split(some) if len(i)]
    parts += [(i, _turned) for i in (~straight).nonzero().flatten().split(some) if len(i)]
    out = list(images)
    for part, resample in parts:
        made = resample(found[part], linear[part], shift[part]).permute(0, 3, 1, 2)
        for i, image in zip(part.tolist(), made):
            out[i] = image
    return out


def spline_coefficients(images: torch.Tensor) -> torch.Tensor:
    """The coefficients of cubic B-splines through pixels: (n, h, w, c). images: (n, c, h, w)."""
    x = images.permute(2, 0, 3, 1).contiguous()
    x = _blend_inverse(x).permute(2, 1, 0, 3).contiguous()
    return _blend_inverse(x).permute(1, 2, 0, 3).contiguous()


def _blend_inverse(x: torch.Tensor) -> torch.Tensor:
    """Coefficients along the first axis. x: (n, ...)."""
    n, flat, out = len(x), x.view(len(x), -1), torch.empty_like(x)
    for i in range(0, n, _BLOCK):
        near = slice(max(0, i - _REACH), i + _BLOCK + _REACH)
        block = slice(i, i + _BLOCK)
        torch.mm(_inverse(n)[block, near], flat[near], out=out[block].view(-1, flat.shape[1]))
    return out


@cache
def _inverse(n: int) -> torch.Tensor:
    """The matrix that makes coefficients out of a line of n pixels: (n, n)."""
    blend = torch.zeros(n, n, dtype=torch.float64)
    for step, weight in (-1, 1), (0, 4), (1, 1):
        at = _mirrored(torch.arange(n) + step, n)
        blend.index_put_((torch.arange(n), at), torch.tensor(weight / 6).double(), accumulate=True)
    return torch.linalg.inv(blend).float()


def _mirrored(i: torch.Tensor, n: int) -> torch.Tensor:
    """The pixel of a line of n that is seen at i, beyond the edges too. i: (...), integers."""
    period = max(1, 2 * n - 2)
    return torch.minimum(i % period, -i % period)


def _stretched(found: torch.Tensor, linear: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """As `_turned`, of diagonal maps. found: (n, h, w, c). linear: (n, 2, 2). shift: (n, 2)."""
    scale = linear.diagonal(dim1=1, dim2=2)
    for axis in 1, 0:
        n, size, across, c = found.shape
        at = scale[:, axis, None] * torch.arange(size) + shift[:, axis, None]
        whole = at.floor()
        taps = _mirrored(whole.long()[..., None] + _TAPS, size)
        taps += torch.arange(n)[:, None, None] * size
        fraction = (at - whole).float().flatten()
        weights = torch.stack([fraction**i for i in range(4)], 1) @ _WEIGHTS
        lines = found.reshape(n * size, across * c)
        found = F.embedding_bag(taps.view(-1, 4), lines, per_sample_weights=weights, mode="sum")
        found = found.view(n, size, across, c).transpose(1, 2)
    return found


def _turned(found: torch.Tensor, linear: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """The pixels, (n, h, w, c), that come from linear (x, y) + shift.

    found: (n, h, w, c). linear: (n, 2, 2). shift: (n, 2).
    """
    n, h, w, c = found.shape
    wide = 4 if c == 3 else c  # which is summed faster
    table = found.new_zeros(n, h + 3, w + 3, wide)
    table[:, 1:-2, 1:-2, :c] = found
    for i in -1, h, h + 1:
        table[:, i + 1] = table[:, 1 + int(_mirrored(torch.tensor(i), h))]
    for i in -1, w, w + 1:
        table[:, :, i + 1] = table[:, :, 1 + int(_mirrored(torch.tensor(i), w))]
    taps = (torch.arange(4)[:, None] * (w + 3) + torch.arange(4)).flatten().int()
    first = torch.arange(n, dtype=torch.float64)[:, None, None] * ((h + 3) * (w + 3))
    weights = torch.kron(_WEIGHTS, _WEIGHTS)
    along_x = linear[:, :, 0, None, None] * torch.arange(w)
    along_y = linear[:, :, 1, None, None] * torch.arange(h)[:, None] + shift[:, :, None, None]
    out = []
    for part in along_y.split(max(1, _PIXELS // (n * w)), dim=2):
        x, right = _inside(part[:, 0] + along_x[:, 0], w)
        y, down = _inside(part[:, 1] + along_x[:, 1], h)
        at = x.add_(y, alpha=w + 3).add_(first).int()
        made = F.embedding_bag(
            at.view(-1, 1) + taps,
            table.view(-1, wide),
            per_sample_weights=_monomials(down.flatten(), right.flatten()).T @ weights,
            mode="sum",
        )
        out.append(made.view(*at.shape, wide))
    return (out[0] if len(out) == 1 else torch.cat(out, 1))[..., :c]


def _inside(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates mirrored into a line of n: whole pixels in float64, fractions. x: (...)."""
    last = n - 1
    furthest = x.abs().max().item() if last else 0.0
    while furthest > last:
        x.abs_().sub_(last).abs_().neg_().add_(last)
        furthest -= 2 * last
    x = x.abs_() if last else x.zero_()
    whole = x.floor()
    return whole, x.sub_(whole).float()


def _monomials(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y^i x^j for i, j from 0 to 3: (16, n). y, x: (n,)."""
    out = x.new_empty(4, 4, len(x))
    out[0, 0] = 1
    for j in 1, 2, 3:
        torch.mul(out[0, j - 1], x, out=out[0, j])
    for i in 1, 2, 3:
        torch.mul(out[i - 1], y, out=out[i])
    return out.view(16, -1)
