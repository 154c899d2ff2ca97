"""Demo grids: a fixed set of seeds sampled by the averaged model as it learns."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from torch import nn

from .. import sampling, utils
from ..generation import generate
from .checkpoint import write_atomically

STEPS = 50
_MIN_SIDE = 48
_MAX_CLASS_COLUMNS = 20


def image_grid(images: torch.Tensor, columns: int | None = None, border: int = 2) -> Image.Image:
    """Images, (n, c, h, w) in [-1, 1], as one picture; small ones are enlarged pixel by pixel.

    columns: by default those of a square. border: of black, around each image, in pixels.
    """
    n, c, h, w = images.shape
    scale = max(1, math.ceil(_MIN_SIDE / max(h, w)))
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = images.new_full((rows * columns, c, h * scale + border, w * scale + border), -1.0)
    enlarged = repeat(images, "n c h w -> n c (h a) (w b)", a=scale, b=scale)
    cells[:n, :, border:, border:] = enlarged
    grid = rearrange(cells, "(r k) c h w -> c (r h) (k w)", r=rows)
    return utils.to_pil_image(F.pad(grid, (0, border, 0, border), value=-1.0))


def grid_columns(num_classes: int, n: int) -> int | None:
    """Of a grid whose image i has class i mod num_classes: a column a class, if they are few."""
    return num_classes if 2 <= num_classes <= min(n, _MAX_CLASS_COLUMNS) else None


def sample_share(
    accelerator: Any,
    denoiser: nn.Module,
    config: dict[str, Any],
    seeds: Sequence[int],
    *,
    batch_size: int = 64,
) -> torch.Tensor | None:
    """One image per seed, shared out over the processes; all of them on the main one, else None."""
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    classes = [i % num_classes for i in range(len(seeds))][share] if num_classes else None
    sigmas = sampling.get_sigmas_karras(STEPS, model["sigma_min"], model["sigma_max"])
    shape = (model["input_channels"], *model["input_size"])
    batches = generate(
        denoiser,
        shape,
        seeds[share],
        sigmas,
        classes=classes,
        num_classes=num_classes,
        batch_size=batch_size,
        device=accelerator.device,
        disable=None if accelerator.is_main_process else True,
    )
    empty = torch.empty(0, *shape, device=accelerator.device)
    with accelerator.autocast():
        images = torch.cat([empty, *batches])
    return gather_shares(accelerator, images, len(seeds))


def gather_shares(accelerator: Any, mine: torch.Tensor, n: int) -> torch.Tensor | None:
    """Put rows i, i + processes, ... of each process i back in order, on the main process."""
    processes = accelerator.num_processes
    if processes == 1:
        return mine
    # every process sends as many rows: the last of a short share is padding
    most = math.ceil(n / processes)
    padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
    everyone = accelerator.gather(padded)
    if not accelerator.is_main_process:
        return None
    return everyone.unflatten(0, (processes, most)).transpose(0, 1).flatten(0, 1)[:n]


def write_demo(
    accelerator: Any,
    denoiser: nn.Module,
    config: dict[str, Any],
    path: Path,
    n: int,
    generator: torch.Generator,
) -> Path | None:
    """Sample the demo grid and write it; returns its path on the main process.

    generator: its state, which is left as it is, gives the seeds: every grid of a run starts from
    the same noise.
    """
    copy = torch.Generator().set_state(generator.get_state())
    seeds = torch.randint(0, 2**63 - 1, (n,), generator=copy).tolist()
    images = sample_share(accelerator, denoiser, config, seeds)
    if images is None:
        return None
    grid = image_grid(images, grid_columns(config["dataset"]["num_classes"], n))
    write_atomically(path, lambda file: grid.save(file, format="png"))
    return path
