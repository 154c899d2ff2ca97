import pytest
import torch
from torch import nn

from k_diffusion.guidance import ThresholdedDenoiser


class Same(nn.Module):
    def forward(self, x, sigma):
        return x


@pytest.mark.parametrize(
    ("percentile", "s"), [(0.01, 2), (0.2, 2), (0.21, 3), (0.5, 4), (0.79, 5), (0.8, 5), (0.81, 6)]
)
def test_the_quantile_is_the_least_value_that_the_share_does_not_exceed(percentile, s):
    """At least that share of the five values lies within it."""
    x = torch.tensor([[2.0, -3.0, 4.0, -5.0, 6.0]])
    y = ThresholdedDenoiser(Same(), percentile=percentile)(x, torch.ones(1))
    torch.testing.assert_close(y, x.clamp(-s, s) / s)
    assert (x.abs() <= s).float().mean() >= percentile
