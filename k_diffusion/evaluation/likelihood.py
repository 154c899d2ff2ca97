"""Bits per dimension of a data set's images, shared out over processes."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..common.seeds import derive_seed
from ..conditions import Encode, of_batch
from ..distributed import gather_shares, share
from ..encoders.autoencoder import Autoencoder, find_autoencoder
from ..likelihood import bits_per_dim, log_likelihood
from .reals import RealImages

_TOLERANCE = 1e-3


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
    encode: Encode | None = None,
) -> Tensor | None:
    """Bits per dimension of n real images, (n,), evenly spaced, on the main process; else None.

    Images are cut into batches, and each has its own random numbers, so that the result doesn't
    depend on the number of processes. Of a conditional model it is that given the class, the
    caption and the image beside it: reals hold them, and encode is of a model that takes texts. Of
    a latent model it is that of the density of latents, in the units of sigma_data: it is relative
    to the autoencoder, may be negative, and can't be compared with that of images.
    """
    model, num_classes = config["model"], config["dataset"]["num_classes"]
    autoencoder = find_autoencoder(denoiser)
    told = {**config, "dataset": reals.section}  # of images, where latents were trained on
    indices = reals.spaced(n)
    count = math.ceil(n / batch_size)
    rows = []
    mine = share(accelerator, count)
    hidden = None if accelerator.is_main_process else True
    for b in tqdm(mine, desc="likelihood", unit="batch", leave=None, disable=hidden):
        part = indices[b * batch_size : (b + 1) * batch_size]
        (items,) = reals.items(part, len(part))
        images = items["original"] = items["image"].to(device)
        cond = of_batch(items, told, encode, autoencoder, "original")
        if num_classes:
            cond["class_cond"] = items["class"]
        cond = {name: x.to(device) for name, x in cond.items()}
        torch.manual_seed(derive_seed(seed, b))
        if autoencoder is not None:
            bits = _latent_bits(denoiser, autoencoder, images, cond, model)
        else:
            bits, _ = bits_per_dim(
                denoiser,
                images.clamp(-1, 1),
                model["sigma_min"],
                model["sigma_max"],
                cond,
                atol=_TOLERANCE,
                rtol=_TOLERANCE,
                bins=bins,
                sigma_data=model["sigma_data"],
            )
        bits = bits.to(accelerator.device)
        rows.append(torch.nn.functional.pad(bits.float(), (0, batch_size - len(part))))
    empty = torch.zeros(0, batch_size, device=accelerator.device)
    everyone = gather_shares(accelerator, torch.cat([empty, *(row[None] for row in rows)]), count)
    return None if everyone is None else everyone.flatten()[:n].cpu()


def _latent_bits(
    denoiser: nn.Module,
    autoencoder: Autoencoder,
    images: Tensor,
    cond: dict[str, Tensor],
    model: Mapping[str, Any],
) -> Tensor:
    """-log2 of the density of the images' latents per dimension, (n,)."""
    with torch.no_grad():
        latents = autoencoder.sample(autoencoder.encode(images).float())
    ll, _ = log_likelihood(
        denoiser,
        latents,
        model["sigma_min"],
        model["sigma_max"],
        cond,
        atol=_TOLERANCE,
        rtol=_TOLERANCE,
        prior_std=math.hypot(model["sigma_max"], model["sigma_data"]),
    )
    return -ll / (latents[0].numel() * math.log(2))
