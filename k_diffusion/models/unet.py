"""The blocks of the U-Net: norms, attention, resampling.

A *conditioned* module is called as `module(input, cond)`, where `cond` is a dict of tensors from
which each layer takes the entries it knows by key: `"cond"` (n, features) modulates the norms,
`"cross"` (n, tokens, features) and `"cross_padding"` (n, tokens) feed cross-attention.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from ..common.text import unknown_name
from . import flops
from .transformer import Linear, zero_init

Cond = Mapping[str, torch.Tensor | None]


class Conv2d(nn.Conv2d):
    """`nn.Conv2d` that `flop_counter` sees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (n, c, h, w)."""
        y = super().forward(x)
        weight = self.weight.flatten(1).shape
        flops.op(flops.op_linear, (len(y), *y.shape[2:], weight[1]), weight)
        return y


class ResidualBlock(nn.Module):
    """`main(input) + skip(input)`, where `main` is a sequence of modules.

    skip: maps the input where `main` changes its shape; the identity if None.
    """

    def __init__(self, *main: nn.Module, skip: nn.Module | None = None):
        super().__init__()
        self.main = nn.Sequential(*main)
        self.skip = skip if skip is not None else nn.Identity()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: (n, c, h, w)."""
        return self.main(input) + self.skip(input)


class ConditionedModule(nn.Module):
    """A module that is called as `module(input, cond)`; see the top of this file for `cond`."""


class UnconditionedModule(ConditionedModule):
    """Makes a conditioned module of a plain one, which doesn't see `cond`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, input: torch.Tensor, cond: Cond | None = None) -> torch.Tensor:
        """input: (n, c, h, w). cond is not used."""
        return self.module(input)


class ConditionedSequential(ConditionedModule, nn.Sequential):
    """A sequence whose conditioned members get `cond`, and whose plain ones don't."""

    def __init__(self, *args: nn.Module):
        super().__init__(*args)

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:  # type: ignore[override]
        """input: (n, c, h, w). cond: a dict of conditions."""
        for module in self:
            conditioned = isinstance(module, ConditionedModule)
            input = module(input, cond) if conditioned else module(input)
        return input


class ConditionedResidualBlock(ConditionedModule):
    """`main(input, cond) + skip(input)`, the conditioned form of `ResidualBlock`.

    `skip` is called as `skip(input, cond)` if it is a conditioned module.
    """

    def __init__(self, *main: nn.Module, skip: nn.Module | None = None):
        super().__init__()
        self.main = ConditionedSequential(*main)
        self.skip = skip if skip is not None else nn.Identity()

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:
        """input: (n, c, h, w). cond: a dict of conditions."""
        conditioned = isinstance(self.skip, ConditionedModule)
        skip = self.skip(input, cond) if conditioned else self.skip(input)
        return self.main(input, cond) + skip


class AdaGN(ConditionedModule):
    """Adaptive group normalisation: `group_norm(input) * (1 + scale) + shift`.

    Scale and shift are a linear map of `cond[cond_key]` (Dhariwal and Nichol, arXiv:2105.05233,
    section 3), which starts at 0, so that a new layer is a plain group norm.

    input: (n, c_out, ...). cond[cond_key]: (n, feats_in). Returns the shape of the input.
    Raises ValueError if `num_groups` doesn't divide `c_out`.
    """

    def __init__(
        self, feats_in: int, c_out: int, num_groups: int, eps: float = 1e-5, cond_key: str = "cond"
    ):
        super().__init__()
        if c_out % num_groups:
            raise ValueError(f"num_groups must divide the channels: {c_out} / {num_groups}")
        self.num_groups = num_groups
        self.eps = eps
        self.cond_key = cond_key
        self.mapper = zero_init(Linear(feats_in, c_out * 2))

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:
        modulation = self.mapper(_entry(cond, self.cond_key))
        scale, shift = modulation.unflatten(-1, (2, -1, *[1] * (input.ndim - 2))).unbind(1)
        normed = F.group_norm(input, self.num_groups, eps=self.eps)
        return torch.addcmul(shift, normed, scale + 1)


def _entry(cond: Cond, key: str) -> torch.Tensor:
    value = cond.get(key)
    if value is None:
        raise ValueError(f"this layer needs cond[{key!r}]; it got {sorted(cond) or 'nothing'}")
    return value


