"""Bits per dimension of a data set's images, shared out over processes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.seeds import derive_seed
from ..distributed import gather_shares, share
from ..likelihood import bits_per_dim
from .reals import RealImages


def real_likelihood(
    accelerator: Any,
    denoiser: nn.Module,
    config: Mapping[str, Any],
    reals: RealImages,
    n: int,
    *,
    seed: int = 0,
    batch_size: int = 64,
    bins: int = 256,
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """Bits per dimension of n real images, (n,), evenly spaced, on the main process; else None.

    Images are cut into batches, and each has its own random numbers, so that the result doesn't
    depend on the number of processes. Of a class-conditional model it is that given the class.
    """
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    indices = reals.spaced(n)
    count = math.ceil(n / batch_size)
    rows = []
    mine = share(accelerator, count)
    hidden = None if accelerator.is_main_process else True
    for b in tqdm(mine, desc="likelihood", unit="batch", leave=None, disable=hidden):
        part = indices[b * batch_size : (b + 1) * batch_size]
        ((images, classes),) = reals.batches(part, len(part), device)
        torch.manual_seed(derive_seed(seed, b))
        bits, _ = bits_per_dim(
            denoiser,
            images.clamp(-1, 1),
            model["sigma_min"],
            model["sigma_max"],
            {"class_cond": classes.to(images.device)} if num_classes else {},
            atol=1e-3,
            rtol=1e-3,
            bins=bins,
            sigma_data=model["sigma_data"],
        )
        bits = bits.to(accelerator.device)
        rows.append(torch.nn.functional.pad(bits.float(), (0, batch_size - len(part))))
    empty = torch.zeros(0, batch_size, device=accelerator.device)
    everyone = gather_shares(accelerator, torch.cat([empty, *(row[None] for row in rows)]), count)
    return None if everyone is None else everyone.flatten()[:n].cpu()
