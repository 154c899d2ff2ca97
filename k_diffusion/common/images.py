"""Images: between PIL and tensors in [-1, 1], from files, and as grids."""

import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image

from .files import PathLike

# The largest value of the PIL modes that become tensors as they are; others turn into RGB.
_PIL_MAX = {"L": 255, "LA": 255, "RGB": 255, "RGBA": 255, "I;16": 65535}
PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_MIN_SIDE = 48
_MAX_CLASS_COLUMNS = 20


def from_pil_image(x: Image.Image) -> torch.Tensor:
    """A PIL image as a float32 tensor (c, h, w) in [-1, 1]; greyscale has c = 1."""
    if x.mode == "1":
        x = x.convert("L")
    elif x.mode not in _PIL_MAX:
        x = x.convert("RGB")
    array = np.asarray(x).astype(np.float32)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return torch.from_numpy(array / _PIL_MAX[x.mode] * 2 - 1)


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
    levels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    array = levels.movedim(0, -1).cpu().numpy()
    return Image.fromarray(array[..., 0] if image.shape[0] == 1 else array)


class CorruptImageError(OSError):
    """An image file that can't be decoded; `filename` is its path."""

    def __str__(self) -> str:
        return str(self.args[0])  # an OSError with a filename would tell of errno instead


def open_image(path: PathLike, mode: str | None = "RGB") -> Image.Image:
    """A decoded image, in PIL mode `mode` (None: as stored). Raises `CorruptImageError`."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.copy() if mode is None else image.convert(mode)
    except Exception as err:  # PIL's decoders raise many kinds
        error = CorruptImageError(f"can't read the image {path}: {err}")
        error.filename = os.fspath(path)
        raise error from err


def image_grid(images: torch.Tensor, columns: int | None = None, border: int = 2) -> Image.Image:
    """Images, (n, c, h, w) in [-1, 1], as one picture; small ones are enlarged pixel by pixel.

    images: (n, c, h, w). columns: by default those of a square. border: of black, around each
    image, in pixels.
    """
    n, c, h, w = images.shape
    scale = max(1, math.ceil(_MIN_SIDE / max(h, w)))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = images.new_full((rows * columns, c, h * scale + border, w * scale + border), -1.0)
    enlarged = repeat(images, "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    cells[:n, :, border:, border:] = enlarged
    grid = rearrange(cells, "(r k) c h w -> c (r h) (k w)", r=rows)
    return to_pil_image(F.pad(grid, (0, border, 0, border), value=-1.0))


def grid_columns(num_classes: int, n: int) -> int | None:
    """The columns of a grid whose image i has class i mod num_classes: one per class, if few."""
    return num_classes if 2 <= num_classes <= min(n, _MAX_CLASS_COLUMNS) else None
