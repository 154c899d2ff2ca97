"""The hourglass diffusion transformer (HDiT, arXiv 2401.11605)."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from .attention import (
    GlobalAttentionSpec,
    NeighborhoodAttentionSpec,
    NoAttentionSpec,
    ShiftedWindowAttentionSpec,
)
from .autograd import normalize_and_rotate
from .checks import check_floats, check_multiple, check_shape, check_type
from .conditioning import ConditionedModel, with_image
from .cross_attention import (
    D_HEAD,
    Cross,
    CrossAttentionBlock,
    CrossCondition,
    check_cross,
    check_levels,
)
from .flags import checkpoint, get_rope_parity
from .levels import Level as LevelDescription, transformer_level
from .patches import BottleneckTokenMerge, TokenMerge, TokenSplit, TokenSplitWithoutSkip
from .perturbation import Perturbation, run_blocks
from .rope import AxialRoPE, apply_rotary_emb, apply_rotary_emb_, cos_sin, make_axial_pos
from .transformer import (
    AdaRMSNorm,
    FeedForwardBlock,
    Linear,
    LinearGEGLU,
    MappingFeedForwardBlock,
    MappingNetwork,
    RMSNorm,
    apply_wd,
    filter_params,
    grid_attention,
    split_heads,
    tag_module,
    tag_param,
    zero_init,
)

__all__ = [
    "AdaRMSNorm",
    "FeedForwardBlock",
    "GlobalAttentionSpec",
    "ImageTransformerDenoiserModelV2",
    "LevelSpec",
    "Linear",
    "LinearGEGLU",
    "MappingFeedForwardBlock",
    "MappingNetwork",
    "MappingSpec",
    "NeighborhoodAttentionSpec",
    "NoAttentionSpec",
    "RMSNorm",
    "ShiftedWindowAttentionSpec",
    "TokenMerge",
    "TokenSplit",
    "TokenSplitWithoutSkip",
    "apply_rotary_emb",
    "apply_rotary_emb_",
    "apply_wd",
    "filter_params",
    "tag_module",
    "tag_param",
    "zero_init",
]


def __getattr__(name: str) -> Any:
    if name == "layers":  # programs take layers from here, as from the published module
        return importlib.import_module("k_diffusion.layers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AttentionSpec = (
    GlobalAttentionSpec | NeighborhoodAttentionSpec | ShiftedWindowAttentionSpec | NoAttentionSpec
)


@dataclass
class LevelSpec:
    """One level of the hourglass, from the pixels up; the last one is the middle.

    cross_attn: whether its blocks have cross-attention, too, of heads as self_attn's.
    """

    depth: int
    width: int
    d_ff: int
    self_attn: AttentionSpec
    dropout: float
    cross_attn: bool = False


@dataclass
class MappingSpec:
    """The mapping network."""

    depth: int
    width: int
    d_ff: int
    dropout: float


# ---------------------------------------------------------------- blocks


class SelfAttentionBlock(nn.Module):
    """Residual cosine-similarity self-attention with axial RoPE, of any geometry.

    x: (n, h, w, d_model), pos: (h, w, 2), cond: (n, cond_features). identity: the attention map is
    the identity, for perturbed-attention guidance.
    """

    def __init__(
        self,
        d_model: int,
        geometry: GlobalAttentionSpec | NeighborhoodAttentionSpec | ShiftedWindowAttentionSpec,
        cond_features: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.geometry = geometry
        self.n_heads = geometry.heads(d_model)
        self.norm = AdaRMSNorm(d_model, cond_features)
        self.qkv_proj = apply_wd(Linear(d_model, d_model * 3, bias=False))
        self.scale = nn.Parameter(torch.full([self.n_heads], 10.0))
        self.pos_emb = AxialRoPE(geometry.d_head // 2, self.n_heads)
        self.dropout = nn.Dropout(dropout)
        self.out_proj = apply_wd(zero_init(Linear(d_model, d_model, bias=False)))

    def extra_repr(self) -> str:
        return f"{self.geometry}"

    def forward(
        self, x: torch.Tensor, pos: torch.Tensor, cond: torch.Tensor, identity: bool = False
    ) -> torch.Tensor:
        skip = x
        q, k, v = split_heads(self.qkv_proj(self.norm(x, cond)), self.n_heads)
        if identity:
            return self.out_proj(self.dropout(v.flatten(-2))) + skip
        if get_rope_parity() and isinstance(self.geometry, GlobalAttentionSpec):
            pos = pos.to(q.dtype)
        theta = self.pos_emb(pos)
        cos, sin = cos_sin(theta, q.dtype)
        q, k = (normalize_and_rotate(t, self.scale, cos, sin, 1e-6) for t in (q, k))
        x = grid_attention(self.geometry, q, k, v)
        return self.out_proj(self.dropout(x)) + skip


class TransformerBlock(nn.Module):
    """Self-attention and cross-attention, where the level has them, then feed-forward."""

    compile_unit = True

    def __init__(self, spec: LevelSpec, cond_features: int, index: int, cross_features: int = 0):
        super().__init__()
        geometry = spec.self_attn
        if isinstance(geometry, ShiftedWindowAttentionSpec):
            # every other block moves the windows by half, so that their borders differ
            geometry = replace(geometry, shift=index % 2 * (geometry.window_size // 2))
        self.self_attn = (
            None
            if isinstance(geometry, NoAttentionSpec)
            else SelfAttentionBlock(spec.width, geometry, cond_features, spec.dropout)
        )
        self.cross_attn = (
            CrossAttentionBlock(
                spec.width,
                getattr(geometry, "d_head", D_HEAD),
                cond_features,
                cross_features,
                spec.dropout,
            )
            if spec.cross_attn
            else None
        )
        self.ff = FeedForwardBlock(spec.width, spec.d_ff, cond_features, spec.dropout)

    def forward(
        self,
        x: torch.Tensor,
        pos: torch.Tensor,
        cond: torch.Tensor,
        identity: bool = False,
        cross: Cross | None = None,
    ) -> torch.Tensor:
        """x: (n, h, w, width). pos: (h, w, 2). cond: (n, cond_features)."""
        if self.self_attn is not None:
            x = checkpoint(self.self_attn, x, pos, cond, identity)
        if self.cross_attn is not None and cross is not None:
            x = checkpoint(self.cross_attn, x, pos, cond, *cross)
        return checkpoint(self.ff, x, cond)


class Level(nn.ModuleList):
    """The blocks of one level, one after the other.

    start: the index of the first of them. A level's blocks on the way up go on counting those on
    the way down, so that shifted windows alternate through all of them.
    """

    def __init__(
        self, spec: LevelSpec, cond_features: int, start: int = 0, cross_features: int = 0
    ):
        indices = range(start, start + spec.depth)
        super().__init__(TransformerBlock(spec, cond_features, i, cross_features) for i in indices)

    def forward(
        self,
        x: torch.Tensor,
        cond: torch.Tensor,
        perturbation: Perturbation | None = None,
        name: str = "",
        cross: Cross | None = None,
    ) -> torch.Tensor:
        """x: (n, h, w, width). cond: (n, cond_features). name: the level's, for perturbations."""
        pos = make_axial_pos(x.shape[1], x.shape[2], device=x.device).view(*x.shape[1:3], 2)
        return run_blocks(self, x, pos, cond, perturbation, name, cross=cross)


