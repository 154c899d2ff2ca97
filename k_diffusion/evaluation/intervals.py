"""What a metric says: its value and how far other samples of the same model may move it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_NORMAL = 1.959964  # the 97.5% quantile


class Estimate(NamedTuple):
    """A metric's value, its standard error, and the ends of its 95% interval."""

    value: float
    error: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.error:.2g}"


def with_error(value: float, error: float, quantile: float = _NORMAL) -> Estimate:
    """An estimate whose error is normal, or of the law whose 97.5% quantile is given."""
    return Estimate(value, error, value - quantile * error, value + quantile * error)


def bootstrap(
    statistic: Callable[..., float | Tensor],
    sizes: Sequence[int],
    resamples: int = 100,
    seed: int = 0,
) -> Estimate:
    """A statistic of sets of samples with its bootstrap interval (Efron 1979).

    statistic: of index tensors (n,), one per set, of the samples to use. sizes: n of each set.
    resamples: how often all sets are drawn anew, with replacement; 0 gives an error and an interval
    of NaN.

    A resample repeats samples. That alone moves distances between sets up, by about their bias at
    this n, so that the percentiles are taken around the resamples' mean.
    """
    value = float(statistic(*(torch.arange(n) for n in sizes)))
    if not resamples:
        return Estimate(value, *[float("nan")] * 3)
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            float(statistic(*(torch.randint(n, (n,), generator=generator) for n in sizes)))
            for _ in range(resamples)
        ],
        dtype=torch.float64,
    )
    spread = values - values.mean()
    low, high = (float(value + spread.quantile(q)) for q in (0.025, 0.975))
    return Estimate(value, float(spread.square().sum() / max(resamples - 1, 1)) ** 0.5, low, high)
