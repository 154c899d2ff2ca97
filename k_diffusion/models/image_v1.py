"""`image_v1`: a U-Net denoiser with adaptive group norm, self- and cross-attention."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from typing_extensions import Self

from . import unet
from .attention import GlobalAttentionSpec
from .checks import check_classes, check_floats, check_multiple, check_shape, check_type
from .embeddings import FourierFeatures
from .flags import checkpoint
from .levels import Level
from .transformer import Linear, log_sigma, zero_init

M = TypeVar("M", bound=nn.Module)

CHANNELS_PER_GROUP = 32
CHANNELS_PER_HEAD = 64


class _Level(unet.ConditionedSequential):
    """The layers of one level of the U-Net, each recomputed alone under checkpointing.

    skip: features of the way down, which a level on the way up appends to the channels.
    """

    compile_unit = True

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, cond: unet.Cond, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        if skip is not None:
            input = torch.cat([input, skip], dim=1)
        for module in self:
            args = (input, cond) if isinstance(module, unet.ConditionedModule) else (input,)
            input = checkpoint(module, *args)
        return input


def _orthogonal(layer: M) -> M:
    nn.init.orthogonal_(cast(torch.Tensor, layer.weight))
    return layer


def _norm(feats_in: int, channels: int) -> unet.AdaGN:
    return unet.AdaGN(feats_in, channels, max(1, channels // CHANNELS_PER_GROUP))


def _res_block(
    feats_in: int, c_in: int, c_mid: int, c_out: int, dropout_rate: float
) -> unet.ConditionedResidualBlock:
    """Twice norm, GELU, 3 x 3 convolution, dropout; the second convolution starts at 0."""
    skip = None if c_in == c_out else _orthogonal(unet.Conv2d(c_in, c_out, 1, bias=False))
    main: list[nn.Module] = []
    for a, b in ((c_in, c_mid), (c_mid, c_out)):
        conv = unet.Conv2d(a, b, 3, padding=1)
        main += [_norm(feats_in, a), nn.GELU(), conv, nn.Dropout2d(dropout_rate)]
    zero_init(conv)
    return unet.ConditionedResidualBlock(*main, skip=skip)


def _blocks(
    feats_in: int,
    widths: Sequence[int],
    c_mid: int,
    self_attn: bool,
    cross_attn: bool,
    cross_cond_dim: int,
    dropout_rate: float,
) -> list[nn.Module]:
    """One residual block for each pair of neighbouring `widths`, each followed by attention."""

    def norm(channels: int) -> unet.AdaGN:
        return _norm(feats_in, channels)

    blocks: list[nn.Module] = []
    for c_in, c_out in pairwise(widths):
        heads = max(1, c_out // CHANNELS_PER_HEAD)
        blocks.append(_res_block(feats_in, c_in, c_mid, c_out, dropout_rate))
        if self_attn:
            blocks.append(unet.SelfAttention2d(c_out, heads, norm, dropout_rate))
        if cross_attn:
            blocks.append(unet.CrossAttention2d(c_out, cross_cond_dim, heads, norm, dropout_rate))
    return blocks


class ImageDenoiserModelV1(nn.Module):
    """A U-Net denoiser, the model `"image_v1"` of the configs, to be wrapped in `K.Denoiser`.

    A mapping network takes Fourier features of log(sigma) / 4, plus embeddings of the conditions,
    to `feats_in` features that modulate every norm. Each level is `depth` times a residual block,
    then self-attention, then cross-attention where asked for; levels are resampled by two.

    c_in: channels of the image. feats_in: width of the mapping network (even). depths, channels,
    self_attn_depths, cross_attn_depths: one entry per level, finest first (the latter two bools).
    mapping_cond_dim: features of `mapping_cond`. unet_cond_dim: channels of `unet_cond`.
    cross_cond_dim: features of a token of `cross_cond`. patch_size: side of the squares of pixels
    that become one position of the U-Net. skip_stages: how many of the finest levels to leave out;
    those left are halved one after the other from the first of them on.
    has_variance: also predict the log variance of the error. num_classes: if not 0, the model
    takes `class_cond`, and this is the number of rows of its table, of which the last usually
    means no class (a config adds that row).
    Raises ValueError if these don't fit together.
    """

    takes_aug_cond = False  # but within `KarrasAugmentWrapper`
    # The first and last matrices, which Muon leaves alone; proj_in and proj_out are convolutions.
    outer_layers = "mapping.0", "mapping_cond"

    def __init__(
        self,
        c_in: int,
        feats_in: int,
        depths: Sequence[int],
        channels: Sequence[int],
        self_attn_depths: Sequence[bool],
        cross_attn_depths: Sequence[bool] | None = None,
        mapping_cond_dim: int = 0,
        unet_cond_dim: int = 0,
        cross_cond_dim: int = 0,
        dropout_rate: float = 0.0,
        patch_size: int = 1,
        skip_stages: int = 0,
        has_variance: bool = False,
        num_classes: int = 0,
    ):
        super().__init__()
        n = len(channels)
        cross_attn = [False] * n if cross_attn_depths is None else list(cross_attn_depths)
        lengths = [len(depths), n, len(self_attn_depths), len(cross_attn)]
        if n == 0 or lengths != [n] * 4:
            raise ValueError(
                "depths, channels, self_attn_depths and cross_attn_depths need one entry per level"
                f"; they have {', '.join(map(str, lengths))}"
            )
        if min(depths) < 1:
            raise ValueError(f"every level needs a depth of at least 1, got depths {list(depths)}")
        if any(cross_attn) and not cross_cond_dim:
            raise ValueError("cross_attn_depths asks for cross-attention: set cross_cond_dim too")
        self.c_in = c_in
        self.channels, self.depths = tuple(channels), tuple(depths)
        self.mapping_cond_dim = mapping_cond_dim
        self.unet_cond_dim = unet_cond_dim
        self.cross_cond_dim = cross_cond_dim if any(cross_attn) else 0
        self.has_variance = has_variance
        self.num_classes = num_classes

        self.timestep_embed = FourierFeatures(1, feats_in)
        if mapping_cond_dim:
            self.mapping_cond = Linear(mapping_cond_dim, feats_in, bias=False)
        if num_classes:
            self.class_emb = nn.Embedding(num_classes, feats_in)
        self.mapping = nn.Sequential(
            _orthogonal(Linear(feats_in, feats_in)),
            nn.GELU(),
            _orthogonal(Linear(feats_in, feats_in)),
            nn.GELU(),
        )
        if not 0 <= skip_stages < n:
            raise ValueError(
                f"skip_stages must be at least 0 and less than the number of levels, {n}; "
                f"got {skip_stages}"
            )
        # Registered before the U-Net: saved optimizer states go by the order of the parameters.
        self._make_projections(patch_size, skip_stages)

        def options(i: int) -> tuple[int, bool, bool, int, float]:
            return channels[i], self_attn_depths[i], cross_attn[i], cross_cond_dim, dropout_rate

        # All levels down, then all up: the order in which a seed's weights are drawn.
        outside = [channels[0], *channels]  # the width of what lies below each level
        down, up = [], []
        for i, (depth, c) in enumerate(zip(depths, channels)):
            widths = [outside[i]] + [c] * depth
            down.append(_Level(nn.Identity(), *_blocks(feats_in, widths, *options(i))))
        for i, (depth, c) in enumerate(zip(depths, channels)):
            widths = [c if i == n - 1 else 2 * c] + [c] * (depth - 1) + [outside[i]]
            up.append(_Level(*_blocks(feats_in, widths, *options(i)), nn.Identity()))
        self.u_net = unet.UNet(down, reversed(up), skip_stages=skip_stages)
        self._resample_levels()

    def _make_projections(self, patch_size: int, skip_stages: int) -> None:
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1, got {patch_size}")
        self.patch_size = patch_size
        c_in = (self.c_in + self.unet_cond_dim) * patch_size**2
        c_out = self.c_in * patch_size**2 + self.has_variance
        # A level but the first takes what the one before it would put out.
        width = self.channels[max(0, skip_stages - 1)]
        self.proj_in = unet.Conv2d(c_in, width, 1)
        self.proj_out = zero_init(unet.Conv2d(width, c_out, 1))

    def _resample_levels(self) -> None:
        """Level i is half as large as the one below it if i > skip_stages, otherwise as large."""
        weight = self.proj_in.weight
        levels: Any = zip(self.u_net.d_blocks, reversed(self.u_net.u_blocks))
        for i, (down, up) in enumerate(levels):
            resampled = i > self.u_net.skip_stages
            down[0] = unet.Downsample2d().to(weight) if resampled else nn.Identity()
            up[-1] = unet.Upsample2d().to(weight) if resampled else nn.Identity()

    def set_patch_size(self, patch_size: int) -> Self:
        """Change the patch size; the first and last layer start anew. Returns the model."""
        self._renew_projections(patch_size, self.u_net.skip_stages)
        return self

    def set_skip_stages(self, skip_stages: int) -> Self:
        """Leave out this many of the finest levels; the first and last layer start anew.

        Returns the model.
        """
        self.u_net.skip_stages = skip_stages
        self._renew_projections(self.patch_size, skip_stages)
        self._resample_levels()
        return self

    def _renew_projections(self, patch_size: int, skip_stages: int) -> None:
        old = self.proj_in.weight
        self._make_projections(patch_size, skip_stages)
        for layer in (self.proj_in, self.proj_out):
            layer.to(old)

    def param_groups(self, base_lr: float = 2e-4) -> list[dict[str, Any]]:
        """Optimizer groups: the weights of the mapping network and the U-Net, then the rest.

        The rest, biases and the first and last layer, has no weight decay.
        """
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for name, param in self.named_parameters():
            is_weight = name.startswith(("mapping", "u_net")) and name.endswith(".weight")
            (decay if is_weight else no_decay).append(param)
        return [
            {"params": decay, "lr": base_lr},
            {"params": no_decay, "lr": base_lr, "weight_decay": 0.0},
        ]

    def forward(
        self,
        input: torch.Tensor,
        sigma: torch.Tensor,
        mapping_cond: torch.Tensor | None = None,
        unet_cond: torch.Tensor | None = None,
        cross_cond: torch.Tensor | None = None,
        cross_cond_padding: torch.Tensor | None = None,
        return_variance: bool = False,
        class_cond: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The network's output for a preconditioned input at noise levels `sigma`.

        input: (n, c_in, h, w), h and w multiples of patch_size * 2^(number of downsamplings).
        sigma: (n,). mapping_cond: (n, mapping_cond_dim), None for zeros. unet_cond:
        (n, unet_cond_dim, h, w). cross_cond: (n, tokens, cross_cond_dim), cross_cond_padding:
        (n, tokens), nonzero where a token is padding. class_cond: (n,) integers below
        num_classes. Returns (n, c_in, h, w), and with return_variance the log variance (n,) too.
        Raises ValueError for other shapes, and for conditions missing or not known to the model.
        """
        self._check(input, sigma, mapping_cond, unet_cond, cross_cond, class_cond)
        if return_variance and not self.has_variance:
            raise ValueError("return_variance needs a model built with has_variance=True")

        emb = self.timestep_embed(log_sigma(sigma)[:, None] / 4)
        if mapping_cond is not None:
            emb = emb + self.mapping_cond(mapping_cond.to(emb.dtype))
        if class_cond is not None:
            emb = emb + self.class_emb(class_cond)
        cond = {
            "cond": self.mapping(emb),
            "cross": cross_cond,
            "cross_padding": cross_cond_padding,
        }

        x = input if unet_cond is None else torch.cat([input, unet_cond], dim=1)
        x = self.proj_in(F.pixel_unshuffle(x, self.patch_size))
        x = self.proj_out(self.u_net(x, cond))
        logvar = x[:, -1].flatten(1).mean(1) if self.has_variance else None
        x = F.pixel_shuffle(x[:, :-1] if self.has_variance else x, self.patch_size)
        return (x, logvar) if return_variance and logvar is not None else x

    def describe_levels(self, h: int, w: int) -> list[Level]:
        """The levels of an image of h x w pixels that aren't skipped, from the finest."""
        skipped, described = self.u_net.skip_stages, []
        for i in range(skipped, len(self.channels)):
            scale = self.patch_size * 2 ** (i - skipped)
            width, depth = self.channels[i], f"{self.depths[i]} + {self.depths[i]}"
            block: Any = self.u_net.d_blocks[i]
            found = {m.attention: m.n_head for m in block if hasattr(m, "attention")}
            heads = next(iter(found.values()), 0)
            geometries = (GlobalAttentionSpec(width // heads),) if heads else ()
            name = " and ".join(found) or "none"
            # the U-Net calls torch's attention, whatever else is installed
            backend = "sdpa" if found else "-"
            level = Level(h // scale, w // scale, width, depth, heads, geometries, name, backend)
            described.append(level)
        return described

    def _check(
        self,
        input: torch.Tensor,
        sigma: torch.Tensor,
        mapping_cond: torch.Tensor | None,
        unet_cond: torch.Tensor | None,
        cross_cond: torch.Tensor | None,
        class_cond: torch.Tensor | None,
    ) -> None:
        check_shape("input", input, ("n", self.c_in, "h", "w"))
        n, _, h, w = input.shape
        halvings = len(self.channels) - 1 - self.u_net.skip_stages
        multiple = self.patch_size * 2**halvings
        reason = f"patch size {self.patch_size}, halved {halvings} times"
        check_multiple(h, w, (multiple, multiple), reason)
        check_shape("sigma", sigma, (n,))
        check_floats(input=input, sigma=sigma)
        check_type("input", input, self.proj_in)
        d = self.mapping_cond_dim
        check_shape("mapping_cond", mapping_cond, (n, d), wanted=d, optional=True)
        d = self.unet_cond_dim
        check_shape("unet_cond", unet_cond, (n, d, h, w), wanted=d)
        d = self.cross_cond_dim
        check_shape("cross_cond", cross_cond, (n, "tokens", d), wanted=d)
        check_shape("class_cond", class_cond, (n,), wanted=self.num_classes)
        check_classes(class_cond, self.num_classes)
