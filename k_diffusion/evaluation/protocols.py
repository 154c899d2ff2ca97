"""Protocols: what stands between images and a number, such as an FID, that others can compare.

Tools that share a metric's name differ in the network, the rounding and the resizing of images, and
the formula, by more than papers differ from each other. A protocol names them all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.files import PathLike
from ..common.text import need, unknown_name
from ..encoders import Encoder, as_rgb, check_range, make_encoder

Size = tuple[int, int]

# At a time, through an encoder on a CPU: 5 images of 224 x 224. Features of 64 at once take three
# times as long, since what one layer frees is too large for the process to keep for the next.
CPU_PIXELS = 2**18


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How images become features, and features a number, in a published tool.

    name: what stands in `FID[name]`. tool: what it reproduces. encoder, options: of `make_encoder`.
    quantization, resizer, normalization: rows of the tables below; normalization is that of the
    features, an encoder does the one of its pixels itself. n: the usual number of samples.

    formula: `published` is that of this package's `fid` and `kid` as training logs them; `frechet`
    the Fréchet distance of means and covariances (divisor n - 1) in float64, and KID as the mean of
    100 subsets of 1,000; `cmmd` the biased squared MMD with a Gaussian kernel of width 10, times
    1,000.
    """

    name: str
    tool: str
    encoder: str
    quantization: str
    resizer: str
    formula: Literal["published", "frechet", "cmmd"]
    n: int
    normalization: str = "none"
    options: Mapping[str, Any] = field(default_factory=dict)

    def make_encoder(
        self, weights: PathLike | None = None, device: torch.device | str = "cpu"
    ) -> Encoder:
        """The protocol's encoder, with its weights. Raises as `encoders.make_encoder` does."""
        return make_encoder(self.encoder, weights, device, **self.options)

    def pixels(self, images: Tensor, size: Size | None) -> Tensor:
        """Images as the encoder gets them: RGB in [0, 255] in float32, (n, 3, *size).

        images: (n, c, h, w) in [-1, 1], c of 3 or 1. size: the encoder's; images of that size are
        resized, too, where the tool does so. Raises ValueError for other shapes and values.
        """
        check_range(images)
        levels = QUANTIZATIONS[self.quantization](as_rgb(images).float())
        return levels if size is None else RESIZERS[self.resizer](levels, size)

    @torch.no_grad()
    def features(self, encoder: Encoder, images: Tensor) -> Tensor:
        """The features (n, width) of images (n, c, h, w) in [-1, 1], in float32.

        encoder: the protocol's own, from `make_encoder`. Raises ValueError for another, for images
        of other shapes or values, and where features aren't finite.
        """
        if encoder.name != self.encoder:
            raise ValueError(
                f"the protocol {self.name} has the features of {self.encoder}, got those of "
                f"{encoder.name} ({encoder.width} wide); make the encoder by its make_encoder()"
            )
        pixels = self.pixels(images, encoder.size).to(encoder.mean)
        on_cpu, (height, width) = pixels.device.type == "cpu", pixels.shape[-2:]
        rows = CPU_PIXELS // (height * width) if on_cpu else len(pixels)
        with torch.autocast(pixels.device.type, enabled=False):
            parts = [encoder.embed(part).float() for part in pixels.split(max(1, rows))]
        features = torch.cat(parts)
        if features.shape != (len(images), encoder.width):
            raise ValueError(
                f"the encoder {encoder.name} gave features of shape {tuple(features.shape)}, but "
                f"{len(images)} images have ({len(images)}, {encoder.width})"
            )
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"the encoder {encoder.name} gave features that aren't finite; check its weights"
            )
        return NORMALIZATIONS[self.normalization](features)

    def describe(self) -> str:
        """The whole protocol in a line."""
        made = "".join(f" {value}" for value in self.options.values())
        rounding = f"pixels {'uint8 ' if self.quantization != 'float' else ''}{self.quantization}"
        unit = "" if self.normalization == "none" else f", features {self.normalization}"
        return (
            f"{self.name}: {self.encoder}{made}, {rounding}, resized by {self.resizer}{unit}, "
            f"{self.formula} formula, n = {self.n:,}, as {self.tool}"
        )


# ------------------------------------------------------------------ from [-1, 1] to [0, 255]

# rounded: as image files of this package are. truncated: as EDM's are, of 127.5 x + 128; the two
# differ at halves. Others truncate 127.5 x + 127.5, which darkens images by half a level.
QUANTIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x * 127.5 + 127.5,
    "rounded": lambda x: ((x.clamp(-1, 1) + 1) * 127.5).round(),
    "truncated": lambda x: (x * 127.5 + 128).clamp(0, 255).floor(),
}

# -------------------------------------------------------------------------------- resizing


def _bicubic(pixels: Tensor, size: Size) -> Tensor:
    return F.interpolate(pixels, size, mode="bicubic", antialias=True)


def _clean(pixels: Tensor, size: Size) -> Tensor:
    """clean-fid's own: PIL's bicubic filter in float32, clipped and not rounded."""
    resize: Any = need("cleanfid.resize", "the protocol clean-fid", '"k-diffusion[eval]"')
    resizer = resize.make_resizer("PIL", False, "bicubic", (size[1], size[0]))
    arrays = pixels.byte().movedim(1, -1).cpu().numpy()
    return torch.from_numpy(np.stack([resizer(array) for array in arrays])).movedim(-1, 1)


def _cropped(pixels: Tensor, size: Size) -> Tensor:
    """CMMD's: the square in the middle, resized by PIL's bicubic filter to uint8 again."""
    h, w = pixels.shape[2:]
    side = min(h, w)
    top, left = (h - side) // 2, (w - side) // 2
    box = (left, top, left + side, top + side)
    made = []
    for array in pixels.byte().movedim(1, -1).cpu().numpy():
        image = Image.fromarray(array).crop(box)
        made.append(np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(made)).movedim(-1, 1).float()


