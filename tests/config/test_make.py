import pytest
import runs
import torch
from torch import nn

import k_diffusion as K


class Network(nn.Module):
    def forward(self, x, sigma, return_variance=False):
        return torch.tanh(x)


@pytest.mark.parametrize("scales", [1, 3])
def test_the_loss_has_the_configs_scales(scales):
    config = runs.tiny_config(model={"loss_scales": scales, "loss_weighting": "soft-min-snr"})
    got = K.config.make_denoiser_wrapper(config)(Network())
    want = K.Denoiser(Network(), 0.75, "soft-min-snr", scales)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 2, 1, 8, 8, generator=generator)
    sigma = torch.tensor([0.1, 2.0])
    assert torch.equal(got.loss(x, noise, sigma), want.loss(x, noise, sigma))
    plain = K.Denoiser(Network(), 0.75, "soft-min-snr").loss(x, noise, sigma)
    assert torch.equal(got.loss(x, noise, sigma), plain) == (scales == 1)
