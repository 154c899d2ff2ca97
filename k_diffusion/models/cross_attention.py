"""Cross-attention from the tokens of an image to those of a condition, such as a text's.

The sequence may be padded. Each item whose tokens are all padding sees one learned token instead,
the null embedding, which is what classifier-free guidance takes for the absence of the condition.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from . import flops
from .attention import GlobalAttentionSpec
from .attention.plain import dense
from .autograd import normalize, normalize_and_rotate
from .checks import check_shape
from .rope import AxialRoPE, cos_sin
from .transformer import (
    AdaRMSNorm,
    Linear,
    RMSNorm,
    apply_wd,
    zero_init,
)

D_HEAD = 64  # where a level has no self-attention to be like


class Cross(NamedTuple):
    """What cross-attention attends to: tokens (n, 1 + t, d), of which the first is the null token,
    and which of them are seen, (n, 1 + t)."""

    tokens: torch.Tensor
    seen: torch.Tensor


class CrossCondition(nn.Module):
    """Puts the learned null token before a padded sequence, and normalises its tokens.

    features: of a token.
    """

    def __init__(self, features: int):
        super().__init__()
        self.null = nn.Parameter(torch.randn(features))
        self.norm = RMSNorm(features)

    def forward(self, tokens: torch.Tensor | None, padding: torch.Tensor | None, n: int) -> Cross:
        """tokens: (n, t, features), None for no tokens. padding: (n, t), nonzero where a token is
        padding, None for none."""
        null = self.null.expand(n, 1, -1)
        seen = torch.ones(n, 1, dtype=torch.bool, device=null.device)
        if tokens is not None:
            real = seen.expand(n, tokens.shape[1]) if padding is None else padding == 0
            seen = torch.cat([~real.any(1, keepdim=True), real], dim=1)
            null = torch.cat([null, tokens.to(null.dtype)], dim=1)
        return Cross(self.norm(null), seen)


class CrossAttentionBlock(nn.Module):
    """Residual cosine-similarity attention from a grid of tokens to a sequence of others.

    Queries are rotated by their place in the grid and keys are not, so that which token is attended
    to may depend on the place itself: self-attention knows differences of places alone, and "left"
    means one. The output projection starts at 0, so that a new block is the identity. d_head:
    features of a head. cross_features: of a token of the sequence.
    """

    def __init__(
        self,
        d_model: int,
        d_head: int,
        cond_features: int,
        cross_features: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = GlobalAttentionSpec(d_head)
        self.n_heads = self.heads.heads(d_model)
        self.norm = AdaRMSNorm(d_model, cond_features)
        self.q_proj = apply_wd(Linear(d_model, d_model, bias=False))
        self.kv_proj = apply_wd(Linear(cross_features, d_model * 2, bias=False))
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.pos_emb = AxialRoPE(d_head // 2, self.n_heads)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = apply_wd(zero_init(Linear(d_model, d_model, bias=False)))

    def forward(
        self,
        x: torch.Tensor,
        pos: torch.Tensor,
        cond: torch.Tensor,
        tokens: torch.Tensor,
        seen: torch.Tensor,
    ) -> torch.Tensor:
        """x: (n, h, w, d_model). pos: (h, w, 2). cond: (n, cond_features). tokens:
        (n, s, cross_features). seen: (n, s), whether a token is; at least one of each item is."""
        q = self.q_proj(self.norm(x, cond)).unflatten(-1, (self.n_heads, -1))
        k, v = self.kv_proj(tokens).unflatten(-1, (2, self.n_heads, -1)).unbind(-3)
        cos, sin = cos_sin(self.pos_emb(pos), q.dtype)
        q = normalize_and_rotate(q, self.scale, cos, sin, 1e-6).flatten(1, 2)
        k = normalize(k, self.scale, 1e-6)
        flops.op(flops.op_attention, *(y.transpose(1, 2).shape for y in (q, k, v)))
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
        y = dense(q, k, v, mask[:, None, None, :])
        return x + self.out_proj(self.dropout(y.flatten(-2).unflatten(1, x.shape[1:3])))


def check_cross(
    tokens: torch.Tensor | None, padding: torch.Tensor | None, n: int, features: int
) -> None:
    """Raises ValueError for tokens that a model doesn't take, and for other shapes.

    tokens: (n, t, features). padding: (n, t). features: 0 for a model without cross-attention.
    """
    shape = n, "tokens", features
    check_shape("cross_cond", tokens, shape, wanted=features, optional=True)
    of = (n, 0) if tokens is None else tokens.shape[:2]
    wanted = features and tokens is not None
    check_shape("cross_cond_padding", padding, of, wanted=wanted, optional=True)


def check_levels(levels: Sequence[bool], features: int) -> None:
    """Raises ValueError unless both levels with cross-attention and the width of its tokens are
    given, or neither."""
    if any(levels) and not features:
        raise ValueError("a level asks for cross-attention: set cross_cond_dim, too")
    if features and not any(levels):
        raise ValueError(
            f"cross_cond_dim is {features}, but no level has cross-attention; set it to 0, or "
            "cross_attn of a level"
        )
