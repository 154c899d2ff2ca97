"""Demo grids: a fixed set of seeds sampled by the averaged model as it learns."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..common.images import grid_columns, image_grid
from ..conditions import Given
from ..generation import sample_share


def sample_demo(
    accelerator: Any,
    denoiser: nn.Module,
    config: dict[str, Any],
    n: int,
    generator: torch.Generator,
    stop: Callable[[], bool] = lambda: False,
    given: Given | None = None,
) -> Image.Image | None:
    """Sample the demo grid; returns it on the main process.

    generator: its state, which is left as it is, gives the seeds: every grid of a run starts from
    the same noise. stop, given: as of `sample_share`.
    """
    copy = torch.Generator().set_state(generator.get_state())
    seeds = torch.randint(0, 2**63 - 1, (n,), generator=copy).tolist()
    images = sample_share(accelerator, denoiser, config, seeds, stop=stop, given=given)
    if images is None:
        return None
    prompts = (config.get("text") or {}).get("prompts", ())
    kinds = config["dataset"]["num_classes"] or len(prompts)
    columns = grid_columns(kinds, n, *images.shape[2:])
    return image_grid(images, columns)
