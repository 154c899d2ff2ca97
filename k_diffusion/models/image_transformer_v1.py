"""`image_transformer_v1`: a diffusion transformer of one level, on patches of pixels."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import nn

from .attention import GlobalAttentionSpec
from .autograd import needs_plain_ops
from .checks import check_floats, check_multiple, check_shape, check_type
from .conditioning import ConditionedModel, with_image
from .flags import checkpoint
from .levels import Level, transformer_level
from .perturbation import Perturbation, run_blocks
from .rope import apply_rotary_emb, make_axial_pos
from .transformer import (
    AdaRMSNorm,
    FeedForwardBlock,
    Linear,
    MappingNetwork,
    RMSNorm,
    apply_wd,
    grid_attention,
    scale_for_cosine_sim,
    split_heads,
    zero_init,
)

D_HEAD = 64
MAPPING_DEPTH = 2
MAX_LOG_SCALE = math.log(100.0)


class QKNorm(nn.Module):
    """Normalises queries and keys so that attention's scores are `exp(scale)` times their cosine.

    q, k: (..., n_heads, d_head), returned in the same shape. The scale, one a head, starts at
    log(10) and is clamped to log(100) by every forward pass. eps is added to the mean of squares.
    """

    def __init__(self, n_heads: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.full((n_heads,), math.log(10.0)))

    @torch.no_grad()
    def proj_(self) -> None:
        """Clamp the scale in place."""
        self.scale.clamp_(max=MAX_LOG_SCALE)

    def forward(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not needs_plain_ops() and not self.scale.is_inference():
            self.proj_()
            scale: torch.Tensor = self.scale
        else:
            # where a parameter can't be changed: the clamped value, with the gradient of the scale
            clamped = self.scale.clamp(max=MAX_LOG_SCALE)
            scale = self.scale + (clamped - self.scale).detach()
        return scale_for_cosine_sim(q, k, scale.exp(), self.eps * q.shape[-1])


class LearnedAxialRoPE(nn.Module):
    """Angles of axial RoPE with learned frequencies for each head and axis.

    dim: features of a head, all of them rotated. The logarithms of the axes' frequencies are the
    parameters `freqs_h` and `freqs_w`, (n_heads, dim // 4); all start evenly spaced from log(pi) to
    log(5 pi).
    """

    def __init__(self, dim: int, n_heads: int):
        super().__init__()
        log_freqs = torch.linspace(math.log(math.pi), math.log(5 * math.pi), dim // 4)
        log_freqs = log_freqs.expand(n_heads, -1)
        self.freqs_h = nn.Parameter(log_freqs.clone())
        self.freqs_w = nn.Parameter(log_freqs.clone())

    def forward(self, pos: torch.Tensor) -> torch.Tensor:
        """pos: (..., 2), y first. Returns angles (..., n_heads, dim // 2) in radians."""
        h_pos, w_pos = pos[..., None, None, :].unbind(-1)
        return torch.cat([h_pos * self.freqs_h.exp(), w_pos * self.freqs_w.exp()], dim=-1)


class SelfAttentionBlock(nn.Module):
    """Residual global self-attention. x: (n, h, w, d_model), cond: (n, d_model).

    identity: the attention map is the identity, for perturbed-attention guidance.
    """

    def __init__(self, d_model: int, dropout: float = 0.0, attn_backend: str | None = None):
        super().__init__()
        self.geometry = GlobalAttentionSpec(D_HEAD, attn_backend)
        self.n_heads = self.geometry.heads(d_model)
        self.norm = AdaRMSNorm(d_model, d_model)
        self.qkv_proj = apply_wd(Linear(d_model, d_model * 3, bias=False))
        self.qk_norm = QKNorm(self.n_heads)
        self.pos_emb = LearnedAxialRoPE(D_HEAD, self.n_heads)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = apply_wd(zero_init(Linear(d_model, d_model, bias=False)))

    def forward(
        self, x: torch.Tensor, pos: torch.Tensor, cond: torch.Tensor, identity: bool = False
    ) -> torch.Tensor:
        """x: (n, h, w, d). pos: (h, w, 2). cond: (n, d_cond)."""
        q, k, v = split_heads(self.qkv_proj(self.norm(x, cond)), self.n_heads)
        if identity:
            return x + self.out_proj(self.dropout(v.flatten(-2)))
        q, k = self.qk_norm(q, k)
        # This model rotates neighbouring features (2i, 2i + 1). The scores are the same whatever
        # the order of the features, so it is enough to move each pair to (i, i + d_head / 2).
        q, k = (rearrange(t, "... (e pair) -> ... (pair e)", pair=2) for t in (q, k))
        theta = self.pos_emb(pos)
        q, k = (apply_rotary_emb(t, theta) for t in (q, k))
        y = grid_attention(self.geometry, q, k, v)
        return x + self.out_proj(self.dropout(y))


class TransformerBlock(nn.Module):
    """Self-attention, then feed-forward."""

    compile_unit = True

    def __init__(
        self, d_model: int, d_ff: int, dropout: float = 0.0, attn_backend: str | None = None
    ):
        super().__init__()
        self.self_attn = SelfAttentionBlock(d_model, dropout, attn_backend)
        self.ff = FeedForwardBlock(d_model, d_ff, d_model, dropout)

    def forward(
        self, x: torch.Tensor, pos: torch.Tensor, cond: torch.Tensor, identity: bool = False
    ) -> torch.Tensor:
        """x: (n, h, w, d). pos: (h, w, 2). cond: (n, d_cond)."""
        x = checkpoint(self.self_attn, x, pos, cond, identity)
        return checkpoint(self.ff, x, cond)


class ImageTransformerDenoiserModelV1(ConditionedModel):
    """A transformer denoiser, the model `"image_transformer_v1"` of the configs.

    To be wrapped in `K.Denoiser`. Patches of pixels become tokens; each of the layers is global
    cosine-similarity attention with learned axial RoPE, then a GEGLU block, both with adaptive RMS
    norms that a mapping network drives from the noise level, augmentation and class.

    n_layers: how many of them. d_model: their width, a multiple of 64 (the size of a head). d_ff:
    hidden width of the feed-forward and mapping blocks. in_features, out_features: channels of the
    image and of the output. patch_size: height and width of a patch. num_classes: if not 0, the
    model takes `class_cond`, and this is the number of rows of its table, of which the last usually
    means no class (a config adds that row). dropout: a probability.
    sigma_data: kept as an attribute alone; scaling the input is the part of `K.Denoiser`.
    attn_backend: forces a backend of the attention; None takes the best that can run.
    learned_weighting: add what `K.Denoiser` needs to learn the weighting of its loss.
    unet_cond_dim: channels of an image that is concatenated to the input; 0 for none.
    Raises ValueError if d_model isn't a multiple of 64.
    """

    outer_layers = (*ConditionedModel.outer_layers, "in_proj", "out_proj")

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
        attn_backend: str | None = None,
        learned_weighting: bool = False,
        unet_cond_dim: int = 0,
    ):
        super().__init__()
        self.in_features, self.unet_cond_dim = in_features, unet_cond_dim
        self.d_model = d_model
        self.patch_h, self.patch_w = patch_size
        self.sigma_data = sigma_data
        patch_area = self.patch_h * self.patch_w

        self.add_conditioning(
            lambda: MappingNetwork(MAPPING_DEPTH, d_model, d_ff, dropout), d_model, num_classes
        )
        features = (in_features + unet_cond_dim) * patch_area
        self.in_proj = Linear(features, d_model, bias=False)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, d_ff, dropout, attn_backend) for _ in range(n_layers)
        )
        self.out_norm = RMSNorm(d_model)
        self.out_proj = zero_init(Linear(d_model, out_features * patch_area, bias=False))
        self.add_uncertainty(learned_weighting)

    def proj_(self) -> None:
        """Clamp the scales of queries and keys, which every forward pass does too."""
        for module in self.blocks.modules():
            if isinstance(module, QKNorm):
                module.proj_()

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        aug_cond: torch.Tensor | None = None,
        class_cond: torch.Tensor | None = None,
        perturbation: Perturbation | None = None,
        return_uncertainty: bool = False,
        unet_cond: torch.Tensor | None = None,
    ) -> Any:
        """The network's output for a preconditioned input at noise levels `sigma`.

        x: (n, in_features, h, w), h and w multiples of the patch size. sigma: (n,). aug_cond:
        (n, 9), zeros if None. class_cond: (n,) integers below num_classes. perturbation: blocks
        to weaken. unet_cond: (n, unet_cond_dim, h, w). Returns (n, out_features, h, w), and with
        return_uncertainty u, (n,), too. Raises ValueError for other shapes and for a condition
        that is missing or not known to the model.
        """
        check_shape("x", x, ("n", self.in_features, "h", "w"))
        _, _, h, w = x.shape
        check_multiple(h, w, (self.patch_h, self.patch_w), "the patch size")
        check_shape("sigma", sigma, (len(x),))
        check_floats(x=x, sigma=sigma)
        check_type("x", x, self.in_proj)
        cond = self.condition(sigma, aug_cond, class_cond)

        patches = {"p": self.patch_h, "q": self.patch_w}
        x = with_image(x, unet_cond, self.unet_cond_dim)
        x = self.in_proj(rearrange(x, "n c (h p) (w q) -> n h w (c p q)", **patches))
        pixel = self.patch_h / self.patch_w
        pos = make_axial_pos(x.shape[1], x.shape[2], pixel, device=x.device)
        pos = pos.view(*x.shape[1:3], 2)
        x = run_blocks(self.blocks, x, pos, cond, perturbation, "blocks")
        x = self.out_proj(self.out_norm(x))
        x = rearrange(x, "n h w (c p q) -> n c (h p) (w q)", **patches)
        return self.with_uncertainty(x, sigma) if return_uncertainty else x

    def describe_levels(self, h: int, w: int) -> list[Level]:
        """The one level of an image of h x w pixels."""
        h, w, depth = h // self.patch_h, w // self.patch_w, f"{len(self.blocks)}"
        return [transformer_level(h, w, self.d_model, depth, self.blocks)]
