"""Images: between PIL and tensors in [-1, 1], from files, and as grids."""

import io
import math
import os
import warnings
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageFont, ImageOps

from .files import PathLike, printable

# The largest value of the PIL modes that become tensors as they are; others turn into RGB.
_PIL_MAX = {"L": 255, "LA": 255, "RGB": 255, "RGBA": 255, "I;16": 65535, "F": 1}
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_MIN_SIDE = 48
# Of grids: the level of gaps and labels' background, and how much longer than wide classes in
# columns may make them.
_LIGHT = 0.8
_LONGEST = 2.0


def from_pil_image(x: Image.Image) -> torch.Tensor:
    """A PIL image as a float32 tensor (c, h, w) in [-1, 1]; greyscale has c = 1.

    Raises CorruptImageError for pixels whose range nobody knows; see `convert_mode`.
    """
    if x.mode in {"F", "I", "LAB"}:
        eight_bits = _eight_bits(x)
        x = x if x.mode == "F" else eight_bits
    if x.mode == "1":
        x = x.convert("L")
    elif x.mode not in _PIL_MAX:
        x = x.convert("RGB")
    array = np.asarray(x).astype(np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    array /= _PIL_MAX[x.mode] / 2  # in place: fresh memory costs more than the arithmetic
    array -= 1
    return torch.from_numpy(array)


def to_pil_image(x: torch.Tensor) -> Image.Image:
    """A tensor in [-1, 1], (c, h, w) or (1, c, h, w), as an 8-bit PIL image.

    x: (c, h, w) or (1, c, h, w). Values are clamped, then rounded to the nearest level. c is 1
    (greyscale), 3 (RGB) or, with alpha, 2 or 4. Raises ValueError for other shapes.
    """
    image = x[0] if x.ndim == 4 and x.shape[0] == 1 else x
    if image.ndim != 3 or image.shape[0] not in PIL_MODES:
        raise ValueError(
            f"to_pil_image needs one image (c, h, w) or (1, c, h, w) with c of "
            f"{', '.join(map(str, PIL_MODES))}; got shape {tuple(x.shape)}"
        )
    array = to_levels(image.detach()).movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if image.shape[0] == 1 else array)


def to_levels(x: torch.Tensor) -> torch.Tensor:
    """Values in [-1, 1], clamped, as the nearest of 256 levels: uint8, (...). x: (...)."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()


class CorruptImageError(OSError):
    """An image file that can't be decoded; `filename` is its path."""

    def __str__(self) -> str:
        return str(self.args[0])  # an OSError with a filename would tell of errno instead


def convert_mode(image: Image.Image, mode: str, background: str = "white") -> Image.Image:
    """An image in a PIL mode; where that has no alpha, transparent pixels show `background`.

    background: a colour that PIL knows, "white" or "#f0f0f0". Pixels beneath full transparency are
    arbitrary, so that dropping alpha would show what nobody has seen. Pixels of 16 bits are scaled
    to 8, and so are floats in [0, 1], which PIL would clip. Raises CorruptImageError for LAB, and
    for integers and floats of another range.
    """
    image = _eight_bits(image)
    if image.has_transparency_data and "A" not in mode:
        below = Image.new("RGBA", image.size, ImageColor.getrgb(background))
        image = Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8 bits for each channel; others are scaled, or a CorruptImageError."""
    if image.mode == "LAB":
        raise CorruptImageError("its pixels are LAB, whose profile is unknown; convert it to RGB")
    if not image.mode.startswith(("I", "F")):
        return image
    pixels = np.asarray(image).astype(np.float64)
    low, high, most = pixels.min(), pixels.max(), 1 if image.mode == "F" else 65535
    if not 0 <= low <= high <= most:
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise CorruptImageError(
            f"its pixels are {kind} from {low:g} to {high:g}, and only those from 0 to {most} can "
            "be scaled; convert it to 8 or 16 bits"
        )
    return Image.fromarray((pixels * (255 / most)).round().astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says, by which cameras tell how they were held.

    One that is upright is returned as it is.
    """
    return image if _orientation(image) == 1 else ImageOps.exif_transpose(image)