# ---------------------------------------------------------------- the model


class ImageTransformerDenoiserModelV2(ConditionedModel):
    """Hourglass diffusion transformer (HDiT, arXiv 2401.11605).

    levels: from the pixels up; the last is the middle, the others run on the way up and down.
    mapping: the mapping network. patch_size: pixels per token of the first level, (h, w).
    num_classes: rows of the table of class embeddings, of which the last usually means "no class"
    (a config adds that row); 0 for a model without classes.
    mapping_cond_dim: width of a free-form condition; 0 for none. patch_bottleneck: features between
    a patch and its token (JiT, arXiv 2511.13720); 0 for none. learned_weighting: add what
    `K.Denoiser` needs to learn the weighting of its loss. cross_cond_dim: features of a token that
    the levels' cross-attention sees; 0 for none. unet_cond_dim: channels of an image that is
    concatenated to the input; 0 for none.

    Sizes of an image must be multiples of patch_size * 2 ** (len(levels) - 1).
    """

    outer_layers = (*ConditionedModel.outer_layers, "patch_in", "patch_out")

    def __init__(
        self,
        levels: Sequence[LevelSpec],
        mapping: MappingSpec,
        in_channels: int,
        out_channels: int,
        patch_size: Sequence[int],
        num_classes: int = 0,
        mapping_cond_dim: int = 0,
        patch_bottleneck: int = 0,
        learned_weighting: bool = False,
        cross_cond_dim: int = 0,
        unet_cond_dim: int = 0,
    ):
        super().__init__()
        check_levels([level.cross_attn for level in levels], cross_cond_dim)
        self.in_channels = in_channels
        self.unet_cond_dim, self.cross_cond_dim = unet_cond_dim, cross_cond_dim
        self.widths = [level.width for level in levels]
        self.size_multiple = tuple(p * 2 ** (len(levels) - 1) for p in patch_size)
        width, cond_features = levels[0].width, mapping.width

        channels = in_channels + unet_cond_dim
        self.patch_in = (
            BottleneckTokenMerge(channels, width, patch_size, patch_bottleneck)
            if patch_bottleneck
            else TokenMerge(channels, width, patch_size)
        )
        self.add_conditioning(
            lambda: MappingNetwork(mapping.depth, cond_features, mapping.d_ff, mapping.dropout),
            cond_features,
            num_classes,
            mapping_cond_dim,
        )
        *outer, middle = levels
        # Weights are drawn level by level; saved optimizer states go by the order of registration.
        self.down_levels, self.up_levels = nn.ModuleList(), nn.ModuleList()
        for spec in outer:
            self.down_levels.append(Level(spec, cond_features, 0, cross_cond_dim))
            self.up_levels.append(Level(spec, cond_features, spec.depth, cross_cond_dim))
        self.mid_level = Level(middle, cond_features, 0, cross_cond_dim)
        pairs = list(pairwise(levels))
        self.merges = nn.ModuleList(TokenMerge(low.width, up.width) for low, up in pairs)
        self.splits = nn.ModuleList(TokenSplit(up.width, low.width) for low, up in pairs)

        self.out_norm = RMSNorm(width)
        self.patch_out = TokenSplitWithoutSkip(width, out_channels, patch_size)
        zero_init(self.patch_out.proj)
        self.cross_cond = CrossCondition(cross_cond_dim) if cross_cond_dim else None
        self.add_uncertainty(learned_weighting)

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        aug_cond: torch.Tensor | None = None,
        class_cond: torch.Tensor | None = None,
        mapping_cond: torch.Tensor | None = None,
        perturbation: Perturbation | None = None,
        return_uncertainty: bool = False,
        unet_cond: torch.Tensor | None = None,
        cross_cond: torch.Tensor | None = None,
        cross_cond_padding: torch.Tensor | None = None,
    ) -> Any:
        """The network's output for a preconditioned input at noise levels `sigma`.

        x: (n, in_channels, h, w). sigma: (n,). aug_cond: (n, 9), zeros if None. class_cond: (n,)
        integers below num_classes. mapping_cond: (n, mapping_cond_dim). perturbation: blocks to
        weaken. unet_cond: (n, unet_cond_dim, h, w). cross_cond: (n, tokens, cross_cond_dim).
        cross_cond_padding: (n, tokens), nonzero where a token is padding; an item that has only
        padding sees the learned null token, as all do without cross_cond.

        Returns (n, out_channels, h, w), and with return_uncertainty u, (n,), too. Raises
        ValueError for other shapes, and for conditions missing or not known to the model.
        """
        check_shape("x", x, ("n", self.in_channels, "h", "w"))
        reason = "patch size x 2 for each level above the first"
        check_multiple(x.shape[2], x.shape[3], self.size_multiple, reason)
        check_shape("sigma", sigma, (len(x),))
        check_floats(x=x, sigma=sigma)
        check_type("x", x, self.patch_in.proj)
        self._check_attention(x.shape[2], x.shape[3])
        cond = self.condition(sigma, aug_cond, class_cond, mapping_cond)
        check_cross(cross_cond, cross_cond_padding, len(x), self.cross_cond_dim)
        cross = self.cross_cond and self.cross_cond(cross_cond, cross_cond_padding, len(x))
        x = self.patch_in(with_image(x, unet_cond, self.unet_cond_dim).movedim(1, -1))
        skips = []
        for i, (level, merge) in enumerate(zip(self.down_levels, self.merges)):
            x = level(x, cond, perturbation, f"down_levels.{i}", cross)
            skips.append(x)
            x = merge(x)
        x = self.mid_level(x, cond, perturbation, "mid_level", cross)
        ups = enumerate(zip(self.up_levels, self.splits, skips))
        for i, (level, split, skip) in reversed(list(ups)):
            x = level(split(x, skip), cond, perturbation, f"up_levels.{i}", cross)
        x = self.patch_out(self.out_norm(x)).movedim(-1, 1)
        return self.with_uncertainty(x, sigma) if return_uncertainty else x

    def describe_levels(self, h: int, w: int) -> list[LevelDescription]:
        """The levels of an image of h x w pixels, from the finest to the middle."""
        h, w = h // self.patch_in.h, w // self.patch_in.w
        described = []
        for i, blocks in enumerate([*self.down_levels, self.mid_level]):
            n = len(blocks)
            depth = f"{n}" if blocks is self.mid_level else f"{n} + {n}"
            size = h // 2**i, w // 2**i
            described.append(transformer_level(*size, self.widths[i], depth, blocks))
        return described

    def _check_attention(self, h: int, w: int) -> None:
        size = [side // patch for side, patch in zip((h, w), (self.patch_in.h, self.patch_in.w))]
        for i, level in enumerate([*self.down_levels, self.mid_level]):
            # a level's blocks are of one geometry
            attn = level[0].self_attn if len(level) else None
            try:
                if attn is not None:
                    attn.geometry.check(*size)
            except ValueError as error:
                raise ValueError(f"level {i} of an image of {h} x {w}: {error}") from None
            size = [side // 2 for side in size]
