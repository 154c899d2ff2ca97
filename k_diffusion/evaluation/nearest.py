"""The training images that are nearest to samples: has the model learned them by heart?"""

import torch
from PIL import Image
from torch import Tensor

from ..common.images import image_grid
from ..common.tensors import in_float64
from .statistics import check_alike

_ROWS = 4096


def nearest(x: Tensor, pool: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k nearest of `pool` to each row of x: distances and indices, (n, k), nearest first.

    x: (n, d). pool: (m, d). Raises ValueError for other widths, or fewer than k in the pool.
    """
    check_alike(x, pool)
    if not 0 < k <= len(pool):
        raise ValueError(f"{k} nearest of {len(pool)} images can't be had; pass 1 to {len(pool)}")
    best = torch.full((len(x), k), torch.inf, dtype=torch.float64), torch.zeros(len(x), k).long()
    x = in_float64(x).cpu()
    for start in range(0, len(pool), _ROWS):
        distances = torch.cdist(x, in_float64(pool[start : start + _ROWS]).cpu())
        indices = torch.arange(start, start + distances.shape[1]).expand_as(distances)
        both = torch.cat([best[0], distances], 1), torch.cat([best[1], indices], 1)
        values, places = both[0].topk(k, largest=False, sorted=True)
        best = values, both[1].gather(1, places)
    return best


def nearest_page(samples: Tensor, neighbours: Tensor, distances: Tensor) -> Image.Image:
    """A row for each sample: itself, then its nearest training images with their distances above.

    samples: (n, c, h, w) in [-1, 1]. neighbours: (n, k, c, h, w), likewise. distances: (n, k).
    """
    rows = torch.cat([samples[:, None], neighbours], 1)
    labels = [
        text
        for row in distances
        for text in ("sample", *(f"{value:.3g}" for value in row.tolist()))
    ]
    return image_grid(rows.flatten(0, 1), rows.shape[1], labels=labels)