def _orientation(image: Image.Image) -> int:
    """By EXIF: 1 is upright, and more than 4 on its side."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def open_image(
    path: PathLike, mode: str | None = "RGB", draft: tuple[int, int] | None = None
) -> Image.Image:
    """A decoded image, upright, in PIL mode `mode` (None: as stored), over white where that has no
    alpha.

    draft: the size (h, w) that a JPEG has to cover, for which it may be decoded smaller. Raises
    `CorruptImageError`, also for one too large to be an image (PIL's MAX_IMAGE_PIXELS).
    """
    name = printable(path)
    try:
        if not os.path.isfile(path):
            there = os.path.exists(path)  # a pipe, which would block
            raise OSError("it is no ordinary file" if there else "there is no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return decoded(image, mode, draft)
    except Exception as err:  # PIL's decoders raise many kinds
        raise unreadable(name, err) from err


def image_size(file: PathLike | IO[bytes]) -> tuple[int, int]:
    """The size (h, w) of an image, upright, from its header alone. Raises OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                w, h = image.size
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                return (w, h) if turned else (h, w)
    except Exception as err:  # PIL's decoders raise many kinds
        raise OSError(str(err)) from err


def decode_image(
    content: bytes, name: str, mode: str | None, draft: tuple[int, int] | None = None
) -> Image.Image:
    """As `open_image`, of a file's content; `name` is what errors call it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                return decoded(image, mode, draft)
    except Exception as err:  # PIL's decoders raise many kinds
        raise unreadable(name, err) from err


def decoded(image: Image.Image, mode: str | None, draft: tuple[int, int] | None) -> Image.Image:
    """As `open_image`, of an image that PIL has opened; raises what PIL does."""
    if draft is not None:
        h, w = draft
        image.draft(None, (h, w) if _orientation(image) > 4 else (w, h))
    image.load()
    made = upright(image)
    if mode is not None:
        made = convert_mode(made, mode)
    return made.copy() if made is image else made  # which knows nothing of the file


def unreadable(name: str, cause: Exception) -> CorruptImageError:
    """The error for an image that can't be decoded. name: of its file, or its place."""
    error = CorruptImageError(f"can't read the image {name}: {cause}")
    # whole, but not to be used: why is news
    whole = isinstance(cause, Image.DecompressionBombError | CorruptImageError)
    error.filename = f"{name} ({cause})" if whole else name
    return error


def image_grid(
    images: torch.Tensor,
    columns: int | None = None,
    border: int = 2,
    labels: Sequence[object] | None = None,
) -> Image.Image:
    """Images as one picture, row by row; small ones are enlarged pixel by pixel.

    images: (n, c, h, w) in [-1, 1]. columns: by default those of the picture that is nearest to a
    square. border: the light gap around each image, in pixels. labels: n of them, written above the
    images.
    """
    n, c, h, w = images.shape
    scale = max(1, math.ceil(_MIN_SIDE / max(h, w)))
    h, w = h * scale, w * scale
    columns = columns or grid_columns(0, n, h, w)
    rows = math.ceil(n / columns)
    font_size = max(12, h // 10)
    above = border + (0 if labels is None else font_size + 4)
    light = images.new_full((c, 1, 1), _LIGHT)
    if "A" in PIL_MODES.get(c, ""):
        light[-1] = 1.0  # opaque
    cells = light.repeat(rows * columns, 1, h + above, w + border)
    enlarged = repeat(images, "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    cells[:n, :, above:, border:] = enlarged
    grid = rearrange(cells, "(r k) c h w -> c (r h) (k w)", r=rows)
    right = light.expand(c, grid.shape[1], border)
    grid = torch.cat([grid, right], 2)
    picture = to_pil_image(torch.cat([grid, light.expand(c, border, grid.shape[2])], 1))
    if labels is not None:
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size)
        for i, label in enumerate(labels):
            y, x = i // columns * (h + above) + above / 2, i % columns * (w + border) + border
            draw.text((x + w / 2, y), str(label), fill="black", font=font, anchor="mm")
    return picture


def grid_columns(num_classes: int, n: int, h: int = 1, w: int = 1) -> int:
    """The columns of a grid of n images of (h, w) whose image i has class i mod num_classes.

    Each column has one class where that leaves the grid nearly a square; else it is as near to a
    square as can be.
    """
    square = math.sqrt(n * h / w)
    columns = max(1, min(n, round(square)))
    if 2 <= num_classes <= n:
        by_class = num_classes * max(1, round(square / num_classes))
        sides = by_class * w, math.ceil(n / by_class) * h
        if max(sides) <= _LONGEST * min(sides):
            return by_class
    return columns
