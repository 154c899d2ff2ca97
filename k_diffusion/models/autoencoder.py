"""A convolutional autoencoder with a KL term, of latent diffusion's architecture and weight names.

Rombach et al. (arXiv:2112.10752), appendix G. Checkpoints of that code base load into it as they
are, small ones of one's own are trained by `train_autoencoder.py`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_multiple, check_shape
from .unet import Conv2d

_EPS = 1e-6


class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions after group norms, with a residual connection.

    x: (n, c_in, h, w). Returns (n, c_out, h, w).
    """

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, _EPS)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, _EPS)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Self-attention of one head over the pixels, with a residual connection. x: (n, c, h, w)."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, _EPS)
        self.q, self.k, self.v, self.proj_out = (Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(f(y), "n c h w -> n 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(out, "n 1 (h w) c -> n c h w", h=x.shape[2]))


class _Middle(nn.Module):
    def __init__(self, c: int, groups: int, attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.attn_1 = AttentionBlock(c, groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class _Level(nn.Module):
    """Blocks of one resolution, with attention after each or none, then a resampling or none."""

    def __init__(
        self, c_in: int, c: int, depth: int, groups: int, attention: bool, **resample: nn.Module
    ):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c if i else c_in, c, groups) for i in range(depth))
        self.attn = nn.ModuleList(AttentionBlock(c, groups) for _ in range(depth * attention))
        self.resample = list(resample)
        for name, module in resample.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        for name in self.resample:
            x = self.get_submodule(name)(x)
        return x


class _Layout(NamedTuple):
    """What encoder and decoder have in common, as `KLAutoencoder` is given it."""

    channels: Sequence[int]
    depth: int
    groups: int
    middle: bool
    attentions: Sequence[bool]


class _Encoder(nn.Module):
    def __init__(self, c_in: int, c_out: int, layout: _Layout):
        super().__init__()
        channels, depth, groups, middle, attentions = layout
        last = channels[-1]
        self.conv_in = Conv2d(c_in, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            _Level(
                channels[max(0, i - 1)],
                c,
                depth,
                groups,
                attentions[i],
                **({"downsample": _Downsample(c)} if i < len(channels) - 1 else {}),
            )
            for i, c in enumerate(channels)
        )
        self.mid = _Middle(last, groups, middle)
        self.norm_out = nn.GroupNorm(groups, last, _EPS)
        self.conv_out = Conv2d(last, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class _Decoder(nn.Module):
    def __init__(self, c_in: int, c_out: int, layout: _Layout):
        super().__init__()
        channels, depth, groups, middle, attentions = layout
        last = len(channels) - 1
        self.conv_in = Conv2d(c_in, channels[-1], 3, padding=1)
        self.mid = _Middle(channels[-1], groups, middle)
        self.up = nn.ModuleList(  # by the number of the resolution, the finest first
            _Level(
                channels[min(last, i + 1)],
                c,
                depth + 1,
                groups,
                attentions[i],
                **({"upsample": _Upsample(c)} if i else {}),
            )
            for i, c in enumerate(channels)
        )
        self.norm_out = nn.GroupNorm(groups, channels[0], _EPS)
        self.conv_out = Conv2d(channels[0], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class KLAutoencoder(nn.Module):
    """Images to the mean and log-variance of their latents, and latents to images.

    image_channels: of the images (n, image_channels, h, w). latent_channels: of the latents,
    (n, latent_channels, h / factor, w / factor), factor 2 ** (levels - 1). channels: features per
    level, from the pixels down. depth: blocks per level of the encoder; the decoder has one more.
    middle: attention at the coarsest level. attentions: per level, attention after each block.
    quant: 1 x 1 convolutions before and after the latents, as most published ones have.
    z_channels: between these and the rest; latent_channels if None. Raises ValueError if
    `num_groups` doesn't divide the channels.
    """

    def __init__(
        self,
        image_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        depth: int = 2,
        *,
        num_groups: int = 32,
        middle: bool = True,
        attentions: Sequence[bool] | None = None,
        quant: bool = True,
        z_channels: int | None = None,
    ):
        super().__init__()
        if bad := [c for c in channels if c % num_groups]:
            raise ValueError(f"num_groups must divide the channels: {bad[0]} / {num_groups}")
        z = z_channels or latent_channels
        attentions = attentions or [False] * len(channels)
        layout = _Layout(channels, depth, num_groups, middle, attentions)
        self.image_channels, self.latent_channels = image_channels, latent_channels
        self.factor = 2 ** (len(channels) - 1)
        self.encoder = _Encoder(image_channels, 2 * z, layout)
        self.decoder = _Decoder(z, image_channels, layout)
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if quant:
            self.quant_conv = Conv2d(2 * z, 2 * latent_channels, 1)
            self.post_quant_conv = Conv2d(latent_channels, z, 1)

    def param_groups(self, base_lr: float = 5e-4) -> list[dict[str, Any]]:
        """The groups of an optimizer: all parameters learn at base_lr."""
        return [{"params": list(self.parameters()), "lr": base_lr}]

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the log-variance of the latents of images.

        images: (n, image_channels, h, w), h and w multiples of the factor. Returns two of
        (n, latent_channels, h / factor, w / factor), the second within [-30, 20].
        """
        check_shape("images", images, ("n", self.image_channels, "h", "w"))
        h, w = images.shape[2:]
        check_multiple(h, w, (self.factor,) * 2, "of the autoencoder's levels")
        mean, log_variance = self.quant_conv(self.encoder(images)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents.

        latents: (n, latent_channels, h, w). Returns (n, image_channels, h factor, w factor).
        """
        check_shape("latents", latents, ("n", self.latent_channels, "h", "w"))
        return self.decoder(self.post_quant_conv(latents))

    def moments(self, images: Tensor) -> Tensor:
        """The mean and the standard deviation of the latents, along the channels.

        images: (n, image_channels, h, w). Returns (n, 2 latent_channels, h', w').
        """
        mean, log_variance = self.encode(images)
        return torch.cat([mean, (0.5 * log_variance).exp()], 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A reconstruction from sampled latents, with their mean and log-variance.

        images: (n, image_channels, h, w).
        """
        mean, log_variance = self.encode(images)
        latents = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(latents), mean, log_variance


# ----------------------------------------------------------------- weights of that code base


def compvis_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's part of a checkpoint of latent diffusion's code base, by our names.

    weights: tensors of any shapes (...); those of the loss and of whole diffusion models are left
    out.
    """
    prefix = (
        "first_stage_model." if any(k.startswith("first_stage_model.") for k in weights) else ""
    )
    names = re.compile(re.escape(prefix) + r"((encoder|decoder|quant_conv|post_quant_conv)\..+)")
    found = {m[1]: x for name, x in weights.items() if (m := names.fullmatch(name))}
    # some files store the 1 x 1 convolutions of attention as matrices
    attention = re.compile(r".*\.attn(_1|\.\d+)\.(q|k|v|proj_out)\.weight")
    return {
        name: x[..., None, None] if attention.fullmatch(name) and x.ndim == 2 else x
        for name, x in found.items()
    }


def compvis_autoencoder(weights: Mapping[str, Tensor], source: object) -> KLAutoencoder:
    """An autoencoder of the architecture that weights of latent diffusion's code base have.

    weights: as of `compvis_weights`, each of any shape (...). Returns it with initial weights.
    Raises ValueError where these are no weights of such an autoencoder.
    """

    def count(pattern: str) -> int:
        return len({m[1] for name in weights if (m := re.match(pattern, name))})

    levels = count(r"encoder\.down\.(\d+)\.")
    needed = ["encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight"]
    if not levels or (missing := [name for name in needed if name not in weights]):
        what = "no encoder.down levels" if not levels else f"no {missing[0]}"
        raise ValueError(
            f"{source} is no autoencoder of latent diffusion's kind: it has {what}; name a folder "
            "of diffusers, a checkpoint of train_autoencoder.py or one of that code base"
        )
    quant = "quant_conv.weight" in weights
    z = weights["decoder.conv_in.weight"].shape[1]
    return KLAutoencoder(
        weights["encoder.conv_in.weight"].shape[1],
        weights["post_quant_conv.weight"].shape[1] if "post_quant_conv.weight" in weights else z,
        [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)],
        count(r"encoder\.down\.0\.block\.(\d+)\."),
        middle="encoder.mid.attn_1.q.weight" in weights,
        attentions=[f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)],
        quant=quant,
        z_channels=z,
    )
