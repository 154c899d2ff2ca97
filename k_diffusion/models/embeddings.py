"""Embeddings of numbers."""

import math

import torch
from torch import nn


class FourierFeatures(nn.Module):
    """Random Fourier features: `[cos(2 pi f), sin(2 pi f)]` of `f = input @ weight.T`.

    input: (..., in_features). Returns (..., out_features) in the dtype of the weight. The
    frequencies are a buffer, drawn from N(0, std^2) at construction.
    """

    weight: torch.Tensor

    def __init__(self, in_features: int, out_features: int, std: float = 1.0):
        super().__init__()
        if out_features % 2:
            raise ValueError(f"out_features must be even, got {out_features}")
        self.register_buffer("weight", torch.randn(out_features // 2, in_features) * std)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        # A sum of products: autocast would round the angles of a matmul to 8 bits.
        f = 2 * math.pi * (input.unsqueeze(-2) * self.weight).sum(-1)
        return torch.cat([f.cos(), f.sin()], dim=-1).to(self.weight.dtype)


class Uncertainty(nn.Module):
    """u of a noise level, the logarithm of the loss expected there (EDM2, arXiv:2312.02696).

    A linear map of Fourier features of ln(sigma) / 4, 0 at the start. sigma: (n,). Returns (n,), in
    the dtype of the weight. It serves training alone.
    """

    def __init__(self, features: int = 128):
        super().__init__()
        self.features = FourierFeatures(1, features)
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, sigma: torch.Tensor) -> torch.Tensor:
        # A sum of products, as above: u is an exponent.
        return (self.features(sigma.log()[:, None] / 4) * self.weight).sum(-1)