# Of pixels (n, 3, h, w) in [0, 255] to a size (h, w).
RESIZERS: dict[str, Callable[[Tensor, Size], Tensor]] = {
    "the network": lambda pixels, size: pixels,
    "torch bicubic antialias": _bicubic,
    "torch bicubic antialias, clamped": lambda pixels, size: _bicubic(pixels, size).clamp(0, 255),
    "clean-fid's PIL bicubic": _clean,
    "centre crop and PIL bicubic": _cropped,
}

# Of features (n, width).
NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda features: features,
    "unit": lambda features: F.normalize(features, dim=-1),
    "unit times sqrt(width)": lambda x: F.normalize(x, dim=-1) * x.shape[-1] ** 0.5,
}

# ----------------------------------------------------------------------------------- the table

_PUBLISHED: dict[str, Any] = {"quantization": "float", "formula": "published", "n": 2000}
_SCALED: dict[str, Any] = {
    **_PUBLISHED,
    "resizer": "torch bicubic antialias",
    "normalization": "unit times sqrt(width)",
}
_OURS: dict[str, Any] = {
    "tool": "k-diffusion (here alone)",
    "quantization": "rounded",
    "formula": "frechet",
    "n": 1000,
}

PROTOCOLS: dict[str, Protocol] = {
    row.name: row
    for row in (
        Protocol(
            name="k-diffusion",
            tool="k-diffusion's metric of training",
            encoder="inception",
            resizer="torch bicubic antialias, clamped",
            **_PUBLISHED,
        ),
        Protocol(
            name="k-diffusion-clip",
            tool="k-diffusion's --evaluate-with clip",
            encoder="clip",
            options={"model": "ViT-B/16"},
            **_SCALED,
        ),
        Protocol(
            name="k-diffusion-dinov2",
            tool="k-diffusion's --evaluate-with dinov2",
            encoder="dinov2",
            **_SCALED,
        ),
        Protocol(
            name="clean-fid",
            tool="clean-fid",
            encoder="inception",
            quantization="rounded",
            resizer="clean-fid's PIL bicubic",
            formula="frechet",
            n=50_000,
        ),
        Protocol(
            name="edm",
            tool="EDM's FID",
            encoder="inception",
            quantization="truncated",
            resizer="the network",
            formula="frechet",
            n=50_000,
        ),
        Protocol(
            name="edm2-dinov2",
            tool="EDM2's FD_DINOv2",
            encoder="dinov2",
            quantization="truncated",
            resizer="torch bicubic antialias",
            formula="frechet",
            n=50_000,
        ),
        Protocol(
            name="cmmd",
            tool="Google's CMMD",
            encoder="clip",
            options={"model": "ViT-L/14@336px"},
            quantization="rounded",
            resizer="centre crop and PIL bicubic",
            normalization="unit",
            formula="cmmd",
            n=30_000,
        ),
        Protocol(
            name="lite0",
            encoder="efficientnet-lite0",
            resizer="torch bicubic antialias",
            **_OURS,
        ),
        Protocol(name="random", encoder="random", resizer="the network", **_OURS),
    )
}

# Names of encoders, the published ones first, for which a protocol stands.
_BY_ENCODER = {
    "inception": "k-diffusion",
    "clip": "k-diffusion-clip",
    "dinov2": "k-diffusion-dinov2",
    "efficientnet-lite0": "lite0",
}


def get_protocol(name: str) -> Protocol:
    """A row of PROTOCOLS by its name, or by its encoder's, as `--evaluate-with` takes them.

    Raises ValueError for an unknown name.
    """
    known = {**PROTOCOLS, **{alias: PROTOCOLS[row] for alias, row in _BY_ENCODER.items()}}
    if name not in known:
        raise unknown_name("protocol", name, known)
    return known[name]


# ------------------------------------------------------------------------------------ the line


def metric_line(
    metric: str,
    protocol: str | None,
    value: float,
    error: float | None = None,
    *,
    n: int,
    n_reference: int | None = None,
    seeds: range | None = None,
    sampler: str | None = None,
    evaluations: int | None = None,
    cfg_scale: float | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A number with what it depends on:

    `FID[edm] 3.21 ± 0.04 (n = 50,000, reference 50,000, seeds 0-49,999, dpmpp_2m 32 NFE, cfg 1.5)`

    protocol: None for a metric that has none. error: its standard error, of which one digit is
    shown. evaluations: of the model, for one image. What is None is left out; notes come last.
    """
    name = metric if protocol is None else f"{metric}[{protocol}]"
    digits = _decimals(error, 1) if error else _decimals(value, 3)
    number = f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
    parts = [f"n = {n:,}"]
    if n_reference is not None:
        parts.append(f"reference {n_reference:,}")
    if seeds is not None and len(seeds):
        first, last = f"{seeds[0]:,}", f"{seeds[-1]:,}"
        parts.append(f"seed {first}" if len(seeds) == 1 else f"seeds {first}-{last}")
    if sampler is not None:
        parts.append(sampler if evaluations is None else f"{sampler} {evaluations:,} NFE")
    if cfg_scale is not None:
        parts.append(f"cfg {cfg_scale:g}")
    return f"{name} {number} ({', '.join([*parts, *notes])})"


def _decimals(x: float, significant: int) -> int:
    """The decimals that show so many significant digits of x, none of a number that has more."""
    if x == 0 or not math.isfinite(x):
        return 2
    return max(0, significant - 1 - math.floor(math.log10(abs(x))))
