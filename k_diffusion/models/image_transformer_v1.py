"""`image_transformer_v1`: a diffusion transformer of one level, on patches of pixels."""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import nn

from .. import layers
from .attention import GlobalAttentionSpec, attend
from .flags import checkpoint
from .rope import apply_rotary_emb, make_axial_pos
from .transformer import (
    AdaRMSNorm,
    FeedForwardBlock,
    Linear,
    MappingNetwork,
    RMSNorm,
    apply_wd,
    log_sigma,
    scale_for_cosine_sim,
    tag_module,
    tagged_param_groups,
    zero_init,
)

D_HEAD = 64
MAPPING_DEPTH = 2


class QKNorm(nn.Module):
    """Normalises queries and keys so that attention's scores are `exp(scale)` times their cosine.

    q, k: (..., n_heads, d_head), returned in the same shape. The scale, one a head, starts at
    log(10).
    """

    def __init__(self, n_heads: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.full((n_heads,), math.log(10.0)))

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return scale_for_cosine_sim(q, k, self.scale.exp(), self.eps)


class LearnedAxialRoPE(nn.Module):
    """Angles of axial RoPE with learned frequencies for each head and axis.

    dim: features of a head, all of them rotated. The frequencies of both axes start spaced evenly
    in the logarithm from pi to 10 pi (exclusive), dealt out to the heads in turn; their logarithms
    are the parameters `freqs_h` and `freqs_w`, (n_heads, dim // 4).
    """

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        n = n_heads * dim // 4
        log_freqs = torch.linspace(math.log(math.pi), math.log(10 * math.pi), n + 1)[:-1]
        log_freqs = log_freqs.view(dim // 4, n_heads).T.contiguous()
        self.freqs_h = nn.Parameter(log_freqs.clone())
        self.freqs_w = nn.Parameter(log_freqs.clone())

    def forward(self, pos: torch.Tensor) -> torch.Tensor:
        """pos: (..., 2), y first. Returns angles (..., n_heads, dim // 2) in radians."""
        h_pos, w_pos = pos[..., None, None, :].unbind(-1)
        return torch.cat([h_pos * self.freqs_h.exp(), w_pos * self.freqs_w.exp()], dim=-1)


class SelfAttentionBlock(nn.Module):
    """Residual global self-attention. x: (n, h, w, d_model), cond: (n, d_model)."""

    def __init__(self, d_model: int, dropout: float = 0.0):
        super().__init__()
        self.geometry = GlobalAttentionSpec(D_HEAD)
        self.n_heads = d_model // D_HEAD
        self.norm = AdaRMSNorm(d_model, d_model)
        self.qkv_proj = apply_wd(Linear(d_model, d_model * 3, bias=False))
        self.qk_norm = QKNorm(self.n_heads)
        self.pos_emb = LearnedAxialRoPE(D_HEAD, self.n_heads)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = apply_wd(zero_init(Linear(d_model, d_model, bias=False)))

    def forward(self, x: torch.Tensor, pos: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv_proj(self.norm(x, cond))
        q, k, v = rearrange(qkv, "n h w (t nh e) -> t n h w nh e", t=3, nh=self.n_heads).unbind()
        q, k = self.qk_norm(q, k)
        theta = self.pos_emb(pos)
        q, k = apply_rotary_emb(q, theta), apply_rotary_emb(k, theta)
        self.geometry.record_flops(q.shape)
        y = attend(self.geometry, q, k, v).flatten(-2)
        return x + self.out_proj(self.dropout(y))


class TransformerBlock(nn.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, d_model: int, d_ff: int, dropout: float = 0.0):
        super().__init__()
        self.self_attn = SelfAttentionBlock(d_model, dropout)
        self.ff = FeedForwardBlock(d_model, d_ff, d_model, dropout)

    def forward(self, x: torch.Tensor, pos: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.self_attn, x, pos, cond)
        return checkpoint(self.ff, x, cond)


class ImageTransformerDenoiserModelV1(nn.Module):
    """A transformer denoiser, the model `"image_transformer_v1"` of the configs.

    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        d_ff: int,
        in_features: int,
        out_features: int,
        patch_size: Sequence[int],
        num_classes: int = 0,
        dropout: float = 0.0,
        sigma_data: float = 1.0,
    ):
        super().__init__()
        self.in_features = in_features
        self.patch_size = tuple(patch_size)
        self.num_classes = num_classes
        self.sigma_data = sigma_data
        patch_area = math.prod(patch_size)
        self.time_emb = layers.FourierFeatures(1, d_model)
        self.time_in_proj = Linear(d_model, d_model, bias=False)
        self.aug_emb = layers.FourierFeatures(9, d_model)
        self.aug_in_proj = Linear(d_model, d_model, bias=False)
        self.class_emb = nn.Embedding(num_classes + 1, d_model) if num_classes else None
        self.mapping = tag_module(MappingNetwork(MAPPING_DEPTH, d_model, d_ff, dropout), "mapping")
        self.in_proj = Linear(in_features * patch_area, d_model, bias=False)
        self.blocks = nn.ModuleList(TransformerBlock(d_model, d_ff, dropout) for _ in range(n_layers))
        self.out_norm = RMSNorm(d_model)
        self.out_proj = zero_init(Linear(d_model, out_features * patch_area, bias=False))

    def param_groups(self, base_lr: float = 5e-4, mapping_lr_scale: float = 1 / 3) -> list[dict[str, object]]:
        return tagged_param_groups(self, base_lr, mapping_lr_scale)

    def forward(self, x, sigma, aug_cond=None, class_cond=None):
        ph, pw = self.patch_size
        x = rearrange(x, VAR["order_in"], p=ph, q=pw)
        pos = make_axial_pos(x.shape[1], x.shape[2], device=x.device).view(*x.shape[1:3], 2)
        if aug_cond is None: aug_cond = sigma.new_zeros(len(sigma), 9)
        c_noise = VAR["noise"](sigma, self.sigma_data)
        cond = self.time_in_proj(self.time_emb(c_noise[:, None]))
        cond = cond + self.aug_in_proj(self.aug_emb(aug_cond))
        cond = cond + self.class_emb(class_cond)
        cond = self.mapping(cond)
        x = self.in_proj(x)
        x = VAR["xin"](x, sigma, self.sigma_data)
        for b in self.blocks: x = b(x, pos, cond)
        return rearrange(self.out_proj(self.out_norm(x)), VAR["order_out"], p=ph, q=pw)
VAR = dict(order_in="n c (h p) (w q) -> n h w (p q c)", order_out="n h w (p q c) -> n c (h p) (w q)", noise=lambda s, d: s.log()/4, xin=lambda x,s,d:x)