def _check_heads(channels: int, n_head: int) -> None:
    if channels % n_head:
        raise ValueError(f"n_head must divide the channels: {channels} / {n_head}")


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    flops.op(flops.op_attention, q.shape, k.shape, v.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


NormFactory = Callable[[int], nn.Module]


class SelfAttention2d(ConditionedModule):
    """Multi-head self-attention over the pixels of a feature map, with a residual connection.

    norm: makes the conditioned norm before attention from the number of channels, e.g.
    `lambda c: AdaGN(feats_in, c, c // 32)`. dropout_rate: of the attention weights, in training
    mode only. The output projection starts at 0, so that a new layer is the identity.

    input: (n, c_in, h, w), returned in the same shape. Raises ValueError if `n_head` doesn't
    divide `c_in`.
    """

    attention = "global"

    def __init__(self, c_in: int, n_head: int, norm: NormFactory, dropout_rate: float = 0.0):
        super().__init__()
        _check_heads(c_in, n_head)
        self.n_head = n_head
        self.norm_in = norm(c_in)
        self.qkv_proj = Conv2d(c_in, c_in * 3, 1)
        self.out_proj = zero_init(Conv2d(c_in, c_in, 1))
        self.dropout_rate = float(dropout_rate)

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:
        h, w = input.shape[-2:]
        qkv = self.qkv_proj(self.norm_in(input, cond))
        q, k, v = rearrange(qkv, "n (t nh e) h w -> t n nh (h w) e", t=3, nh=self.n_head)
        x = _attend(q, k, v, dropout_p=self.dropout_rate if self.training else 0.0)
        return input + self.out_proj(rearrange(x, "n nh (h w) e -> n (nh e) h w", h=h, w=w))


class CrossAttention2d(ConditionedModule):
    """Multi-head attention from the pixels of a feature map to a sequence, with a residual.

    c_dec, c_enc: channels of the feature map, features of the sequence. norm_dec, dropout_rate
    and the initial identity: as in `SelfAttention2d`.

    input: (n, c_dec, h, w), returned in the same shape. cond[cond_key]: (n, tokens, c_enc).
    cond[cond_key_padding]: (n, tokens), bool or number, nonzero where a token is padding, which
    then has no influence; None or absent means no padding. An item whose tokens are all padding
    attends to nothing: its attention output is 0 before the output projection.
    Raises ValueError if `n_head` doesn't divide `c_dec` or the padding has another shape.
    """

    attention = "cross"

    def __init__(
        self,
        c_dec: int,
        c_enc: int,
        n_head: int,
        norm_dec: NormFactory,
        dropout_rate: float = 0.0,
        cond_key: str = "cross",
        cond_key_padding: str = "cross_padding",
    ):
        super().__init__()
        _check_heads(c_dec, n_head)
        self.cond_key = cond_key
        self.cond_key_padding = cond_key_padding
        self.n_head = n_head
        self.norm_enc = nn.LayerNorm(c_enc)
        self.norm_dec = norm_dec(c_dec)
        self.q_proj = Conv2d(c_dec, c_dec, 1)
        self.kv_proj = Linear(c_enc, c_dec * 2)
        self.out_proj = zero_init(Conv2d(c_dec, c_dec, 1))
        self.dropout_rate = float(dropout_rate)

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:
        h, w = input.shape[-2:]
        tokens = _entry(cond, self.cond_key)
        q = self.q_proj(self.norm_dec(input, cond))
        q = rearrange(q, "n (nh e) h w -> n nh (h w) e", nh=self.n_head)
        kv = self.kv_proj(self.norm_enc(tokens))
        k, v = rearrange(kv, "n s (t nh e) -> t n nh s e", t=2, nh=self.n_head)
        mask = self._mask(tokens, cond.get(self.cond_key_padding))
        x = _attend(q, k, v, mask, dropout_p=self.dropout_rate if self.training else 0.0)
        return input + self.out_proj(rearrange(x, "n nh (h w) e -> n (nh e) h w", h=h, w=w))

    @staticmethod
    def _mask(tokens: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor | None:
        """(n, 1, 1, tokens), True where a token is to be attended to."""
        if padding is None:
            return None
        if padding.shape != tokens.shape[:2]:
            raise ValueError(
                f"padding of shape {tuple(tokens.shape[:2])} expected beside tokens of shape "
                f"{tuple(tokens.shape)}, got {tuple(padding.shape)}"
            )
        return (padding == 0)[:, None, None, :]


def _triangle(t: float) -> float:
    return 1 - t


def _catmull_rom(t: float) -> float:
    """Keys' cubic convolution kernel with a = -1/2 (doi:10.1109/TASSP.1981.1163711)."""
    if t < 1:
        return 1.5 * t**3 - 2.5 * t**2 + 1
    return -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2


def _lanczos3(t: float) -> float:
    return 3 * math.sin(math.pi * t) * math.sin(math.pi * t / 3) / (math.pi * t) ** 2


# Each kernel is a function of |t| < radius, t in pixels of the coarser grid.
KERNELS: dict[str, tuple[int, Callable[[float], float]]] = {
    "linear": (1, _triangle),
    "cubic": (2, _catmull_rom),
    "lanczos3": (3, _lanczos3),
}
KERNELS |= {"bilinear": KERNELS["linear"], "bicubic": KERNELS["cubic"]}


def _taps(name: str) -> torch.Tensor:
    """The kernel at the 4 * radius fine pixels around a coarse one, with a sum of 1."""
    if name not in KERNELS:
        raise unknown_name("kernel", name, KERNELS)
    radius, function = KERNELS[name]
    taps = [function(abs(i + 0.5) / 2) for i in range(-2 * radius, 2 * radius)]
    return torch.tensor([tap / math.fsum(taps) for tap in taps])


class _Resample2d(nn.Module):
    kernel: torch.Tensor

    def __init__(self, taps: torch.Tensor, pad: int, pad_mode: str):
        super().__init__()
        self.pad = pad
        self.pad_mode = pad_mode
        self.register_buffer("kernel", torch.outer(taps, taps))

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """x with `pad` pixels more at each border."""
        if self.pad_mode == "reflect" and min(x.shape[-2:]) <= self.pad:
            raise ValueError(
                f"{type(self).__name__} reflects {self.pad} pixels at each border, so height and "
                f"width must be at least {self.pad + 1}; got {tuple(x.shape[-2:])}"
            )
        return F.pad(x, (self.pad,) * 4, self.pad_mode)

    def _weight(self, x: torch.Tensor) -> torch.Tensor:
        """One kernel per channel, (c, 1, taps, taps): much faster than a full convolution."""
        return self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


class Downsample2d(_Resample2d):
    """Halves height and width with an antialiasing kernel, the same for each channel.

    kernel: "linear" or "bilinear" (4 taps per axis), "cubic" or "bicubic" (8), "lanczos3" (12).
    pad_mode: as in `torch.nn.functional.pad`. The sampling points lie between pixels 2i and 2i + 1.

    x: (n, c, h, w). Returns (n, c, h // 2, w // 2). Raises ValueError for an unknown kernel and
    for an image smaller than the reflected border.
    """

    def __init__(self, kernel: str = "linear", pad_mode: str = "reflect"):
        taps = _taps(kernel)
        super().__init__(taps, len(taps) // 2 - 1, pad_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(self._padded(x), self._weight(x), stride=2, groups=x.shape[1])


class Upsample2d(_Resample2d):
    """Doubles height and width; up to the scale and the border, the transpose of `Downsample2d`.

    kernel, pad_mode and errors: as in `Downsample2d`.

    x: (n, c, h, w). Returns (n, c, 2h, 2w).
    """

    def __init__(self, kernel: str = "linear", pad_mode: str = "reflect"):
        taps = _taps(kernel) * 2  # half of them meet each output pixel
        super().__init__(taps, len(taps) // 4, pad_mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # What lies outside of the image and its border is cut off again.
        cut = self.kernel.shape[0] - 1
        return F.conv_transpose2d(
            self._padded(x), self._weight(x), stride=2, padding=cut, groups=x.shape[1]
        )


class UNet(ConditionedModule):
    """Blocks on the way down, and blocks on the way up that also see the features of their level.

    d_blocks: modules from the finest level to the coarsest, called as `block(x, cond)`. u_blocks:
    from the coarsest to the finest, called as `block(x, cond, skip)`; skip is the output of the
    level's d_block, and None for the first, whose input that is. skip_stages: how many of the
    finest levels to leave out, so that growing models can train on small images first; settable.

    input: (n, c, h, w). Raises ValueError if the numbers of blocks differ or `skip_stages` leaves
    no level.
    """

    def __init__(
        self, d_blocks: Iterable[nn.Module], u_blocks: Iterable[nn.Module], skip_stages: int = 0
    ):
        super().__init__()
        self.d_blocks = nn.ModuleList(d_blocks)
        self.u_blocks = nn.ModuleList(u_blocks)
        if len(self.d_blocks) != len(self.u_blocks):
            raise ValueError(
                f"as many blocks up as down expected, got {len(self.d_blocks)} down and "
                f"{len(self.u_blocks)} up"
            )
        self.skip_stages = skip_stages

    @property
    def skip_stages(self) -> int:
        return self._skip_stages

    @skip_stages.setter
    def skip_stages(self, skip_stages: int) -> None:
        if not 0 <= skip_stages < len(self.d_blocks):
            raise ValueError(
                f"skip_stages must be at least 0 and less than the number of levels, "
                f"{len(self.d_blocks)}; got {skip_stages}"
            )
        self._skip_stages = skip_stages

    def forward(self, input: torch.Tensor, cond: Cond) -> torch.Tensor:
        x, levels = input, []
        for block in self.d_blocks[self.skip_stages :]:
            x = block(x, cond)
            levels.append(x)
        for i, (block, level) in enumerate(zip(self.u_blocks, reversed(levels))):
            x = block(x, cond, level if i else None)
        return x
