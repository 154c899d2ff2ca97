"""Precision, recall, density and coverage: what of one set lies among the neighbours of another.

A set stands for the union of balls around its samples, each reaching to the k-th nearest of the
others. Distances come block by block, so that no matrix of all pairs is in memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.tensors import in_float64
from .statistics import check_alike, check_features

_BLOCK = 1 << 24  # distances at a time, 128 MiB


class PRDC(NamedTuple):
    """One number per sample, whose means are precision (of the fakes), recall (of the reals),
    density (of the fakes) and coverage (of the reals)."""

    precision: Tensor
    recall: Tensor
    density: Tensor
    coverage: Tensor


def prdc(fake: Tensor, real: Tensor, k: int = 5) -> PRDC:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797) by sample.

    fake: (n, d). real: (m, d). k: of the k-nearest-neighbour balls; 3 for ADM's precision and
    recall, 5 for density and coverage. `.precision.double().mean()` is the metric. Raises
    ValueError unless both sets have more than k samples.
    """
    check_alike(fake, real)
    fake, real = check_features("fakes", fake), check_features("reals", real)
    if k < 1 or min(len(fake), len(real)) <= k:
        raise ValueError(
            f"precision, recall, density and coverage with k = {k} need at least {max(k, 1) + 1} "
            f"samples of each set and k >= 1, got {len(fake)} and {len(real)}; draw more or lower k"
        )
    shift = in_float64(real).mean(0)  # distances between centred features lose fewer digits
    fake, real = in_float64(fake) - shift, in_float64(real) - shift
    fake_radii, real_radii = _radii(fake, k), _radii(real, k)
    balls = []  # of reals around each fake
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    nearest = torch.full_like(real_radii, torch.inf)
    for start, squares in _squared_distances(fake, real):
        balls.append((squares <= real_radii).sum(1))
        recalled |= (squares <= fake_radii[start : start + len(squares), None]).any(0)
        nearest = torch.minimum(nearest, squares.amin(0))
    counts = torch.cat(balls)
    return PRDC(
        (counts > 0).double(),
        recalled.double(),
        counts.double() / k,
        (nearest <= real_radii).double(),
    )


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The squared distances of some rows of x to all of y, and the number of the first row."""
    squares = y.square().sum(1)
    start = 0
    for rows in x.split(max(1, _BLOCK // len(y))):
        products = torch.addmm(squares, rows, y.mT, alpha=-2)
        yield start, products.add_(rows.square().sum(1)[:, None]).clamp_(min=0)
        start += len(rows)


def _radii(x: Tensor, k: int) -> Tensor:
    """The squared distance of each row of x to the k-th nearest of the others."""
    radii = []
    for start, squares in _squared_distances(x, x):
        squares.diagonal(start).fill_(torch.inf)  # each row's distance to itself
        radii.append(squares.kthvalue(k, dim=1).values)
    # the k-th itself is in the ball, whichever way its distance is rounded
    return torch.cat(radii) * (1 + 1e-9)
