"""From patches of tokens to one token each, and back."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn

from .transformer import Linear, apply_wd


class TokenMerge(nn.Module):
    """Joins each patch of tokens into one: (..., h, w, c) to (..., h / ph, w / pw, out)."""

    def __init__(self, in_features: int, out_features: int, patch_size: Sequence[int] = (2, 2)):
        super().__init__()
        self.h, self.w = patch_size
        self.proj = apply_wd(Linear(in_features * self.h * self.w, out_features, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge patches of tokens. x: (n, h, w, d)."""
        x = rearrange(x, "... (h nh) (w nw) e -> ... h w (nh nw e)", nh=self.h, nw=self.w)
        return self.proj(x)


class BottleneckTokenMerge(TokenMerge):
    """TokenMerge by way of a few features, as natural images lie near few dimensions (JiT)."""

    def __init__(
        self, in_features: int, out_features: int, patch_size: Sequence[int], bottleneck: int
    ):
        super().__init__(in_features, bottleneck, patch_size)
        self.expand = apply_wd(Linear(bottleneck, out_features, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Merge patches of tokens. x: (n, h, w, d)."""
        return self.expand(super().forward(x))


class TokenSplitWithoutSkip(nn.Module):
    """Splits each token into a patch: (..., h, w, c) to (..., h * ph, w * pw, out)."""

    def __init__(self, in_features: int, out_features: int, patch_size: Sequence[int] = (2, 2)):
        super().__init__()
        self.h, self.w = patch_size
        self.proj = apply_wd(Linear(in_features, out_features * self.h * self.w, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Split tokens into patches. x: (n, h, w, d)."""
        x = self.proj(x)
        return rearrange(x, "... h w (nh nw e) -> ... (h nh) (w nw) e", nh=self.h, nw=self.w)


class TokenSplit(TokenSplitWithoutSkip):
    """Splits each token into a patch and merges it into the skip by a learned lerp.

    x: (..., h, w, c), skip: (..., h * ph, w * pw, out); returns the shape of skip.
    """

    def __init__(self, in_features: int, out_features: int, patch_size: Sequence[int] = (2, 2)):
        super().__init__(in_features, out_features, patch_size)
        self.fac = nn.Parameter(torch.ones(1) * 0.5)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return torch.lerp(skip, super().forward(x), self.fac.to(x.dtype))
