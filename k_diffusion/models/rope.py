"""Axial rotary position embeddings (RoPE, arXiv 2104.09864) with per-head frequencies (HDiT)."""

import math

import torch
from torch import nn

from ..common.tensors import wide


def bounding_box(
    h: int, w: int, pixel_aspect_ratio: float = 1.0
) -> tuple[float, float, float, float]:
    """(y_min, y_max, x_min, x_max) of an h x w image whose longer side spans [-1, 1].

    pixel_aspect_ratio: height of a pixel over its width.
    """
    aspect_ratio = w / (h * pixel_aspect_ratio)
    y, x = min(1.0, 1 / aspect_ratio), min(1.0, aspect_ratio)
    return -y, y, -x, x


def centers(
    start: float,
    stop: float,
    num: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Mid-points, (num,), of `num` equal cells between start and stop."""
    edges = torch.linspace(start, stop, num + 1, dtype=dtype, device=device)
    return (edges[:-1] + edges[1:]) / 2


def make_grid(h_pos: torch.Tensor, w_pos: torch.Tensor) -> torch.Tensor:
    """All pairs of a (h,) and a (w,) axis, row by row: (h * w, 2), y first.

    h_pos: (h,). w_pos: (w,).
    """
    return torch.cartesian_prod(h_pos, w_pos)


def make_axial_pos(
    h: int,
    w: int,
    pixel_aspect_ratio: float = 1.0,
    align_corners: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Positions of an h x w grid in its bounding box: (h * w, 2), y first.

    align_corners: put the outer pixels on the box's border instead of half a pixel inside.
    """
    y_min, y_max, x_min, x_max = bounding_box(h, w, pixel_aspect_ratio)
    place = torch.linspace if align_corners else centers
    h_pos = place(y_min, y_max, h, dtype=dtype, device=device)
    w_pos = place(x_min, x_max, w, dtype=dtype, device=device)
    return make_grid(h_pos, w_pos)


def cos_sin(theta: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of angles in radians, to `rotate` features of `dtype`; at least float32.

    theta: (..., d / 2).
    """
    dtype = wide(dtype, theta.dtype)
    theta = theta.to(dtype)
    return theta.cos(), theta.sin()


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x in three parts: the d first and the d second features of each pair, rotated, and the rest.

    x: (..., e). cos, sin: broadcast to (..., d), as `cos_sin` makes them.
    """
    d = cos.shape[-1]
    if 2 * d > x.shape[-1]:
        raise ValueError(f"{d} angles rotate {2 * d} features, but x has only {x.shape[-1]}")
    # a split, since its backward is one concatenation and a slice's fills zeros each time
    a, b, rest = x.split([d, d, x.shape[-1] - 2 * d], dim=-1)
    a, b = a.to(cos.dtype), b.to(cos.dtype)
    a, b = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return a.to(x.dtype), b.to(x.dtype), rest


def apply_rotary_emb(x: torch.Tensor, theta: torch.Tensor, conj: bool = False) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + d]) by theta[i], for d = theta.shape[-1].

    x: (..., e) with e >= 2 d; features from 2 d on pass through. theta: broadcasts to (..., d),
    radians. conj: rotate the other way. The angles' cosines are computed in at least float32.
    """
    cos, sin = cos_sin(theta, x.dtype)
    return torch.cat(rotate(x, cos, -sin if conj else sin), dim=-1)


def apply_rotary_emb_(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """`apply_rotary_emb` in place: x is overwritten and returned. Differentiable in x.

    x: (..., e). theta: broadcasts to (..., d), radians.
    """
    a, b, _ = rotate(x, *cos_sin(theta, x.dtype))
    d = theta.shape[-1]
    x[..., :d] = a
    x[..., d : 2 * d] = b
    return x


def axial_log_freqs(dim: int, n_heads: int) -> torch.Tensor:
    """The logarithms of an axis' frequencies for each head, (n_heads, dim // 4).

    They are spaced evenly from pi up to 10 pi (exclusive), and dealt out to the heads in turn. dim:
    how many features of a head both axes rotate.
    """
    n = n_heads * dim // 4
    log_freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), n + 1)[:-1]
    return log_freqs.view(dim // 4, n_heads).T


class AxialRoPE(nn.Module):
    """Angles of axial RoPE: half of them turn with y, half with x.

    dim: how many features of a head are rotated. The frequencies, those of `axial_log_freqs`, are a
    buffer `freqs`, (n_heads, dim // 4).
    """

    freqs: torch.Tensor

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        self.register_buffer("freqs", axial_log_freqs(dim, n_heads).exp().contiguous())

    def forward(self, pos: torch.Tensor) -> torch.Tensor:
        """pos: (..., 2), y first. Returns angles (..., n_heads, dim // 2) in radians."""
        theta = pos[..., None, :, None] * self.freqs[:, None, :].to(pos.dtype)
        return theta.flatten(-2)
